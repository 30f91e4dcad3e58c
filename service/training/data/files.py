"""Files that a job names: on the node's disk, at a URL or uploaded."""

import fcntl
import hashlib
import lzma
import os
import posixpath
import shutil
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import fsspec

from service.domain.uploads import UPLOAD_PREFIX
from service.training.data.context import DataContext
from service.training.errors import BadSample, DatasetError

DAMAGED_ARCHIVE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError)
"""What reading a member of a zip archive raises where its bytes are not what they were."""


def local_file(path: str, context: DataContext, *, field: str) -> Path:
    """Return where a file lies on this node; a remote one is copied there first, once per node.

    Args:
        path: on every node, a URL that fsspec knows, or ``upload:`` and a SHA-256.
        context: of the rank.
        field: of the job that has it.

    Raises:
        DatasetError: there is no such file, or it cannot be read.
    """
    if path.startswith(UPLOAD_PREFIX):
        return _uploaded(path, context, field)
    if not _is_url(path):
        if not Path(path).is_file():
            raise DatasetError(
                f"{field}: there is no file {path}. A path has to be the same on every node; or upload it."
            )
        return Path(path)
    with _reading(path, field):
        return _copy(path, context.cache_dir)


class FileTree(ABC):
    """Files below a directory, or in a zip archive.

    Attributes:
        names: of all files, relative to it, with forward slashes, sorted.
    """

    names: tuple[str, ...]

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Read one. Raises ``BadSample``."""


def open_tree(path: str, context: DataContext, *, field: str) -> FileTree:
    """Open a directory or a zip archive.

    Files of a remote directory are copied to the node when they are first read.

    Args:
        path: of either, see ``local_file``.
        context: of the rank.
        field: of the job that has it.

    Raises:
        DatasetError: there is neither, or it cannot be read.
    """
    if not path.startswith(UPLOAD_PREFIX):
        if _is_url(path):
            with _reading(path, field):
                filesystem, root = fsspec.core.url_to_fs(path)
                # Whether it is a directory, HTTP finds out by reading all of it.
                if not root.lower().endswith(".zip") and filesystem.isdir(root):
                    return _RemoteTree(path, context.cache_dir)
        elif Path(path).is_dir():
            return _DirectoryTree(Path(path))
    archive = local_file(path, context, field=field)
    try:
        return _ZipTree(archive)
    except (zipfile.BadZipFile, OSError) as error:
        raise DatasetError(f"{field}: {path} is neither a directory nor a zip archive: {error}") from None


class _DirectoryTree(FileTree):
    def __init__(self, root: Path) -> None:
        self._root = root
        self.names = tuple(
            sorted(
                (Path(directory) / name).relative_to(root).as_posix()
                for directory, _, names in os.walk(root, followlinks=True)
                for name in names
            )
        )

    def read(self, name: str) -> bytes:
        try:
            return (self._root / name).read_bytes()
        except OSError as error:
            raise BadSample(f"dataset: {self._root / name} cannot be read: {error.strerror or error}.") from None


class _RemoteTree(FileTree):
    def __init__(self, url: str, cache_dir: Path) -> None:
        self._url = url
        self._cache_dir = cache_dir
        filesystem, root = fsspec.core.url_to_fs(url)
        self.names = tuple(sorted(posixpath.relpath(name, root) for name in filesystem.find(root)))

    def read(self, name: str) -> bytes:
        url = f"{self._url.rstrip('/')}/{name}"
        try:
            return _copy(url, self._cache_dir).read_bytes()
        except Exception as error:
            # Each file system of fsspec has exceptions of its own.
            raise BadSample(f"dataset: {url} cannot be read: {type(error).__name__}: {error}.") from error


class _ZipTree(FileTree):
    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = Lock()
        self._archive: zipfile.ZipFile | None = None
        self._owner = 0
        with zipfile.ZipFile(path) as archive:
            self.names = tuple(sorted(member.filename for member in archive.infolist() if not member.is_dir()))

    def read(self, name: str) -> bytes:
        try:
            with self._lock:
                return self._open().read(name)
        except (*DAMAGED_ARCHIVE, RuntimeError) as error:  # RuntimeError: encrypted, or an unknown method
            raise BadSample(f"dataset: {name} of {self._path} cannot be read: {error}.") from None

    def _open(self) -> zipfile.ZipFile:
        # Forked processes would share the position in an open file.
        if self._archive is None or self._owner != os.getpid():
            self._archive, self._owner = zipfile.ZipFile(self._path), os.getpid()
        return self._archive

    def __getstate__(self) -> dict[str, object]:
        return {"path": self._path}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]


def _uploaded(path: str, context: DataContext, field: str) -> Path:
    found = context.uploads.get(path.removeprefix(UPLOAD_PREFIX))
    if found is None:
        raise DatasetError(f"{field}: nothing was uploaded as {path}. Upload the file again, or correct the hash.")
    return found


def _is_url(path: str) -> bool:
    return "://" in path or "::" in path


@contextmanager
def _reading(path: str, field: str) -> Iterator[None]:
    try:
        yield
    except DatasetError:
        raise
    except FileNotFoundError:
        raise DatasetError(f"{field}: there is nothing at {path}; correct the URL.") from None
    except ImportError as error:
        raise DatasetError(f"{field}: no file system for {path.partition('://')[0]}:// on this node: {error}") from None
    except Exception as error:
        # Each file system of fsspec has exceptions of its own.
        raise DatasetError(f"{field}: {path} cannot be read: {type(error).__name__}: {error}") from error


def _copy(url: str, cache_dir: Path) -> Path:
    """Return a copy of a remote file, made unless this version of it is there already."""
    # fsspec keeps file systems by process, and makes new ones after a fork.
    filesystem, path = fsspec.core.url_to_fs(url)
    version = f"{url} {filesystem.ukey(path)}"
    name = hashlib.sha256(version.encode()).hexdigest()
    copy = cache_dir / f"{name}{posixpath.splitext(path)[1]}"
    prepare_cache(cache_dir)
    if copy.exists():
        return copy
    with exclusive(cache_dir / f"{name}.lock"):
        if not copy.exists():
            partial = copy.with_name(f"{name}.partial")
            with filesystem.open(path, "rb") as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target, 2**20)
            partial.replace(copy)
    return copy


def prepare_cache(cache_dir: Path) -> None:
    """Make a cache's directory. Raises ``DatasetError`` where it is another user's, who could change what is in it."""
    cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    if cache_dir.stat().st_uid not in (0, os.getuid()):
        raise DatasetError(f"dataset: {cache_dir}, for copies of remote files, belongs to another user. Remove it.")


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Keep the node's other processes out; the lock of a process that is killed goes with it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
