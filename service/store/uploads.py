"""Uploads: listed by their row, once their bytes are in run storage."""

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Row

from service.domain.uploads import NewUpload, Upload, UploadKind
from service.store.tables import uploads


def add_upload(connection: Connection, new: NewUpload, time: datetime) -> tuple[Upload, bool]:
    """List an upload, unless its bytes are listed already; return it, and whether this call listed it."""
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    created = connection.execute(
        insert(uploads).on_conflict_do_nothing().returning(uploads.c.sha256),
        {
            "kind": new.kind,
            "sha256": new.sha256,
            "name": new.name,
            "size_bytes": new.size_bytes,
            "entries": new.entries,
            "owner": new.owner,
            "created_at": time,
        },
    ).first()
    found = find_upload(connection, new.kind, new.sha256)
    assert found is not None
    return found, created is not None


def find_upload(connection: Connection, kind: UploadKind, sha256: str) -> Upload | None:
    """Return an upload; None if there is none."""
    query = sa.select(uploads).where(uploads.c.kind == kind, uploads.c.sha256 == sha256)
    row = connection.execute(query).one_or_none()
    return None if row is None else _upload_of(row)


def list_uploads(connection: Connection, kind: UploadKind, limit: int) -> tuple[Upload, ...]:
    """Return the latest uploads, newest first."""
    query = (
        sa.select(uploads)
        .where(uploads.c.kind == kind)
        .order_by(uploads.c.created_at.desc(), uploads.c.sha256)
        .limit(limit)
    )
    return tuple(_upload_of(row) for row in connection.execute(query))


def _upload_of(row: Row[Any]) -> Upload:
    return Upload(
        kind=row.kind,
        sha256=row.sha256,
        name=row.name,
        size_bytes=row.size_bytes,
        entries=row.entries,
        created_at=row.created_at,
    )
