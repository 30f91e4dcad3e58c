"""A wall clock that jumps under one process, and under SQLite in it; its monotonic clock goes on."""

from collections.abc import Iterable
from pathlib import Path

import libfaketime

HOUR_S = 3600


class JumpingClock:
    """The wall clock of the processes that are started with its environment.

    Args:
        file: holds by how much it is off.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.jump(0)
        library = Path(libfaketime.__file__).parent / "vendor/libfaketime/src/libfaketime.so.1"
        self.environment = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def clean_up(self, pids: Iterable[int]) -> None:
        """Remove what the library leaves of processes that were killed."""
        for pid in pids:
            for name in (f"faketime_shm_{pid}", f"sem.faketime_sem_{pid}"):
                (Path("/dev/shm") / name).unlink(missing_ok=True)

    def jump(self, offset_s: int) -> None:
        """Put the clock forward, or back, from what it would be."""
        partial = self._file.with_suffix(".partial")
        partial.write_text(f"{offset_s:+d}")
        partial.replace(self._file)
