"""Bytes under paths below one root: a local directory or an object store, through fsspec."""

import os
import shutil
import uuid
from pathlib import Path, PurePosixPath

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from service.domain.errors import NotFound, StorageError

IDENTITY = "storage-id"


class ObjectStore:
    """Files below a root.

    Writes are durable when they return. On a local file system that means an fsync of the file and of its directory.

    Args:
        url: a path or an fsspec URL, such as ``s3://bucket/prefix``.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._fs, root = url_to_fs(url)
        self._root = root.rstrip("/")
        self.is_local = isinstance(self._fs, LocalFileSystem)

    def create_exclusively(self, path: str, data: bytes) -> bool:
        """Create a file; False if it is there already."""
        if self.is_local:
            target = self.local_path(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with target.open("xb") as file:
                    file.write(data)
                    os.fsync(file.fileno())
            except FileExistsError:
                return False
            _sync_directory(target.parent)
            return True
        try:
            with self._fs.open(self._full(path), "xb") as file:
                file.write(data)
        except FileExistsError:
            return False
        return True

    def write(self, path: str, data: bytes) -> None:
        """Write a whole file; a reader sees all of it or what was there before."""
        if not self.is_local:
            self._fs.pipe_file(self._full(path), data)
            return
        target = self.local_path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.partial")
        with temporary.open("wb") as file:
            file.write(data)
            os.fsync(file.fileno())
        temporary.replace(target)
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
            self._fs.put_file(str(source), self._full(path))
            return
        target = self.local_path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.partial")
        with source.open("rb") as read, temporary.open("wb") as write:
            shutil.copyfileobj(read, write, 1 << 20)
            os.fsync(write.fileno())
        temporary.replace(target)
        _sync_directory(target.parent)

    def download(self, path: str, target: Path) -> None:
        """Copy a file from here to a local path."""
        try:
            self._fs.get_file(self._full(path), str(target))
        except FileNotFoundError:
            raise NotFound(f"Run storage has no file {path}.") from None

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return the bytes ``[start, stop)``, as far as they exist.

        Raises:
            NotFound: no such file.
        """
        if stop is not None and stop <= start:
            return b""
        try:
            with self._fs.open(self._full(path), "rb") as file:
                file.seek(start)
                data: bytes = file.read() if stop is None else file.read(stop - start)
        except FileNotFoundError:
            raise NotFound(f"Run storage has no file {path}.") from None
        return data

    def size(self, path: str) -> int:
        """Return a file's size in bytes.

        Raises:
            NotFound: no such file.
        """
        try:
            return int(self._fs.info(self._full(path))["size"])
        except FileNotFoundError:
            raise NotFound(f"Run storage has no file {path}.") from None

    def exists(self, path: str) -> bool:
        """Return whether there is a file or directory."""
        return bool(self._fs.exists(self._full(path)))

    def names(self, directory: str) -> list[str]:
        """Return the sorted names in a directory; empty if there is none."""
        # Object stores cache their listings; ours must see what another process wrote a moment ago.
        self._fs.invalidate_cache()
        try:
            entries = self._fs.ls(self._full(directory), detail=False)
        except FileNotFoundError:
            return []
        return sorted(PurePosixPath(entry).name for entry in entries)

    def remove(self, path: str) -> None:
        """Remove a file or a directory with all below it; nothing if it is not there."""
        try:
            self._fs.rm(self._full(path), recursive=True)
        except FileNotFoundError:
            return

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
            return self.read(IDENTITY).decode()
        except (OSError, NotFound) as error:
            raise StorageError(f"Run storage at {self.url} cannot be used: {error}") from error

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


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
