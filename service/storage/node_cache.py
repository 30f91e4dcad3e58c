"""A node's copies of what its jobs share, such as unpacked bundles: bounded, and checked at each use.

An entry is a directory ``KIND/KEY`` with ``content/`` and ``record.json``, the SHA-256 of every file of it. It is made
under another name and renamed when it is whole. Who uses one holds a shared lock of ``KEY.lock``, and who removes one
an exclusive one; the kernel lets go of a lock when its process ends, so processes and threads may share a cache.
"""

import fcntl
import hashlib
import logging
import os
import shutil
import stat
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

RECORD = "record.json"
CONTENT = "content"

logger = logging.getLogger(__name__)


class Claim:
    """An entry that is in use: it is neither changed nor removed until this is closed, or its process ends.

    Args:
        path: directory with the content.
        lock: descriptor of the shared lock.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let it go."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


class NodeCache:
    """The cache below one directory; processes and threads may share it.

    Args:
        root: its directory; made when first used.
        max_bytes: the least recently used entries go when there is more; those in use stay, so that there may be more
            for a while.
    """

    def __init__(self, root: Path, *, max_bytes: int) -> None:
        self._root = root
        self._max_bytes = max_bytes

    def claim(self, kind: str, key: str, make: Callable[[Path], None]) -> Claim:
        """Return an entry, made if there is none, or if the one that is there is not what it was.

        Of several that want the same at once, one makes it and the others wait.

        Args:
            kind: a plain name.
            key: likewise; what is under it never changes.
            make: fills an empty directory; what it raises is passed on, and nothing is kept.
        """
        directory = self._root / kind
        directory.mkdir(parents=True, exist_ok=True)
        entry = directory / key
        lock = _take(directory / f"{key}.lock", fcntl.LOCK_SH)
        try:
            if not _is_whole(entry):
                making = _take(directory / f"{key}.making", fcntl.LOCK_EX)
                try:
                    if not _is_whole(entry):
                        self._make(entry, make)
                finally:
                    os.close(making)
            os.utime(entry)  # the time of its last use
        except BaseException:
            os.close(lock)
            raise
        return Claim(entry / CONTENT, lock)

    def _make(self, entry: Path, make: Callable[[Path], None]) -> None:
        for left in entry.parent.glob(f".{entry.name}.*"):  # by one that was killed: this one holds the lock of making
            shutil.rmtree(left, ignore_errors=True)
        partial = _aside(entry)
        (partial / CONTENT).mkdir(parents=True)
        try:
            make(partial / CONTENT)
            record = _describe(partial / CONTENT)
            (partial / RECORD).write_text(record.model_dump_json())
            self._make_room(entry, record.size_bytes)
            if entry.exists():
                logger.warning("%s was damaged, and is made anew", entry)
                _discard(entry)
            partial.rename(entry)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _make_room(self, wanted: Path, size_bytes: int) -> None:
        """Remove what was used least recently, until an entry fits."""
        turn = _take(self._root / "room.lock", fcntl.LOCK_EX)
        try:
            others = [
                (_last_use_ns(path), path, _recorded_bytes(path))
                for path in self._root.glob("*/*")
                if path != wanted and path.is_dir() and not path.name.startswith(".")
            ]
            total = size_bytes + sum(size for _, _, size in others)
            for _, path, size in sorted(others):
                if total <= self._max_bytes:
                    break
                if _remove_if_idle(path):
                    total -= size
            if total > self._max_bytes:
                logger.warning("%s holds %d bytes, all in use; its limit is %d", self._root, total, self._max_bytes)
        finally:
            os.close(turn)


class _File(BaseModel):
    """What a file has to be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size_bytes: int
    sha256: str


class _Record(BaseModel):
    """What an entry has to be: its files by their paths."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    files: dict[str, _File]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files.values())


def _is_whole(entry: Path) -> bool:
    """Say whether an entry is there and every byte of it is what was recorded, and nothing else is in it."""
    try:
        record = _Record.model_validate_json((entry / RECORD).read_bytes())
        return _describe(entry / CONTENT) == record
    except (OSError, ValidationError):
        return False


def _describe(content: Path) -> _Record:
    files = {}
    for directory, _, names in os.walk(content):
        for name in names:
            path = Path(directory, name)
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(descriptor, "rb") as file:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise OSError(f"{path} is no regular file.")
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                files[str(path.relative_to(content))] = _File(size_bytes=file.tell(), sha256=digest)
    return _Record(files=files)


def _last_use_ns(entry: Path) -> int:
    try:
        return entry.stat().st_mtime_ns
    except FileNotFoundError:  # damaged, and just being replaced
        return 0


def _recorded_bytes(entry: Path) -> int:
    try:
        return _Record.model_validate_json((entry / RECORD).read_bytes()).size_bytes
    except (OSError, ValidationError):
        return 0  # damaged, and replaced at its next use


def _remove_if_idle(entry: Path) -> bool:
    lock_path = entry.with_name(f"{entry.name}.lock")
    try:
        lock = _take(lock_path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    try:
        _discard(entry)
        entry.with_name(f"{entry.name}.making").unlink(missing_ok=True)  # nobody makes what nobody holds
        lock_path.unlink()
    finally:
        os.close(lock)
    return True


def _discard(entry: Path) -> None:
    """Remove an entry; it is gone from its place at once."""
    aside = _aside(entry)
    entry.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(entry: Path) -> Path:
    return entry.with_name(f".{entry.name}.{uuid.uuid4().hex}")


def _take(path: Path, operation: int) -> int:
    """Return a descriptor that holds a lock of a file, made if there is none.

    Raises:
        BlockingIOError: another holds it, where ``operation`` does not wait.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, operation)
            is_current = _is_at(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        if is_current:
            return descriptor
        os.close(descriptor)  # it was removed with its entry while this waited


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
