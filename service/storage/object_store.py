"""Bytes under paths below one root: a local directory or an object store, through fsspec."""

import errno
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path, PurePosixPath

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from service.domain.errors import NotFound, StorageError
from service.storage.refusals import is_beyond_the_end, refusals_of

IDENTITY = "storage-id"
_NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.ENOSYS})
# Where fsspec's ``mode="create"`` is one conditional request, which one of two racing writers wins.
_CONDITIONAL = frozenset({"abfs", "abfss", "az", "gcs", "gs", "s3", "s3a"})
_FOR_TESTS = frozenset({"memory"})  # of one process
_EXTRAS = {"s3": "s3", "s3a": "s3"}
# A large file goes up in parts of 50 MiB, so many of them at once, and all of those in memory.
_OPTIONS: dict[str, dict[str, int]] = {"s3": {"max_concurrency": 4}, "s3a": {"max_concurrency": 4}}


class ObjectStore:
    """Files below a root.

    Writes are durable when they return. On a local file system that means an fsync of the file and of its directory.
    An object store's credentials come from the environment of the process.

    Args:
        url: a path or an fsspec URL, such as ``s3://bucket/prefix``.

    Raises:
        StorageError: a URL of a kind that is not supported, or whose library is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        protocol = url.partition("://")[0] if "://" in url else "file"
        if protocol not in _CONDITIONAL | _FOR_TESTS | {"file", "local"}:
            kinds = ", ".join(f"{name}://" for name in sorted(_CONDITIONAL))
            raise StorageError(
                f"Run storage cannot be {protocol}://: nothing keeps two processes from creating the same file there. "
                f"Use a directory that all nodes mount, or one of {kinds}"
            )
        try:
            # A cached listing would hide what another process wrote a moment ago.
            self._fs, root = url_to_fs(url, use_listings_cache=False, **_OPTIONS.get(protocol, {}))
        except ImportError as error:
            extra = _EXTRAS.get(protocol)
            remedy = f"pip install 'syncbn[{extra}]'" if extra else str(error)
            raise StorageError(f"Run storage {url} needs a library that is not installed here: {remedy}") from error
        self._root = root.rstrip("/")
        self.is_local = isinstance(self._fs, LocalFileSystem)

    def create_exclusively(self, path: str, data: bytes) -> bool:
        """Create a file; False if it is there already.

        Of writers that race for it, one creates it: by a hard link locally, by a conditional request on an object store
        (``If-None-Match: *``). A reader sees the whole content or no file. On an object store, False may also say that
        an earlier try of this very call got through while its answer was lost; nobody else has created it then.
        """
        if self.is_local:
            return self._create_local(self.local_path(path), data)
        try:
            with refusals_of(self.url, path):
                self._fs.pipe_file(self._full(path), data, mode="create")
        except FileExistsError:
            return False
        return True

    def _create_local(self, target: Path, data: bytes) -> bool:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
        try:
            with temporary.open("xb", buffering=0) as file:
                _write_all(file.fileno(), data)
                os.fsync(file.fileno())
            os.link(temporary, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in _NO_HARD_LINKS:
                raise StorageError(
                    f"Run storage at {self.url} lies on a file system without hard links ({error}). Use another one, "
                    "or the URL of an object store."
                ) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)
        _sync_directory(target.parent)
        return True

    def write(self, path: str, data: bytes) -> None:
        """Write a whole file; a reader sees all of it or what was there before."""
        if not self.is_local:
            with refusals_of(self.url, path):
                self._fs.pipe_file(self._full(path), data)
            return
        target = self.local_path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.partial")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                os.fsync(file.fileno())
            temporary.replace(target)
        except OSError:
            _give_back(temporary)
            raise
        _sync_directory(target.parent)

    def append(self, path: str, data: bytes) -> None:
        """Add to a local file. Object stores cannot: there each piece is a file of its own."""
        assert self.is_local
        target = self.local_path(path)
        is_new = not target.exists()
        if is_new:
            target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("ab", buffering=0) as file:
            size_before = file.tell()
            try:
                _write_all(file.fileno(), data)
                os.fsync(file.fileno())
                if is_new:
                    _sync_directory(target.parent)
            except OSError:
                file.truncate(size_before)  # a full disk took part of it; the next try begins where this one did
                raise

    def upload(self, source: Path, path: str) -> None:
        """Copy a local file here, whole or not at all."""
        if not self.is_local:
            with refusals_of(self.url, path):
                self._fs.put_file(str(source), self._full(path))
            return
        target = self.local_path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Two may upload the same file at once: what is named by its hash, say.
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
        try:
            with source.open("rb") as read, temporary.open("wb") as write:
                shutil.copyfileobj(read, write, 1 << 20)
                os.fsync(write.fileno())
            temporary.replace(target)
        except OSError:
            _give_back(temporary)
            raise
        _sync_directory(target.parent)

    def download(self, path: str, target: Path) -> None:
        """Copy a file from here to a local path.

        Raises:
            NotFound: no such file.
        """
        with refusals_of(self.url, path):
            self._fs.get_file(self._full(path), str(target))

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return the bytes ``[start, stop)``, as far as they exist.

        Raises:
            NotFound: no such file.
        """
        if stop is not None and stop <= start:
            return b""
        try:
            with refusals_of(self.url, path):
                data: bytes = self._fs.cat_file(self._full(path), start=start or None, end=stop)
        except OSError as error:
            if is_beyond_the_end(error):
                return b""
            raise
        return data

    def size(self, path: str) -> int:
        """Return a file's size in bytes.

        Raises:
            NotFound: no such file.
        """
        with refusals_of(self.url, path):
            return int(self._fs.info(self._full(path))["size"])

    def exists(self, path: str) -> bool:
        """Return whether there is a file or directory."""
        with refusals_of(self.url, path):
            return bool(self._fs.exists(self._full(path)))

    def names(self, directory: str) -> list[str]:
        """Return the sorted names in a directory; empty if there is none."""
        try:
            with refusals_of(self.url, directory):
                entries = self._fs.ls(self._full(directory), detail=False, refresh=True)
        except NotFound:
            return []
        return sorted(PurePosixPath(entry).name for entry in entries)

    def remove(self, path: str) -> None:
        """Remove a file or a directory with all below it; nothing if it is not there."""
        with suppress(NotFound), refusals_of(self.url, path):
            self._fs.rm(self._full(path), recursive=True)

    def remove_file(self, path: str) -> None:
        """Remove a file, in one request; nothing if it is not there."""
        with suppress(NotFound), refusals_of(self.url, path):
            self._fs.rm_file(self._full(path))

    def local_path(self, path: str) -> Path:
        """Return where a file lies on this machine; only for a local root."""
        assert self.is_local
        return Path(self._full(path))

    def identify(self) -> str:
        """Return what this storage calls itself; at first use it is given a name, which proves that it can be written.

        Raises:
            StorageError: it cannot be read or written; it says why.
        """
        try:
            if self.is_local:
                Path(self._root).mkdir(parents=True, exist_ok=True)
            self.create_exclusively(IDENTITY, uuid.uuid4().hex.encode())
            name = self.read(IDENTITY)
            if self.create_exclusively(IDENTITY, name):
                raise StorageError(
                    f"Run storage at {self.url} lets a file be created twice: it takes no notice of If-None-Match. An "
                    "attempt could be launched twice. Use storage that knows conditional writes."
                )
        except (OSError, NotFound) as error:
            raise StorageError(f"Run storage at {self.url} cannot be used: {error}") from error
        return name.decode()

    def check_identity(self, expected: str) -> None:
        """Prove that this is the storage that the scheduler uses too, and not a directory of the same name.

        Raises:
            StorageError: it is another, or cannot be read.
        """
        try:
            found = self.read(IDENTITY).decode()
        except (OSError, NotFound) as error:
            raise StorageError(f"This node does not see the service's run storage at {self.url}: {error}") from error
        if found != expected:
            raise StorageError(f"On this node {self.url} is not the service's run storage. Mount the same one.")

    def _full(self, path: str) -> str:
        parts = PurePosixPath(path).parts
        assert not path.startswith("/"), path
        assert ".." not in parts, path
        return f"{self._root}/{path}"


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _give_back(temporary: Path) -> None:
    """Remove what was written in vain: on a full disk others need the room."""
    with suppress(OSError):
        temporary.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
