"""Bundles of code."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from service.api.files import FILE_RESPONSES, WantedPart, file_response
from service.api.parts import AppParts
from service.api.schemas import BundleList, UploadListQuery
from service.api.uploads import ROUTES, UploadHash, found_upload, receive_upload
from service.domain.uploads import Upload, UploadKind

router = APIRouter(prefix="/bundles", tags=["uploads"])

ZIP_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post(
    "",
    status_code=201,
    openapi_extra=ZIP_BODY,
    responses={
        200: {"model": Upload, "description": "these very bytes are there already"},
        201: {"headers": {"Location": {"description": "path of the bundle", "schema": {"type": "string"}}}},
    },
)
async def upload_bundle(request: Request, parts: AppParts, response: Response) -> Upload:
    """Keep a zip archive of code. Once this is answered, jobs may name it by its hash."""
    upload, created = await receive_upload(request, parts.uploads, UploadKind.BUNDLE, name=None)
    response.headers["Location"] = f"{ROUTES[UploadKind.BUNDLE]}/{upload.sha256}"
    response.status_code = 201 if created else 200
    return upload


@router.get("")
def list_bundles(query: Annotated[UploadListQuery, Query()], parts: AppParts) -> BundleList:
    """List the latest bundles, newest first, and say how large one may be."""
    return BundleList(
        bundles=parts.uploads.rows.list_uploads(UploadKind.BUNDLE, limit=query.limit),
        max_bytes=parts.uploads.max_bundle_bytes,
    )


@router.get("/{sha256}")
def get_bundle(sha256: UploadHash, parts: AppParts) -> Upload:
    """Return what is known of a bundle."""
    return found_upload(parts.uploads, parts.files, UploadKind.BUNDLE, sha256)


@router.get("/{sha256}/content", response_class=Response, responses=FILE_RESPONSES)
def get_bundle_content(sha256: UploadHash, parts: AppParts, wanted: WantedPart) -> Response:
    """Send a bundle, or a range of it."""
    upload = found_upload(parts.uploads, parts.files, UploadKind.BUNDLE, sha256)
    return file_response(
        parts.files,
        parts.uploads.files.path(upload),
        size_bytes=upload.size_bytes,
        sha256=sha256,
        wanted=wanted,
        media_type="application/zip",
    )
