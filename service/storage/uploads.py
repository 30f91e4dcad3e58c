"""Bundles and files of data in run storage, and their way to a node.

A bundle is ``bundles/SHA256.zip``, a file of data ``datasets/SHA256/NAME``.
"""

import hashlib
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from service.domain.errors import InvalidUpload, NotFound, StorageError, UserCodeRefused, storage_error
from service.domain.uploads import NewUpload, Upload, UploadKind
from service.storage.archive import ArchiveLimits, check_archive, check_directory, refusal, unpack_archive
from service.storage.node_cache import Claim, NodeCache
from service.storage.object_store import ObjectStore

# Of an archive of data: a loader reads it where it is, so what it unpacks to is not limited here.
DATASET_LIMITS = ArchiveLimits(entries=500_000, unpacked_bytes=1 << 60)
DATASET_SUFFIXES = (".npz", ".parquet", ".tar", ".zip")

_PARQUET = b"PAR1"
_TAR = b"ustar"
_TAR_MARK_AT = 257


class StoredUploads:
    """Implements ``service.domain.uploads.UploadFiles``.

    Args:
        store: run storage.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def examine(self, kind: UploadKind, name: str, file: BinaryIO) -> int | None:
        """Check a file before it is kept; return how many files an archive holds. Raises ``InvalidUpload``."""
        return examine_upload(kind, name, file)

    def keep(self, upload: NewUpload, file: BinaryIO) -> None:
        """Make a file's bytes durable; one that is there may be damaged, and is replaced. Raises ``StorageError``."""
        path = _path(upload.kind, upload.sha256, upload.name)
        try:
            self._store.upload(Path(f"/proc/self/fd/{file.fileno()}"), path)
        except OSError as error:
            raise storage_error(f"Run storage did not take {path}: {error}.", error) from error

    def path(self, upload: Upload) -> str:
        """Return where an upload's bytes lie, relative to the root of run storage."""
        return _path(upload.kind, upload.sha256, upload.name)


def examine_upload(kind: UploadKind, name: str, file: BinaryIO) -> int | None:
    """Check a file before it is kept, as ``UploadFiles.examine`` says."""
    if kind is UploadKind.BUNDLE:
        return len(check_archive(file))
    return _examine_data(name, file)


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """Something brought that is on this node.

    Attributes:
        path: a bundle's directory, or a file of data; not to be changed.
        claim: holds it in the node's cache, if it is there.
    """

    path: Path
    claim: Claim | None = None

    def close(self) -> None:
        """Say that it is no longer used."""
        if self.claim is not None:
            self.claim.close()


def fetch_bundle(store: ObjectStore, sha256: str, cache: NodeCache) -> Fetched:
    """Return a directory with the files of a bundle, verified; ranks of a node share it.

    Args:
        store: run storage.
        sha256: of the bundle.
        cache: of this node.

    Raises:
        UserCodeRefused: there is no such bundle, or it cannot be unpacked.
        StorageError: run storage holds another file under this name.
        OSError: it could not be fetched or unpacked this time.
    """

    def make(content: Path) -> None:
        with _downloaded(store, bundle_path(sha256), sha256, content.parent / "bundle.zip") as file:
            try:
                unpack_archive(file, content)
            except InvalidUpload as error:
                raise UserCodeRefused(f"The bundle {sha256} cannot be unpacked: {error}") from None
        (content.parent / "bundle.zip").unlink()

    try:
        claim = cache.claim("bundles", sha256, make)
    except NotFound:
        raise UserCodeRefused(
            f"There is no bundle {sha256} in run storage. Upload it again: `syncbn bundle DIRECTORY`."
        ) from None
    return Fetched(path=claim.path, claim=claim)


def fetch_dataset(store: ObjectStore, sha256: str, cache: NodeCache) -> Fetched:
    """Return a local file of data, verified; in place, where run storage is a local directory.

    Args:
        store: run storage.
        sha256: of the file.
        cache: of this node.

    Raises:
        UserCodeRefused: there is no such file.
        StorageError: run storage holds another file under this name.
        OSError: it could not be fetched this time.
    """
    directory = dataset_dir(sha256)
    name = next((name for name in store.names(directory) if not name.startswith(".")), None)
    if name is None:
        raise UserCodeRefused(
            f"There is no file of data {sha256} in run storage. Upload it again: `syncbn dataset FILE`."
        )
    if store.is_local:
        path = store.local_path(f"{directory}/{name}")
        with path.open("rb") as file:
            _verify(file, sha256, f"{directory}/{name}")
        return Fetched(path=path)

    def make(content: Path) -> None:
        with _downloaded(store, f"{directory}/{name}", sha256, content / name):
            (content / name).chmod(0o444)

    claim = cache.claim("datasets", sha256, make)
    return Fetched(path=claim.path / name, claim=claim)


def bundle_path(sha256: str) -> str:
    """Return where a bundle lies, relative to the root of run storage."""
    return f"bundles/{sha256}.zip"


def dataset_dir(sha256: str) -> str:
    """Return the directory that holds one file of data, likewise."""
    return f"datasets/{sha256}"


def _path(kind: UploadKind, sha256: str, name: str) -> str:
    return bundle_path(sha256) if kind is UploadKind.BUNDLE else f"{dataset_dir(sha256)}/{name}"


def _downloaded(store: ObjectStore, path: str, sha256: str, target: Path) -> BufferedReader:
    store.download(path, target)
    file = target.open("rb")
    try:
        _verify(file, sha256, path)
    except BaseException:
        file.close()
        raise
    return file


def _verify(file: BufferedReader, sha256: str, path: str) -> None:
    found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise StorageError(
            f"{path} in run storage is damaged: its SHA-256 is {found}. Upload the same file again, which repairs it: "
            "`syncbn bundle --again DIRECTORY` or `syncbn dataset --again FILE`."
        )


def _examine_data(name: str, file: BinaryIO) -> int | None:
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in (".npz", ".zip"):
        members = check_directory(file, DATASET_LIMITS)
        other = next((member for member in members if suffix == ".npz" and not member.endswith(".npy")), None)
        if other is not None:
            raise refusal(f"{name} holds {other}, where a .npz file holds arrays (.npy). Make it with numpy.savez.")
        return len(members)
    if suffix == ".parquet":
        file.seek(0)
        start = file.read(len(_PARQUET))
        size_bytes = file.seek(0, 2)
        file.seek(max(0, size_bytes - len(_PARQUET)))
        if size_bytes < 2 * len(_PARQUET) or (start, file.read()) != (_PARQUET, _PARQUET):
            raise refusal(f"{name} is no Parquet file, or not a whole one. Write it anew.")
        return None
    if suffix == ".tar":
        file.seek(_TAR_MARK_AT)
        if file.read(len(_TAR)) != _TAR:
            raise refusal(f"{name} is no tar file that is not compressed. Pack it with `tar cf`, without -z or -j.")
        return None
    raise refusal(f"{name} is of no kind that is accepted. Send one of: {', '.join(DATASET_SUFFIXES)}.")
