"""A training process as its rank actor sees it: a connection to the node's forkserver."""

import json
import os
import signal
import socket
from collections.abc import Sequence

from service.cluster.forkserver import REQUEST_BYTES, ForkRequest
from service.domain.errors import ServiceError
from service.linux import kill_group


class ForkRefused(ServiceError):
    """The forkserver did not start the process."""


class ForkedProcess:
    """One training process. Closing it, or the end of this process, kills it and its group.

    Args:
        socket_name: of the forkserver, in the abstract namespace.
        request: what to start.
        task_json: handed to the entry point.
        descriptors: the channel, and the listening socket of the rendezvous where there is one.
        timeout_s: how long earlier holders of the node's resources may take to go.

    Raises:
        ForkRefused: a later attempt runs here, or the forkserver is gone.
    """

    def __init__(
        self, *, socket_name: str, request: ForkRequest, task_json: str, descriptors: Sequence[int], timeout_s: float
    ) -> None:
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        task = os.memfd_create("task")
        try:
            self._connection.settimeout(timeout_s)
            self._connection.connect("\0" + socket_name)
            os.write(task, task_json.encode())
            socket.send_fds(self._connection, [request.model_dump_json().encode()], [task, *descriptors])
            answer = self._receive()
        except OSError as error:
            self._connection.close()
            raise ForkRefused(f"The forkserver of this node did not start rank {request.rank}: {error}") from error
        finally:
            os.close(task)
        if "pid" not in answer:
            self._connection.close()
            why = answer.get("error", "it ended")
            raise ForkRefused(f"The forkserver of this node refused rank {request.rank}: {why}.")
        self._connection.settimeout(None)  # the process may run for as long as it takes
        self.pid = int(str(answer["pid"]))

    def fileno(self) -> int:
        """Readable once the process is gone, for a selector."""
        return self._connection.fileno()

    def exit_status(self) -> int:
        """Wait until the process and its group are gone.

        Returns:
            Its exit code; negative is the signal that ended it. If the forkserver itself went away, −9: its
            children die with it.
        """
        answer = self._receive()
        if "exit" not in answer:
            # The helpers that the process started are not tied to the forkserver; its reaper ends them too.
            kill_group(self.pid)
            return -signal.SIGKILL
        return int(str(answer["exit"]))

    def close(self) -> None:
        """Kill the process and its group, unless they are gone."""
        self._connection.close()

    def kill(self) -> None:
        """Kill the process and its group; ``exit_status`` then returns once they are gone."""
        self._connection.shutdown(socket.SHUT_WR)

    def _receive(self) -> dict[str, object]:
        data = self._connection.recv(REQUEST_BYTES)
        message: dict[str, object] = json.loads(data) if data else {}
        return message
