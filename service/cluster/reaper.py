"""Ends the process groups of a forkserver that died: what their leaders started is tied to nobody else."""

import os
import signal
import socket
import struct
import time
from collections import deque
from contextlib import suppress

from service.linux import group_runs, kill_group, set_process_name

_MESSAGE = struct.Struct("?i")
_RECHECK_S = 0.05


class Reaper:
    """A small process beside a forkserver that outlives it by the time it takes to end what it left.

    It holds the groups' fences meanwhile, so that nothing else is started in their place.
    """

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        self._forgotten: deque[int] = deque()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _run(theirs)
            finally:
                os._exit(1)
        theirs.close()

    def watch(self, pgid: int, fence_fd: int) -> None:
        """Take on a group.

        Raises:
            OSError: the reaper is gone, or does not listen.
        """
        self._send_forgotten()  # its number may be this one's
        socket.send_fds(self._socket, [_MESSAGE.pack(True, pgid)], [fence_fd])

    def forget(self, pgid: int) -> None:
        """Let go of a group that has ended; a reaper that is gone has nothing to let go of."""
        self._forgotten.append(pgid)
        with suppress(OSError):  # what does not listen now is told later
            self._send_forgotten()

    def _send_forgotten(self) -> None:
        while self._forgotten:
            self._socket.send(_MESSAGE.pack(False, self._forgotten[0]))
            self._forgotten.popleft()

    def close(self) -> None:
        """Have it end; what it watches ends too."""
        self._socket.close()


def _run(forkserver: socket.socket) -> None:
    os.setsid()
    set_process_name("syncbn-reaper")
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):
        os.dup2(null, number)
    # Its own copies of the forkserver's descriptors would keep alive what is to end with the forkserver.
    os.dup2(forkserver.fileno(), 3)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    forkserver.detach()
    fences: dict[int, int] = {}
    with socket.socket(fileno=3) as orders:
        while True:
            message, descriptors, _, _ = socket.recv_fds(orders, _MESSAGE.size, 1)
            if not message:
                break
            begins, pgid = _MESSAGE.unpack(message)
            if begins:
                fences[pgid] = descriptors[0]
            elif pgid in fences:
                os.close(fences.pop(pgid))
    while fences:
        for pgid in list(fences):
            kill_group(pgid)
            if not group_runs(pgid):
                os.close(fences.pop(pgid))
        time.sleep(_RECHECK_S)
    os._exit(0)
