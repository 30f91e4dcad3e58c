"""A disk that is full soon: a file system of its own where this process may mount one, else a limit on its files."""

import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def small_disk(directory: Path, room_bytes: int) -> Iterator[Path]:
    """Make a directory that takes so many bytes, or files of so many each."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={room_bytes}", "tmpfs", str(directory)]
    if subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0:
        try:
            yield directory
        finally:
            subprocess.run(["umount", str(directory)], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, before[1]))
    try:
        yield directory
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
