"""Files of data."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from service.api.files import FILE_RESPONSES, WantedPart, file_response
from service.api.parts import AppParts
from service.api.problems import REQUEST_INVALID, Refused
from service.api.schemas import DatasetList, DatasetQuery, UploadListQuery
from service.api.uploads import ROUTES, UploadHash, found_upload, receive_upload
from service.domain.errors import FieldProblem
from service.domain.uploads import Upload, UploadKind, is_data_file_name

router = APIRouter(prefix="/datasets", tags=["uploads"])

FILE_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post(
    "",
    status_code=201,
    openapi_extra=FILE_BODY,
    responses={
        200: {"model": Upload, "description": "these very bytes are there already"},
        201: {"headers": {"Location": {"description": "path of the file's entry", "schema": {"type": "string"}}}},
    },
)
async def upload_dataset(
    request: Request, query: Annotated[DatasetQuery, Query()], parts: AppParts, response: Response
) -> Upload:
    """Keep a file of data: ``.npz``, ``.zip``, ``.parquet`` or ``.tar``, by its name.

    Once this is answered, jobs may name it as ``upload:`` and its hash.
    """
    if not is_data_file_name(query.name):
        message = "must be 1 to 200 letters, digits, '.', '_' and '-', the first a letter or digit."
        problem = FieldProblem(field="name", message=message)
        raise Refused(REQUEST_INVALID, "The file cannot be kept under this name.", [problem])
    upload, created = await receive_upload(request, parts.uploads, UploadKind.DATASET, name=query.name)
    response.headers["Location"] = f"{ROUTES[UploadKind.DATASET]}/{upload.sha256}"
    response.status_code = 201 if created else 200
    return upload


@router.get("")
def list_datasets(query: Annotated[UploadListQuery, Query()], parts: AppParts) -> DatasetList:
    """List the latest files of data, newest first, and say how large one may be."""
    return DatasetList(
        datasets=parts.uploads.rows.list_uploads(UploadKind.DATASET, limit=query.limit),
        max_bytes=parts.uploads.max_dataset_bytes,
    )


@router.get("/{sha256}")
def get_dataset(sha256: UploadHash, parts: AppParts) -> Upload:
    """Return what is known of a file of data."""
    return found_upload(parts.uploads, parts.files, UploadKind.DATASET, sha256)


@router.get("/{sha256}/content", response_class=Response, responses=FILE_RESPONSES)
def get_dataset_content(sha256: UploadHash, parts: AppParts, wanted: WantedPart) -> Response:
    """Send a file of data, or a range of it."""
    upload = found_upload(parts.uploads, parts.files, UploadKind.DATASET, sha256)
    path = parts.uploads.files.path(upload)
    return file_response(parts.files, path, size_bytes=upload.size_bytes, sha256=sha256, wanted=wanted)
