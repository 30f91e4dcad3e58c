"""What people bring to their jobs: bundles of code and files of data, named by the SHA-256 of their bytes."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, BinaryIO, Protocol

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from service.domain.spec import JobSpec

MAX_BUNDLE_BYTES = 64 << 20
MAX_DATASET_BYTES = 2 << 30
# What a node keeps of what was brought, and how long it may take to fetch and install it.
NODE_CACHE_BYTES = 20 << 30
PREPARE_TIMEOUT_S = 600.0
UPLOAD_PREFIX = "upload:"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_DATA_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


class UploadKind(StrEnum):
    """What an upload is for."""

    BUNDLE = "bundle"
    DATASET = "dataset"


class Upload(BaseModel):
    """A file that is kept; immutable.

    Attributes:
        sha256: of its bytes; what jobs name it by.
        name: of a file of data, as it was first uploaded; of a bundle, ``SHA256.zip``.
        entries: files in an archive; None where it is none.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    kind: UploadKind
    sha256: Annotated[str, Field(pattern=_SHA256.pattern)]
    name: str
    size_bytes: int
    entries: int | None
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class NewUpload:
    """A file whose bytes are in run storage.

    Attributes:
        owner: who brought it.
    """

    kind: UploadKind
    sha256: str
    name: str
    size_bytes: int
    entries: int | None
    owner: str


class UploadStore(Protocol):
    """What the API needs to know of uploads. Every method may raise ``Unavailable``."""

    def add_upload(self, new: NewUpload) -> tuple[Upload, bool]:
        """List an upload; its bytes are durable already.

        Returns:
            The upload, as it was first listed, and whether this call did so.
        """
        ...

    def find_upload(self, kind: UploadKind, sha256: str) -> Upload | None:
        """Return an upload; None if there is none."""
        ...

    def list_uploads(self, kind: UploadKind, *, limit: int) -> tuple[Upload, ...]:
        """Return the latest uploads, newest first."""
        ...


class UploadFiles(Protocol):
    """The bytes of uploads."""

    def examine(self, kind: UploadKind, name: str, file: BinaryIO) -> int | None:
        """Check a file before it is kept.

        Returns:
            How many files an archive holds; None where the file is none.

        Raises:
            InvalidUpload: it is not what its kind and name say, or could do harm; names the entry and the remedy.
        """
        ...

    def keep(self, upload: NewUpload, file: BinaryIO) -> None:
        """Make a file's bytes durable; nothing where they are there. Raises ``StorageError``."""
        ...

    def path(self, upload: Upload) -> str:
        """Return where its bytes lie, relative to the root of run storage."""
        ...


@dataclass(frozen=True, kw_only=True)
class UploadReference:
    """A field of a job that names a file of data.

    Attributes:
        field: its dotted path, such as ``dataset.args.path``.
        sha256: what follows ``upload:`` there; as it was written, so perhaps no SHA-256 at all.
    """

    field: str
    sha256: str


def upload_references(spec: "JobSpec") -> tuple[UploadReference, ...]:
    """Return the fields of a job that name files of data, in the order in which they are written."""
    return tuple(_references("dataset.args", spec.dataset.args))


def brings_something(spec: "JobSpec") -> bool:
    """Say whether a job names uploads, so that nodes have to fetch them before it starts."""
    return spec.code.bundle is not None or bool(upload_references(spec))


def is_sha256(text: str) -> bool:
    """Say whether a text is a SHA-256, as this service writes it."""
    return _SHA256.fullmatch(text) is not None


def is_data_file_name(name: str) -> bool:
    """Say whether a file of data may have this name."""
    return _DATA_FILE_NAME.fullmatch(name) is not None


def _references(field: str, value: object) -> Iterator[UploadReference]:
    if isinstance(value, str):
        if value.startswith(UPLOAD_PREFIX):
            yield UploadReference(field=field, sha256=value.removeprefix(UPLOAD_PREFIX))
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _references(f"{field}.{key}", inner)
    elif isinstance(value, Sequence):
        for place, inner in enumerate(value):
            yield from _references(f"{field}.{place}", inner)
