"""A node's copies of what its jobs share, such as unpacked bundles: bounded, and checked at each use.

An entry is a directory ``KIND/KEY`` with ``content/`` and ``record.json``, the SHA-256 of every file of it. It is made
under another name and renamed when it is whole; the directories of its content are read-only from then on. Who uses one
holds a shared lock of ``KEY.lock``, and who removes one an exclusive one; the kernel lets go of a lock when its process
ends, so processes and threads may share a cache. One that was damaged while somebody uses it stays, and another is made
beside it as ``KEY~2``, ``KEY~3``, ...: whoever runs code from it may still read more of it.
"""

import fcntl
import hashlib
import logging
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
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
        claim = _claim_whole(directory, key)
        if claim is None:
            making_path = directory / f"{key}.making"
            making = _take(making_path, fcntl.LOCK_EX)
            try:
                claim = _claim_whole(directory, key) or self._make(directory, key, make)
            finally:
                making_path.unlink()  # who waits for it takes a new one
                os.close(making)
        return claim

    def _make(self, directory: Path, key: str, make: Callable[[Path], None]) -> Claim:
        """Make an entry; the caller holds the lock of making, and found none that is whole."""
        for left in directory.glob(f".{key}.*"):  # by one that was killed
            remove_tree(left)
        for damaged in _copies(directory, key):
            logger.warning("%s was damaged, and is made anew", damaged)
            _remove_if_idle(damaged)
        partial = _aside(directory / key)
        (partial / CONTENT).mkdir(parents=True)
        try:
            make(partial / CONTENT)
            record = _describe(partial / CONTENT)
            (partial / RECORD).write_text(record.model_dump_json())
            _set_mode_of_directories(partial / CONTENT, 0o555)
            self._make_room(record.size_bytes)
            entry = next(entry for entry in _names(directory, key) if not entry.exists())
            lock = _take(_lock_of(entry), fcntl.LOCK_SH)
            try:
                partial.rename(entry)
            except BaseException:
                os.close(lock)
                raise
        finally:
            remove_tree(partial)
        return Claim(entry / CONTENT, lock)

    def _make_room(self, size_bytes: int) -> None:
        """Remove what was used least recently, until a new entry fits."""
        turn = _take(self._root / "room.lock", fcntl.LOCK_EX)
        try:
            others = [
                (_last_use_ns(path), path, _recorded_bytes(path))
                for path in self._root.glob("*/*")
                if path.is_dir() and not path.name.startswith(".")
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


def remove_tree(directory: Path) -> None:
    """Remove a directory with all below it, also where its directories are read-only; what cannot be removed stays."""
    _set_mode_of_directories(directory, 0o700)
    shutil.rmtree(directory, ignore_errors=True)


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


def _names(directory: Path, key: str) -> Iterator[Path]:
    """Yield where entries of a key may lie, for ever."""
    yield directory / key
    for number in count(2):
        yield directory / f"{key}~{number}"


def _copies(directory: Path, key: str) -> list[Path]:
    """Return the entries of a key, damaged ones as well."""
    return [path for path in (directory / key, *sorted(directory.glob(f"{key}~*"))) if path.is_dir()]


def _claim_whole(directory: Path, key: str) -> Claim | None:
    """Return an entry of a key that is whole, in use from now on; None if there is none."""
    for entry in _copies(directory, key):
        lock = _take(_lock_of(entry), fcntl.LOCK_SH)
        try:
            if _is_whole(entry):
                os.utime(entry)  # the time of its last use
                return Claim(entry / CONTENT, lock)
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
    return None


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
    try:
        lock = _take(_lock_of(entry), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    try:
        aside = _aside(entry)
        with suppress(FileNotFoundError):  # another was quicker
            entry.rename(aside)  # gone from its place at once
            remove_tree(aside)
        _lock_of(entry).unlink()
    finally:
        os.close(lock)
    return True


def _lock_of(entry: Path) -> Path:
    return entry.with_name(f"{entry.name}.lock")


def _set_mode_of_directories(top: Path, mode: int) -> None:
    """Change the mode of a directory and of those below it, as far as they are there and links lead to none."""
    for directory, _, _ in os.walk(top):
        with suppress(OSError):
            Path(directory).chmod(mode)


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
