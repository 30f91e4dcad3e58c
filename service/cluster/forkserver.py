"""A node's forkserver: forks training processes from an image that has torch imported already.

Started by the node's agent, it listens on an abstract Unix socket. A rank actor connects, asks for one process and
holds the connection for as long as it wants that process: end of file kills the process and its whole group. The
forkserver answers with the process id, and with the exit status once the process and its group are gone.

It fences too: before it forks, every process of an earlier attempt of the same job, and every holder of the same
devices, is killed and proven gone. Those of another forkserver of the machine, an earlier one say, are waited for: what
a process holds is a locked file, which it inherits, and which the reaper holds until its whole group has ended. The
forkserver runs no thread and no torch operation, and never touches CUDA.

Messages (each one packet of a ``SOCK_SEQPACKET`` socket, JSON):

- request, with file descriptors [task, channel] or [task, channel, rendezvous]: ``ForkRequest``;
- answers: ``{"pid": n}``, then ``{"exit": status}`` as ``os.waitstatus_to_exitcode`` gives it (−9: killed by
  SIGKILL), or ``{"error": text}``.
"""

import argparse
import fcntl
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from service.cluster.fence import Fence, Fences, Holding
from service.cluster.reaper import Reaper
from service.linux import become_subreaper, die_with_parent, group_is_alive, kill_group, set_process_name

CHANNEL_FD = 3
RENDEZVOUS_FD = 4
FENCE_FD = 5
REQUEST_BYTES = 1 << 16
_RECHECK_S = 0.02
# How long a request waits for what another forkserver left; its owner waits a little longer, and is told why.
FOREIGN_HOLDER_TIMEOUT_S = 25.0
_STALE = "a later attempt of this job has already started on this node"


class ForkRequest(BaseModel):
    """What a rank actor asks for.

    Attributes:
        job_id: whose process it is.
        attempt: its fencing token.
        rank: in the process's name.
        devices: names of what it must hold alone, such as ``gpu:0``.
        environment: added to the forkserver's own.
        log_path: local file that takes its output, appended to.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    job_id: str
    attempt: int
    rank: int
    devices: tuple[str, ...]
    environment: dict[str, str]
    log_path: str

    @property
    def holding(self) -> Holding:
        """What the process will hold alone."""
        return Holding(job_id=self.job_id, attempt=self.attempt, devices=self.devices)


@dataclass(kw_only=True)
class _Holder:
    """A process, or one that waits until earlier ones are gone, and the connection that wants it."""

    connection: socket.socket
    request: ForkRequest
    descriptors: list[int] = field(default_factory=list)
    pid: int = 0
    exit_status: int | None = None
    fence: Fence | None = None
    since: float = field(default_factory=time.monotonic)


class Forkserver:
    """Listens and forks; single-threaded.

    Args:
        socket_name: name in the abstract namespace.
        entry: called in the child as ``entry(task_json, channel_fd) -> exit status``.
        fences: of this machine.
        reaper: ends what this forkserver leaves.
    """

    def __init__(self, socket_name: str, entry: Callable[[str, int], int], fences: Fences, reaper: Reaper) -> None:
        self._entry = entry
        self._fences = fences
        self._reaper = reaper
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind("\0" + socket_name)
        self._listener.listen(128)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._holders: list[_Holder] = []
        self._newest_attempt: dict[str, int] = {}
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._selector.register(wake_read, selectors.EVENT_READ, lambda: os.read(wake_read, 4096))

    def serve(self) -> None:
        """Run until killed."""
        while True:
            timeout_s = (
                _RECHECK_S
                if any(not holder.pid or holder.exit_status is not None for holder in self._holders)
                else None
            )
            for key, _ in self._selector.select(timeout_s):
                key.data()
            self._reap()
            self._report_gone()
            self._start_waiting()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _, peer_uid, _ = struct.unpack("3i", credentials)
        if peer_uid != os.geteuid():
            connection.close()
            return
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._receive_request(connection))

    def _receive_request(self, connection: socket.socket) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(connection, REQUEST_BYTES, 3)
        except OSError:
            data, descriptors = b"", []
        if not data:
            self._forget(connection)
            return
        try:
            request = ForkRequest.model_validate_json(data)
        except ValidationError as error:
            self._refuse(connection, descriptors, f"this is no request: {error}")
            return
        if self._is_stale(request):
            self._refuse(connection, descriptors, _STALE)
            return
        holder = _Holder(connection=connection, request=request, descriptors=descriptors)
        self._newest_attempt[request.job_id] = request.attempt
        self._holders.append(holder)
        self._selector.modify(connection, selectors.EVENT_READ, lambda: self._on_hangup(holder))

    def _on_hangup(self, holder: _Holder) -> None:
        """The rank actor says nothing after its request, so whatever is readable is its end."""
        self._selector.unregister(holder.connection)
        if holder.pid:
            _kill_group(holder.pid)
        else:
            self._holders.remove(holder)
            self._close(holder)

    def _is_stale(self, request: ForkRequest) -> bool:
        return request.attempt < self._newest_attempt.get(request.job_id, 0)

    def _earlier_holders(self, holder: _Holder) -> list[_Holder]:
        wanted = holder.request.holding
        return [other for other in self._holders if other.pid and wanted.excludes(other.request.holding)]

    def _foreign_holding(self, holder: _Holder) -> Holding | None:
        """Return what a process of another forkserver holds that is in the way."""
        own = {other.fence.name for other in self._holders if other.fence is not None}
        wanted = holder.request.holding
        return next((other for other in self._fences.in_force(but=own) if wanted.excludes(other)), None)

    def _start_waiting(self) -> None:
        for holder in [holder for holder in self._holders if not holder.pid]:
            if self._is_stale(holder.request):  # a later attempt came while this one waited
                self._give_up(holder, _STALE)
                continue
            earlier = self._earlier_holders(holder)
            for other in earlier:
                _kill_group(other.pid)
            if earlier:
                continue
            try:
                foreign = self._foreign_holding(holder)
                if foreign is None:
                    holder.fence = self._fences.put_up(holder.request.holding)
            except OSError as error:  # the disk is full, perhaps
                self._give_up(holder, str(error))
                continue
            if foreign is None:
                self._start(holder)
            elif foreign.job_id == holder.request.job_id and foreign.attempt > holder.request.attempt:
                self._give_up(holder, _STALE)
            elif time.monotonic() - holder.since > FOREIGN_HOLDER_TIMEOUT_S:
                whose = f"a process of job {foreign.job_id}, attempt {foreign.attempt}"
                self._give_up(holder, f"{whose}, has not ended on this machine and holds what it needs")

    def _give_up(self, holder: _Holder, why: str) -> None:
        self._holders.remove(holder)
        self._refuse(holder.connection, holder.descriptors, why)

    def _start(self, holder: _Holder) -> None:
        holder.pid = self._fork(holder)
        self._have_watched(holder)
        for descriptor in holder.descriptors:
            os.close(descriptor)
        _answer(holder.connection, {"pid": holder.pid})

    def _have_watched(self, holder: _Holder) -> None:
        assert holder.fence is not None
        try:
            self._reaper.watch(holder.pid, holder.fence.fd)
        except OSError:
            os.kill(self._reaper.pid, signal.SIGKILL)  # another one takes its place when this one is waited for

    def _replace_reaper(self) -> None:
        """Start another reaper in the place of one that has died, with what it watched."""
        self._reaper.close()
        self._reaper = Reaper()
        for holder in self._holders:
            if holder.pid:
                self._have_watched(holder)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._reaper.pid:
                self._replace_reaper()
            for holder in self._holders:
                if holder.pid == pid:
                    holder.exit_status = os.waitstatus_to_exitcode(status)
                    kill_group(pid)  # its helpers

    def _report_gone(self) -> None:
        for holder in [holder for holder in self._holders if holder.exit_status is not None]:
            if group_is_alive(holder.pid):
                continue
            self._holders.remove(holder)
            assert holder.fence is not None
            os.close(holder.fence.fd)
            self._reaper.forget(holder.pid)
            _answer(holder.connection, {"exit": holder.exit_status})
            self._forget(holder.connection)

    def _fork(self, holder: _Holder) -> int:
        forkserver_pid = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            status = self._run_child(holder, forkserver_pid)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _run_child(self, holder: _Holder, forkserver_pid: int) -> int:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        die_with_parent(forkserver_pid)
        request = holder.request
        set_process_name(f"syncbn-rank-{request.rank}")
        log = os.open(request.log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        task_json = _read_all(holder.descriptors[0])
        assert holder.fence is not None
        wanted = dict(enumerate((os.open(os.devnull, os.O_RDONLY), log, log, *holder.descriptors[1:])))
        wanted[FENCE_FD] = holder.fence.fd
        # Above every descriptor in use first, so that no dup2 overwrites one that is still needed.
        kept = {target: fcntl.fcntl(descriptor, fcntl.F_DUPFD, FENCE_FD + 1) for target, descriptor in wanted.items()}
        for target in range(FENCE_FD + 1):
            if target in kept:
                os.dup2(kept[target], target, inheritable=target <= 2)  # its channel is no helper's to hold
            else:
                with suppress(OSError):  # not open
                    os.close(target)
        os.closerange(FENCE_FD + 1, os.sysconf("SC_OPEN_MAX"))
        os.environ.update(request.environment)
        # When memory runs out, the kernel ends a training process, not what watches over it.
        Path("/proc/self/oom_score_adj").write_text("1000")
        return self._entry(task_json, CHANNEL_FD)

    def _refuse(self, connection: socket.socket, descriptors: list[int], why: str) -> None:
        _answer(connection, {"error": why})
        self._forget(connection)
        for descriptor in descriptors:
            os.close(descriptor)

    def _forget(self, connection: socket.socket) -> None:
        if connection.fileno() in self._selector.get_map():
            self._selector.unregister(connection)
        connection.close()

    def _close(self, holder: _Holder) -> None:
        holder.connection.close()
        for descriptor in holder.descriptors:
            os.close(descriptor)


def _answer(connection: socket.socket, message: dict[str, object]) -> None:
    try:
        connection.send(json.dumps(message).encode())
    except OSError:
        return  # it hung up; there is nobody to tell


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        # Gone, or so young that it has not called setsid yet.
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def _read_all(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    pieces = []
    while piece := os.read(descriptor, 1 << 20):
        pieces.append(piece)
    return b"".join(pieces).decode()


def main() -> None:
    """Start from the command line; prints ``ready`` when it listens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket", required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--entry", required=True, help="module:function")
    parser.add_argument("--fences", type=Path, required=True, help="directory that the machine's forkservers share")
    parser.add_argument("--preload", nargs="*", default=[])
    arguments = parser.parse_args()
    die_with_parent(arguments.parent_pid)
    become_subreaper()
    reaper = Reaper()  # while this process is small
    module_name, function_name = arguments.entry.split(":")
    for name in arguments.preload:
        importlib.import_module(name)
    entry = getattr(importlib.import_module(module_name), function_name)
    server = Forkserver(arguments.socket, entry, Fences(arguments.fences), reaper)
    gc.collect()
    gc.freeze()  # the image is shared with the children; the collector must not touch its pages
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    server.serve()


if __name__ == "__main__":
    main()
