"""What Linux has and Python does not: ties of processes to their owners, and holes in files."""

import ctypes
import os
import signal
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2


def die_with_parent(parent_pid: int, signal_number: int = signal.SIGKILL) -> None:
    """Have the kernel signal this process when its parent ends; it survives an exec.

    The kernel watches the parent's thread that started this process, so start children from a main thread.

    Args:
        parent_pid: who the parent was when this process was started; if it is gone by now, the process ends here.
        signal_number: what is sent.
    """
    _prctl(_PR_SET_PDEATHSIG, signal_number)
    if os.getppid() != parent_pid:
        os._exit(1)


def become_subreaper() -> None:
    """Adopt orphaned descendants, so that they can be waited for."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def set_process_name(name: str) -> None:
    """Name this process for ``ps``, ``top`` and ``pkill``; the kernel keeps 15 characters."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def group_is_alive(pgid: int) -> bool:
    """Return whether any process of a group is left."""
    try:
        os.killpg(pgid, 0)
    except ProcessLookupError:
        return False
    return True


def group_runs(pgid: int) -> bool:
    """Return whether any process of a group still runs; one that nobody reaps holds neither files nor devices."""
    if not group_is_alive(pgid):
        return False
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, group = _state_and_group(process / "stat")
            states = [state]
            if group == pgid and state == "Z":  # its other threads may live on
                states = [_state_and_group(thread / "stat")[0] for thread in (process / "task").iterdir()]
        except OSError:  # gone
            continue
        if group == pgid and any(state not in "ZX" for state in states):
            return True
    return False


def punch_hole(descriptor: int, offset: int, num_bytes: int) -> None:
    """Give back the room on disk of a part of a file, which then reads as zeros; its size stays.

    Args:
        descriptor: of a file that is open for writing.
        offset: of the part; its whole blocks are given back.
        num_bytes: how long it is.

    Raises:
        OSError: the file system cannot.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate64.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if libc.fallocate64(descriptor, _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE, offset, num_bytes) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def kill_group(pgid: int) -> None:
    """Kill all processes of a group; nothing if there are none."""
    with suppress(ProcessLookupError):
        os.killpg(pgid, signal.SIGKILL)


def process_state(pid: int) -> str | None:
    """Return the letter that the kernel shows for a process's state, such as ``T``; None if it has ended.

    See proc_pid_stat(5). A process whose main thread has ended waits to be reaped and counts as ended.
    """
    try:
        state, _ = _state_and_group(Path(f"/proc/{pid}/stat"))
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else state


def _state_and_group(stat: Path) -> tuple[str, int]:
    # The name, in parentheses, may hold anything.
    state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
    return state, int(group)


def _prctl(option: int, argument: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, argument, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
