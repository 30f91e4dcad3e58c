"""How much memory a training process and its helpers use, and whether the kernel had to end one of them.

What counts is the proportional set size (PSS) of the process and its descendants, but for files that they map: pages
that several processes share are shared out among them, and those of files can be dropped and read again. A limit on the
address space would count what is only reserved, of which CUDA and thread stacks take a lot, and one on the resident set
what ranks share, libraries above all.
"""

import re
import time
from pathlib import Path
from signal import SIGKILL

import psutil

LOOK_INTERVAL_S = 0.1
# Helpers come and go slowly; looking for them costs more than looking at them.
_FIND_INTERVAL_S = 1.0
# The kernel counts a process as it ends it; taking down its memory, and telling of its end, may take a while.
_KERNEL_WINDOW_S = 5.0
_KILLS = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


class MemoryWatch:
    """Watches one process; ``look`` now and then, and once it has ended; then ``explain``.

    Args:
        pid: of the process.
        limit_bytes: most that it and its descendants may use together; None: whatever there is.
    """

    def __init__(self, pid: int, limit_bytes: int | None) -> None:
        self._pid = pid
        self._limit_bytes = limit_bytes
        self._excess_bytes: int | None = None
        self._members: list[int] = [pid]
        self._found_at = time.monotonic()
        # PSS takes milliseconds to count. It is never above the resident set and hardly grows faster, so it need not be
        # counted before that has grown by what is left.
        self._precise_from_bytes = limit_bytes
        self._counter = _kernel_counter()
        self._num_kills = self._count_kills()
        self._killed_at: float | None = None
        self._looked_at = self._found_at

    def look(self) -> bool:
        """Return whether the process uses more than it may and has to be ended."""
        self._looked_at = time.monotonic()
        num_kills = self._count_kills()
        if num_kills > self._num_kills:
            self._num_kills, self._killed_at = num_kills, self._looked_at
        if self._limit_bytes is None or self._precise_from_bytes is None or self._excess_bytes is not None:
            return False
        if self._looked_at - self._found_at > _FIND_INTERVAL_S:
            self._members, self._found_at = [self._pid, *_descendants(self._pid)], self._looked_at
        resident_bytes = sum(map(_resident_bytes, self._members))
        if resident_bytes <= self._precise_from_bytes:
            return False
        used_bytes = sum(map(_proportional_bytes, self._members))
        if used_bytes <= self._limit_bytes:
            self._precise_from_bytes = resident_bytes + self._limit_bytes - used_bytes
            return False
        self._excess_bytes = used_bytes
        return True

    def explain(self, exit_status: int, error_type: str | None) -> str:
        """Say how the process is known to have run out of memory, as what a rank did; empty where it is not.

        Args:
            exit_status: its exit code; negative is the signal that ended it.
            error_type: class of the error that it reported, if it did.
        """
        if self._excess_bytes is not None:
            assert self._limit_bytes is not None
            return (
                f"used {_gib(self._excess_bytes)} of the {_gib(self._limit_bytes)} it may have "
                "(resources.memory_bytes_per_rank): lower batch.max_per_rank, use more workers, or raise it."
            )
        # A process that read samples for it may have been the one that was ended.
        is_victim = exit_status == -SIGKILL or error_type == "DatasetError"
        if is_victim and self._killed_at is not None and self._looked_at - self._killed_at < _KERNEL_WINDOW_S:
            return (
                "was ended by the kernel, which had no memory left on the machine or in the container: lower "
                "batch.max_per_rank, use more workers, or set resources.memory_bytes_per_rank to what a worker needs, "
                "so that no more of them share a machine than it holds."
            )
        return ""

    def _count_kills(self) -> int:
        if self._counter is None:
            return 0
        match = _KILLS.search(self._counter.read_text())
        return int(match[1]) if match else 0


def _kernel_counter() -> Path | None:
    """Return the file that counts what was ended for want of memory: of this control group, else of the machine."""
    candidates = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            candidates.append(Path(f"/sys/fs/cgroup/{path}/memory.events"))
        elif "memory" in controllers.split(","):
            candidates.append(Path(f"/sys/fs/cgroup/memory/{path}/memory.oom_control"))
    for candidate in (*candidates, Path("/proc/vmstat")):
        try:
            if _KILLS.search(candidate.read_text()):
                return candidate
        except OSError:
            continue
    return None


def _descendants(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:  # gone
        return []


def _resident_bytes(pid: int) -> int:
    return _sum_kib(f"/proc/{pid}/status", ("RssAnon", "RssShmem")) << 10


def _proportional_bytes(pid: int) -> int:
    return _sum_kib(f"/proc/{pid}/smaps_rollup", ("Pss_Anon", "Pss_Shmem")) << 10


def _sum_kib(path: str, names: tuple[str, str]) -> int:
    try:
        text = Path(path).read_text()
    except OSError:  # gone
        return 0
    return sum(int(size) for size in re.findall(rf"^(?:{'|'.join(names)}):\s+(\d+) kB$", text, re.MULTILINE))


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
