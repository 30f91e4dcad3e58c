"""Bodies that are kept: received into a file without a name, checked, made durable, and then listed."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from types import MappingProxyType
from typing import Annotated, BinaryIO

import anyio.to_thread
from fastapi import Depends, Request
from fastapi import Path as PathParameter
from starlette.requests import ClientDisconnect

from service.api.idempotency import OWNER
from service.api.problems import BODY_INVALID, Refused
from service.domain.errors import FieldProblem, InvalidSpec, InvalidUpload, NotFound, ServiceError, storage_error
from service.domain.ports import RunFiles
from service.domain.spec import JobSpec
from service.domain.uploads import (
    MAX_BUNDLE_BYTES,
    MAX_DATASET_BYTES,
    NewUpload,
    Upload,
    UploadFiles,
    UploadKind,
    UploadStore,
    is_sha256,
    upload_references,
)

BLOCK_BYTES = 1 << 20
MAX_UPLOADS_PER_JOB = 1000
ROUTES: Mapping[UploadKind, str] = MappingProxyType(
    {UploadKind.BUNDLE: "/v1/bundles", UploadKind.DATASET: "/v1/datasets"}
)
_COMMANDS = {UploadKind.BUNDLE: "syncbn bundle DIRECTORY", UploadKind.DATASET: "syncbn dataset FILE"}


@dataclass(frozen=True, kw_only=True)
class Uploads:
    """Where uploads go.

    Attributes:
        rows: the list of them.
        files: their bytes.
        directory: local directory in which a body is kept until it is whole and checked.
        max_bundle_bytes: most bytes of a bundle.
        max_dataset_bytes: most bytes of a file of data.
    """

    rows: UploadStore
    files: UploadFiles
    directory: Path
    max_bundle_bytes: int = MAX_BUNDLE_BYTES
    max_dataset_bytes: int = MAX_DATASET_BYTES

    def max_bytes(self, kind: UploadKind) -> int:
        """Return the most bytes of one."""
        return self.max_bundle_bytes if kind is UploadKind.BUNDLE else self.max_dataset_bytes


async def receive_upload(request: Request, uploads: Uploads, kind: UploadKind, name: str | None) -> tuple[Upload, bool]:
    """Keep the body of a request.

    Args:
        request: whose body it is; its size is limited by ``service.api.limits``.
        uploads: where it goes.
        kind: what it is.
        name: of a file of data; a bundle is named by its hash.

    Returns:
        The upload, and whether it is a new one.

    Raises:
        Refused: the body broke off.
        InvalidUpload: it is not accepted.
        DiskFull: there is no room for it.
        StorageError: it cannot be kept for another reason.
    """
    try:
        file = await anyio.to_thread.run_sync(_open_nameless, uploads.directory)
    except OSError as error:
        raise _cannot_be_kept(error) from error
    with file:
        digest = hashlib.sha256()

        def write(block: bytes) -> None:
            digest.update(block)
            file.write(block)

        try:
            block = bytearray()
            async for chunk in request.stream():
                block += chunk
                if len(block) >= BLOCK_BYTES:
                    await anyio.to_thread.run_sync(write, bytes(block))
                    block.clear()
            await anyio.to_thread.run_sync(write, bytes(block))
        except ClientDisconnect:
            raise Refused(BODY_INVALID, "The body broke off. Send it again.") from None
        except OSError as error:
            raise _cannot_be_kept(error) from error
        return await anyio.to_thread.run_sync(_keep, uploads, kind, name, file, digest.hexdigest())


async def upload_hash_of(
    sha256: Annotated[str, PathParameter(description="of the file, in 64 hexadecimal digits")],
) -> str:
    """Return the hash in a path, if it can be one. Raises ``NotFound``."""
    if not is_sha256(sha256):
        raise NotFound(f"{sha256!r} is no SHA-256 in 64 lower-case hexadecimal digits, so nothing is named by it.")
    return sha256


UploadHash = Annotated[str, Depends(upload_hash_of)]


def found_upload(uploads: Uploads, files: RunFiles, kind: UploadKind, sha256: str) -> Upload:
    """Return an upload that is listed and in run storage.

    Args:
        uploads: the list of them.
        files: run storage.
        kind: what it is.
        sha256: of its bytes.

    Raises:
        NotFound: there is none, or its file is missing or has another size: sending it again puts it right.
    """
    upload = uploads.rows.find_upload(kind, sha256)
    if upload is None:
        raise NotFound(f"There is no {kind} {sha256}. Upload it: `{_COMMANDS[kind]}`.")
    try:
        is_whole = files.size(uploads.files.path(upload)) == upload.size_bytes
    except NotFound:
        is_whole = False
    if not is_whole:
        raise NotFound(
            f"Run storage has lost the {kind} {sha256}, or a part of it. Upload it again: `{_COMMANDS[kind]}`."
        )
    return upload


def check_uploads(spec: JobSpec, rows: UploadStore) -> None:
    """Check that what a job names was uploaded.

    Args:
        spec: the job.
        rows: what was.

    Raises:
        InvalidSpec: names the fields that name something else.
    """
    # Each once, by the first field that names it.
    named = {} if spec.code.bundle is None else {(UploadKind.BUNDLE, spec.code.bundle): "code.bundle"}
    for reference in upload_references(spec):
        named.setdefault((UploadKind.DATASET, reference.sha256), reference.field)
        if len(named) > MAX_UPLOADS_PER_JOB:
            message = f"is one more than the {MAX_UPLOADS_PER_JOB} uploads that a job may name. Pack files together."
            raise InvalidSpec(
                "The job names too many uploads.", (FieldProblem(field=reference.field, message=message),)
            )
    problems = []
    for (kind, sha256), field in named.items():
        if not is_sha256(sha256):
            message = "is no upload. Write upload: and the 64 hexadecimal digits that `syncbn dataset FILE` printed."
            problems.append(FieldProblem(field=field, message=message))
        elif rows.find_upload(kind, sha256) is None:
            what = "bundle" if kind is UploadKind.BUNDLE else "uploaded file"
            message = f"there is no {what} {sha256}. Upload it first: `{_COMMANDS[kind]}`."
            problems.append(FieldProblem(field=field, message=message))
    if problems:
        raise InvalidSpec("The job names what was not uploaded.", tuple(problems))


def _keep(uploads: Uploads, kind: UploadKind, name: str | None, file: BinaryIO, sha256: str) -> tuple[Upload, bool]:
    file.flush()
    size_bytes = file.seek(0, 2)
    if size_bytes == 0:
        raise InvalidUpload("The body is empty. Send the bytes of the file as the body.")
    entries = uploads.files.examine(kind, name or f"{sha256}.zip", file)
    # The same bytes have one name: where they were listed before, they stay under that one.
    listed = uploads.rows.find_upload(kind, sha256)
    new = NewUpload(
        kind=kind,
        sha256=sha256,
        name=listed.name if listed is not None else name or f"{sha256}.zip",
        size_bytes=size_bytes,
        entries=entries,
        owner=OWNER,
    )
    uploads.files.keep(new, file)
    return uploads.rows.add_upload(new)


def _open_nameless(directory: Path) -> BinaryIO:
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    return TemporaryFile(dir=directory)  # gone with this process, however that ends


def _cannot_be_kept(error: OSError) -> ServiceError:
    return storage_error(f"The service cannot keep the body: {error}.", error)
