"""Many clients of event streams in one process, for ``benchmarks.service_load``.

    python -m benchmarks.stream_clients PORT TOKEN FILE   # FILE: a JSON list of ids of jobs, one for each stream

Prints ``connected`` once every stream has had its first message, and at the end of all of them what each got, as JSON.
A stream that misses a position, or gets one twice or out of order, ends the process with an error. Each breaks off
after some messages and comes back with ``Last-Event-ID``, as a browser would.
"""

import asyncio
import json
import random
import statistics
import sys
import time
from pathlib import Path

BREAK_EVERY = (10, 100)
"""A stream breaks off after so many messages, at least and at most."""


class Client:
    """One stream, across its connections."""

    def __init__(self, job_id: str, seed: int) -> None:
        self.job_id = job_id
        self.position = 0
        self.messages = 0
        self.reconnects = 0
        self.delays_s: list[float] = []
        self.first = asyncio.Event()
        self._generator = random.Random(seed)

    async def run(self, port: int, token: str) -> None:
        """Read to the end."""
        while not await self._read(port, token, self._generator.randint(*BREAK_EVERY)):
            self.reconnects += 1

    async def _read(self, port: int, token: str, most: int) -> bool:
        """Read some messages of one connection; return whether the last one was among them."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        # By HTTP/1.0, which has no chunks.
        writer.write(
            f"GET /v1/jobs/{self.job_id}/stream HTTP/1.0\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
            f"Last-Event-ID: {self.position}\r\n\r\n".encode()
        )
        assert b"200" in await reader.readline()
        while (await reader.readline()).strip():
            pass
        kind, number, data = "", 0, b""
        try:
            while line := await reader.readline():
                name, _, value = line.rstrip(b"\n").partition(b": ")
                if name == b"id":
                    number = int(value)
                elif name == b"event":
                    kind = value.decode()
                elif name == b"data":
                    data = value
                elif not name and kind:
                    if kind == "end":
                        return True
                    self._take(kind, number, data)
                    kind = ""
                    most -= 1
                    if most == 0:
                        return False
            return False
        finally:
            writer.close()

    def _take(self, kind: str, number: int, data: bytes) -> None:
        assert number == self.position + 1, f"{self.job_id}: {number} follows {self.position}"
        self.position = number
        self.messages += 1
        self.first.set()
        if kind == "metrics":
            self.delays_s.append(time.time() - json.loads(data)["values"]["train/loss"])


async def run_clients(port: int, token: str, job_ids: list[str]) -> None:
    """Run them all to their ends."""
    clients = [Client(job_id, seed) for seed, job_id in enumerate(job_ids)]
    async with asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(client.run(port, token))
        await asyncio.gather(*(client.first.wait() for client in clients))
        print("connected", flush=True)
    delays_s = [delay for client in clients for delay in client.delays_s]
    percentiles = statistics.quantiles(delays_s, n=100, method="inclusive")
    answer = {
        "streams": [{"positions": client.position} for client in clients],
        "messages": sum(client.messages for client in clients),
        "reconnects": sum(client.reconnects for client in clients),
        "delays_s": [percentiles[49], percentiles[98]],
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    asyncio.run(run_clients(int(sys.argv[1]), sys.argv[2], json.loads(Path(sys.argv[3]).read_text())))
