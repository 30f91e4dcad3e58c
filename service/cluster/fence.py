"""What training processes hold on a machine, as locked files: a forkserver finds what its predecessors left there."""

import fcntl
import json
import os
import uuid
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

# In the node-local directory, beside what belongs to one node alone.
FENCES = "fences"


@dataclass(frozen=True, kw_only=True)
class Holding:
    """What a process holds alone.

    Attributes:
        job_id: whose process it is.
        attempt: its fencing token.
        devices: names such as ``gpu:0``.
    """

    job_id: str
    attempt: int
    devices: tuple[str, ...]

    def excludes(self, other: "Holding") -> bool:
        """Return whether one of the two may run only after the other: attempts of a job, or holders of a device."""
        if (self.job_id, self.attempt) == (other.job_id, other.attempt):
            return False
        return self.job_id == other.job_id or bool(set(self.devices) & set(other.devices))


@dataclass(frozen=True, kw_only=True)
class Fence:
    """A holding that is in force until every copy of its descriptor is closed, in whatever process.

    Attributes:
        name: of its file.
        fd: the descriptor; the process and what it forks inherit it.
    """

    name: str
    fd: int


class Fences:
    """Those of one machine.

    Args:
        directory: on a local disk, shared by all forkservers of the machine; made where it is missing.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, mode=0o700, exist_ok=True)

    def put_up(self, holding: Holding) -> Fence:
        """Put a fence around a holding. It is locked before anybody else can see it.

        Raises:
            OSError: it cannot be written, such as on a full disk; then there is none.
        """
        name = uuid.uuid4().hex
        hidden = self._directory / f".{name}"
        fd = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.write(fd, json.dumps([holding.job_id, holding.attempt, holding.devices]).encode())
            hidden.rename(self._directory / name)
        except OSError:
            os.close(fd)
            hidden.unlink(missing_ok=True)
            raise
        return Fence(name=name, fd=fd)

    def in_force(self, *, but: Set[str]) -> list[Holding]:
        """Return what is held, and clear away the files of what is not.

        Args:
            but: names of fences that are not asked about.
        """
        found = []
        for path in self._directory.iterdir():
            if path.name.startswith(".") or path.name in but:
                continue
            try:
                with path.open("rb") as file:
                    try:
                        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    except BlockingIOError:
                        job_id, attempt, devices = json.loads(file.read())
                        found.append(Holding(job_id=job_id, attempt=attempt, devices=tuple(devices)))
                    else:
                        path.unlink()
            except FileNotFoundError:
                continue  # another forkserver has cleared it away
        return found
