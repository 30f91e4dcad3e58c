"""What load the API and the job database carry.

    python -m benchmarks.service_load --database both
    python -m benchmarks.service_load --database sqlite --parts submit list --quick   # nothing is written

Each database is a new one: an SQLite file in a temporary directory, a schema of its own on the PostgreSQL server at
SYNCBN_TEST_POSTGRES_URL. The API is a process of its own with the settings that it has everywhere; so is the load.

submit   POST /v1/jobs by wrk, 16 connections, each job and its Idempotency-Key another. An answer counts once it is
         committed with an fsync, which is checked to be on; then, that every answered job has its one row.
list     GET /v1/jobs, filtered and deep, of 100 000 jobs.
ingest   SchedulerStore.ingest of journal records of five metrics each, roll-ups included; then, that every point is
         there, and every roll-up counts them.
curve    GET /v1/jobs/{id}/metrics of a curve of 1 000 000 points, the whole and parts of it.
streams  500 event streams, half of them of one job, half of one job each, while events are taken in. Each breaks off
         now and then and comes back with Last-Event-ID; then, that each got every position once and in order.

Correctness is checked in every round and ends the benchmark where it fails. Medians over the rounds. Prints a table and
writes JSON. Needs wrk: Debian and Ubuntu have it as the package `wrk`, elsewhere see https://github.com/wg/wrk.
"""

import argparse
import http.client
import itertools
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import sqlalchemy as sa

from benchmarks import results
from service.domain.job import Outcome, Reason
from service.domain.journal import JournalRecord, Launched, Metrics, Report, Resumed, Running
from service.domain.ports import Lease
from service.domain.spec import JobSpec, parse_spec
from service.store import SqlStore, migrate
from service.store.engine import create_engine
from tests.contract.store_databases import postgres_schema, sqlite_url
from tests.contract.store_examples import lead

TOKEN = "load"
CONNECTIONS = 16
NAMES = ("train/loss", "train/accuracy", "train/learning_rate", "train/gradient_norm", "train/step_time_s")
SCRIPT = """
local n, run = 0, os.getenv("LOAD_RUN")
local acknowledged = io.open(os.getenv("LOAD_ACKNOWLEDGED"), "w")
local failed = 0

function request()
  n = n + 1
  local headers = {
    ["Authorization"] = "Bearer load", ["Content-Type"] = "application/json", ["Idempotency-Key"] = run .. "-" .. n }
  local body = '{"name":"load ' .. n .. '","labels":{"team":"vision","run":"r' .. n .. '"},'
    .. '"model":{"factory":"builtin:small-resnet"},"dataset":{"factory":"builtin:digits"},'
    .. '"optimizer":{"name":"sgd","learning_rate":0.1,"momentum":0.9},"schedule":{"name":"cosine","warmup_steps":10},'
    .. '"batch":{"size":16,"max_per_rank":4},"workers":4,"steps":350,"seed":' .. n .. '}'
  return wrk.format("POST", "/v1/jobs", headers, body)
end

function response(status, headers, body)
  if status == 201 then
    acknowledged:write(headers["location"] or headers["Location"], "\\n")
  else
    io.stderr:write(status, " ", body, "\\n")
  end
end

function done(summary, latency, requests)
  io.write(string.format('{"requests": %d, "duration_s": %.6f, "p50_ms": %.3f, "p99_ms": %.3f, "failed": %d}\\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.status
    + summary.errors.timeout))
end
"""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of it.

    Attributes:
        rounds: of submit and ingest.
        seconds: of load in a round.
        jobs: to list.
        points: of the curve, and of a round of ingest.
        streams: at once.
        requests: of each kind.
    """

    rounds: int = 5
    seconds: int = 8
    jobs: int = 100_000
    points: int = 1_000_000
    streams: int = 500
    requests: int = 100


QUICK = Size(rounds=1, seconds=2, jobs=3_000, points=50_000, streams=60, requests=20)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of the table.

    Attributes:
        part: of the benchmark.
        what: was measured.
        values: of the rounds, or of the requests.
        shown: in words.
        target: in words; None where there is none.
        is_met: whether it is.
    """

    part: str
    what: str
    values: tuple[float, ...]
    shown: str
    target: str | None = None
    is_met: bool = True


class Api:
    """The API as a process of its own, on a database that is there."""

    def __init__(self, url: str, directory: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        environment = {
            **os.environ,
            "SYNCBN_DATABASE_URL": url,
            "SYNCBN_DATA_DIR": str(directory),
            "SYNCBN_TOKEN": TOKEN,
        }
        command = [sys.executable, "-m", "service", "api", "--port", str(self.port), "--parent-pid", str(os.getpid())]
        with (directory / "api.log").open("w") as log:
            self.process = subprocess.Popen(command, env=environment, stderr=log)
        deadline = time.monotonic() + 30
        while True:
            try:
                if self.get("/readyz")[0] == http.HTTPStatus.OK:
                    return
            except OSError:
                pass
            assert time.monotonic() < deadline, (directory / "api.log").read_text()
            time.sleep(0.05)

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path, headers={"Authorization": f"Bearer {TOKEN}"})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, content

    def time_requests(self, paths: Sequence[str]) -> list[float]:
        """Milliseconds of each request, one after another on one connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        times_ms = []
        for path in paths:
            started = time.perf_counter()
            connection.request("GET", path, headers={"Authorization": f"Bearer {TOKEN}"})
            answer = connection.getresponse()
            answer.read()
            times_ms.append(1e3 * (time.perf_counter() - started))
            assert answer.status == http.HTTPStatus.OK, path
        connection.close()
        return times_ms

    def cpu_s(self) -> float:
        """Processor time of the process so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(timeout=30)


@contextmanager
def database(kind: str, directory: Path) -> Iterator[str]:
    """Yield the URL of a new database with tables, whose commits reach the disk."""
    with ExitStack() as stack:
        url = sqlite_url(directory / "service.sqlite") if kind == "sqlite" else stack.enter_context(postgres_schema())
        migrate(url)
        engine = create_engine(url)
        with engine.connect() as connection:
            if kind == "sqlite":
                settings = [
                    connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")
                ]
                assert settings == ["wal", 2], f"{settings}: SQLite does not wait for the disk"
            else:
                settings = [
                    connection.exec_driver_sql(f"SHOW {name}").scalar() for name in ("fsync", "synchronous_commit")
                ]
                assert settings == ["on", "on"], f"{settings}: PostgreSQL does not wait for the disk"
        engine.dispose()
        yield url


def measure_submit(url: str, directory: Path, size: Size) -> Iterator[Figure]:
    if shutil.which("wrk") is None:
        sys.exit("wrk is not installed. Debian and Ubuntu: apt-get install wrk; else https://github.com/wg/wrk.")
    script, acknowledged = directory / "submit.lua", directory / "acknowledged"
    script.write_text(SCRIPT)
    rates, p99s, cpu_ms = [], [], []
    api = Api(url, directory)
    engine = create_engine(url)
    before = _count(engine, "jobs")
    try:
        for place in range(size.rounds + 1):  # the first warms up
            cpu_s = api.cpu_s()
            run = subprocess.run(
                ["wrk", "--threads=1", f"--connections={CONNECTIONS}", f"--duration={size.seconds}s",
                 f"--script={script}", f"http://127.0.0.1:{api.port}"],
                env={**os.environ, "LOAD_RUN": str(place), "LOAD_ACKNOWLEDGED": str(acknowledged)},
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            summary = json.loads(run.stdout.splitlines()[-1])
            assert summary["failed"] == 0, run.stderr[:2000]
            after = _check_submitted(engine, acknowledged, before)
            cpu_ms.append(1e3 * (api.cpu_s() - cpu_s) / (after - before))
            before = after
            rates.append(summary["requests"] / summary["duration_s"])
            p99s.append(summary["p99_ms"])
    finally:
        api.stop()
        engine.dispose()
    rates, p99s, cpu_ms = rates[1:], p99s[1:], cpu_ms[1:]
    rate, p99 = statistics.median(rates), statistics.median(p99s)
    yield Figure(
        part="submit", what="durable submits", values=tuple(rates), shown=f"{rate:.0f} /s",
        target="≥ 1000 /s", is_met=rate >= 1000,
    )  # fmt: skip
    yield Figure(
        part="submit", what="p99", values=tuple(p99s), shown=f"{p99:.1f} ms", target="≤ 50 ms", is_met=p99 <= 50
    )
    cpu = statistics.median(cpu_ms)
    yield Figure(part="submit", what="processor time of the API", values=tuple(cpu_ms), shown=f"{cpu:.2f} ms each")


def _check_submitted(engine: sa.Engine, acknowledged: Path, before: int) -> int:
    """Every job that was answered has its one row, and no request made two; returns how many there are."""
    answered = [line.rpartition("/")[2] for line in acknowledged.read_text().splitlines()]
    assert len(set(answered)) == len(answered), "one job was answered for two requests"
    deadline = time.monotonic() + 10
    while True:  # what wrk no longer waited for is still being committed
        after = _count(engine, "jobs")
        time.sleep(0.2)
        if _count(engine, "jobs") == after:
            break
        assert time.monotonic() < deadline
    assert len(answered) <= after - before <= len(answered) + CONNECTIONS
    with engine.connect() as connection:
        ids = set(connection.execute(sa.text("SELECT id FROM jobs")).scalars())
        used = set(connection.execute(sa.text("SELECT response FROM idempotency_keys")).scalars())
    assert ids >= set(answered), "an answered job is lost"
    assert ids == used, "a job without its key, or a key without its job"
    assert _count(engine, "events") == _count(engine, "jobs") == after
    return after


def measure_list(url: str, directory: Path, size: Size) -> Iterator[Figure]:
    store = SqlStore(url)
    for first in range(0, size.jobs, 1000):
        waiting = [store.submit_soon(_spec(number)) for number in range(first, min(first + 1000, size.jobs))]
        for future in waiting:
            future.result()
    store.close()
    engine = create_engine(url)
    with engine.begin() as connection:
        # Most have ended, as after months of use.
        connection.execute(
            sa.text(
                "UPDATE jobs SET status = CASE WHEN number % 100 < 3 THEN 'queued' "
                "WHEN number % 100 = 3 THEN 'running' "
                "WHEN number % 100 < 15 THEN 'failed' WHEN number % 100 < 20 THEN 'cancelled' ELSE 'succeeded' END"
            )
        )
    engine.dispose()
    api = Api(url, directory)
    try:
        cursors, cursor = [], None
        for _ in range(size.jobs // 500 - 1):
            query = {"limit": 500} | ({"cursor": cursor} if cursor else {})
            page = json.loads(api.get(f"/v1/jobs?{urlencode(query)}")[1])
            cursor = page["next_cursor"]
            cursors.append(cursor)
        assert len(cursors) == size.jobs // 500 - 1
        everywhere = random.Random(0).choices(cursors, k=size.requests)
        shapes: dict[str, Callable[[str], list[tuple[str, object]]]] = {
            "newest": lambda cursor: [],
            "deep": lambda cursor: [("cursor", cursor)],
            "deep, 500 a page": lambda cursor: [("cursor", cursor), ("limit", 500)],
            "deep, status": lambda cursor: [("cursor", cursor), ("status", "running")],
            "deep, statuses": lambda cursor: [("cursor", cursor), ("status", "failed"), ("status", "queued")],
            "deep, label": lambda cursor: [("cursor", cursor), ("label", "team=team-3")],
            "deep, labels": lambda cursor: [("cursor", cursor), ("label", "team=team-3"), ("label", "kind=kind-1")],
            "deep, name": lambda cursor: [("cursor", cursor), ("name", "study 7")],
            "deep, all": lambda cursor: [
                ("cursor", cursor), ("status", "failed"), ("label", "team=team-3"), ("name", "study 3"),
            ],
            "a label of one job": lambda cursor: [("label", "run=run-17")],
        }  # fmt: skip
        for what, query_of in shapes.items():
            paths = [f"/v1/jobs?{urlencode(query_of(cursor))}" for cursor in everywhere]
            times_ms = api.time_requests(paths)
            p50, p99 = statistics.median(times_ms), _p99(times_ms)
            yield Figure(
                part="list", what=f"{what}, p50 and p99", values=tuple(times_ms), shown=f"{p50:.1f} and {p99:.1f} ms",
                target="p99 ≤ 100 ms", is_met=p99 <= 100,
            )  # fmt: skip
    finally:
        api.stop()


def measure_ingest(url: str, directory: Path, size: Size) -> Iterator[Figure]:
    store = SqlStore(url)
    lease = lead(store)
    engine = create_engine(url)
    rates = []
    for _ in range(size.rounds):
        job_id = _run(store, lease)
        before = _count(engine, "metrics")
        num_steps = size.points // 5 // len(NAMES)
        reports = (Metrics(step=step, values=dict.fromkeys(NAMES, 1.0 / step)) for step in range(1, num_steps + 1))
        records = list(_records(reports))
        started = time.perf_counter()
        for first in range(0, len(records), 1000):
            store.ingest(lease, job_id, 1, records[first : first + 1000])
        rates.append(num_steps * len(NAMES) / (time.perf_counter() - started))
        assert _count(engine, "metrics") == before + num_steps * len(NAMES)
        for curve in store.curves(job_id, max_points=1000).values():
            assert sum(bucket.finite_count for bucket in curve.buckets) == num_steps
    store.close()
    engine.dispose()
    rate = statistics.median(rates)
    yield Figure(
        part="ingest", what="metric points, 5000 a transaction", values=tuple(rates), shown=f"{rate:.0f} /s",
        target="≥ 50000 /s", is_met=rate >= 50_000,
    )  # fmt: skip


def measure_curve(url: str, directory: Path, size: Size) -> Iterator[Figure]:
    store = SqlStore(url)
    lease = lead(store)
    job_id = _run(store, lease)
    generator = random.Random(0)
    values = [1.0 / (1 + step / 1000) + generator.gauss(0, 0.1) for step in range(1, size.points + 1)]
    reports = (Metrics(step=step, values={"train/loss": value}) for step, value in enumerate(values, 1))
    records = _records(reports)
    while batch := list(itertools.islice(records, 5000)):
        store.ingest(lease, job_id, 1, batch)
    store.close()
    api = Api(url, directory)
    try:
        path = f"/v1/jobs/{job_id}/metrics?name=train/loss&max_points=1000"
        series = json.loads(api.get(path)[1])["series"]["train/loss"]
        first, width = 0, series["rollup"]["bucket_steps"]
        for place, count in enumerate(series["rollup"]["counts"]):
            part = values[first : first + count]
            assert series["rollup"]["min"][place] == min(part)
            assert series["rollup"]["max"][place] == max(part)
            assert series["rollup"]["last"][place] == part[-1]
            # Added up in another order: a few roundings of numbers of about 1.
            assert abs(series["values"][place] - statistics.fmean(part)) < 1e-12
            first += count
        assert first == size.points
        shapes = {f"whole, {len(series['steps'])} buckets of {width} steps": [path] * size.requests}
        for share in (10, 1000):
            starts = [generator.randrange(size.points - size.points // share) for _ in range(size.requests)]
            zooms = [f"{path}&from_step={start}&to_step={start + size.points // share}" for start in starts]
            shapes[f"1/{share} of it"] = zooms
        for what, paths in shapes.items():
            times_ms = api.time_requests(paths)
            p50, p99 = statistics.median(times_ms), _p99(times_ms)
            yield Figure(
                part="curve", what=f"{what}, p50 and p99", values=tuple(times_ms), shown=f"{p50:.1f} and {p99:.1f} ms",
                target="≤ 100 ms", is_met=p99 <= 100,
            )  # fmt: skip
    finally:
        api.stop()


def measure_streams(url: str, directory: Path, size: Size) -> Iterator[Figure]:
    store = SqlStore(url)
    lease = lead(store)
    alone = [_run(store, lease) for _ in range(size.streams // 2)]
    shared = _run(store, lease)
    watched = [*alone, *[shared] * (size.streams - len(alone))]
    api = Api(url, directory)
    try:
        (directory / "watched.json").write_text(json.dumps(watched))
        clients = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.stream_clients", str(api.port), TOKEN, str(directory / "watched.json")],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert clients.stdout is not None
        assert clients.stdout.readline() == "connected\n"
        sequences = dict.fromkeys([*alone, shared], 3)
        num_records = 0
        started = time.perf_counter()

        def report(job_id: str, count: int) -> None:
            first = sequences[job_id] + 1
            reports = (
                # What is measured travels as the value: when it was reported.
                Metrics(step=step, values={"train/loss": time.time(), "train/accuracy": 0.5})
                for step in range(first - 3, first - 3 + count)
            )
            store.ingest(lease, job_id, 1, list(_records(reports, first=first)))
            sequences[job_id] += count

        turns = itertools.cycle(alone)
        deadline = started + 2 * size.seconds
        while time.perf_counter() < deadline:
            report(shared, 2)
            for job_id in itertools.islice(turns, 10):
                report(job_id, 10)
            num_records += 102
        ingest_s = time.perf_counter() - started
        for job_id in [*alone, shared]:
            store.seal_attempt(lease, job_id, 1, outcome=Outcome.SUCCEEDED, reason=Reason.COMPLETED, failure=None)
        answer = json.loads(clients.communicate(timeout=120)[0])
        last = {
            job_id: one.feed.position for job_id, one in store.follow(dict.fromkeys([*alone, shared], 1 << 40)).items()
        }
    finally:
        api.stop()
        store.close()
    assert clients.returncode == 0
    assert len(answer["streams"]) == len(watched)
    for job_id, stream in zip(watched, answer["streams"], strict=True):
        assert stream["positions"] == last[job_id], f"{job_id}: {stream} but the feed has {last[job_id]}"
    assert answer["reconnects"] > 0
    yield Figure(
        part="streams",
        what=f"{len(watched)} streams, {answer['reconnects']} times broken off: messages lost, doubled, out of order",
        values=(0.0,), shown="0", target="0",
    )  # fmt: skip
    rate = answer["messages"] / ingest_s
    yield Figure(part="streams", what="messages delivered", values=(rate,), shown=f"{rate:.0f} /s")
    yield Figure(
        part="streams",
        what="reports taken in",
        values=(num_records / ingest_s,),
        shown=f"{num_records / ingest_s:.0f} /s",
    )
    delays = answer["delays_s"]
    yield Figure(
        part="streams", what="from report to client, p50 and p99", values=tuple(delays),
        shown=f"{1e3 * delays[0]:.0f} and {1e3 * delays[1]:.0f} ms",
    )  # fmt: skip


PARTS: dict[str, Callable[[str, Path, Size], Iterator[Figure]]] = {
    "submit": measure_submit,
    "list": measure_list,
    "ingest": measure_ingest,
    "curve": measure_curve,
    "streams": measure_streams,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", choices=["sqlite", "postgres", "both"], default="both")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=Size.rounds)
    parser.add_argument("--seconds", type=int, default=Size.seconds)
    parser.add_argument("--quick", action="store_true", help="a little of everything; nothing is written")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else Size(rounds=arguments.rounds, seconds=arguments.seconds)
    kinds = ["sqlite", "postgres"] if arguments.database == "both" else [arguments.database]
    figures: dict[str, list[Figure]] = {}
    for kind, part in itertools.product(kinds, arguments.parts):
        load = os.getloadavg()[0]
        try:
            with tempfile.TemporaryDirectory() as directory, database(kind, Path(directory)) as url:
                for figure in PARTS[part](url, Path(directory), size):
                    figures.setdefault(kind, []).append(figure)
                    target = "" if figure.target is None else f"{figure.target}; "
                    print(f"{kind} {part}: {figure.what}: {figure.shown} ({target}load {load:.1f})", flush=True)
        except pytest.skip.Exception as reason:  # as the tests' databases say it
            sys.exit(f"{reason}. Set SYNCBN_TEST_POSTGRES_URL, or give --database sqlite.")
    if not arguments.quick:
        _record(figures, vars(arguments))
    missed = [figure for of_kind in figures.values() for figure in of_kind if not figure.is_met]
    for figure in missed:
        print(f"Missed: {figure.part}, {figure.what}: {figure.shown}, not {figure.target}", file=sys.stderr)
    return 1 if missed and not arguments.quick else 0


def _record(figures: dict[str, list[Figure]], configuration: dict[str, Any]) -> None:
    rows = [
        [kind, figure.part, figure.what, figure.shown, figure.target or ""]
        for kind, of_kind in figures.items()
        for figure in of_kind
    ]
    report = results.table(["database", "part", "what", "measured", "target"], rows)
    measured = {
        kind: [
            {"part": figure.part, "what": figure.what, "values": figure.values, "shown": figure.shown}
            for figure in of_kind
        ]
        for kind, of_kind in figures.items()
    }
    results.record("service_load", {"configuration": configuration, "figures": measured}, report)


def _spec(number: int) -> JobSpec:
    return parse_spec(
        {
            "name": f"study {number % 50}",
            "labels": {"team": f"team-{number % 20}", "kind": f"kind-{number % 3}", "run": f"run-{number}"},
            "model": {"factory": "builtin:small-resnet"},
            "dataset": {"factory": "builtin:digits"},
            "batch": {"size": 16},
            "steps": 100 + number,
        }
    )


def _run(store: SqlStore, lease: Lease) -> str:
    """A job that runs; three records of its journal are taken in."""
    job, _ = store.submit(_spec(0))
    assert store.create_attempt(lease, job.id, node_ids=["node"]) is not None
    reports: list[Report] = [Launched(supervisor_pid=1), Resumed(step=0), Running(num_steps=None)]
    store.ingest(lease, job.id, 1, list(_records(reports, first=1)))
    return job.id


def _records(reports: Iterable[Report], *, first: int = 4) -> Iterator[JournalRecord]:
    for sequence, report in enumerate(reports, first):
        yield JournalRecord(sequence=sequence, time=datetime.now(UTC), report=report)


def _count(engine: sa.Engine, table: str) -> int:
    with engine.connect() as connection:
        return int(connection.execute(sa.text(f"SELECT count(*) FROM {table}")).scalar_one())


def _p99(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[98]


if __name__ == "__main__":
    sys.exit(main())
