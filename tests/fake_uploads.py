"""Uploads in memory; what is accepted is decided as in production."""

import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

from service.api.uploads import Uploads
from service.domain.journal import utc_now
from service.domain.uploads import NewUpload, Upload, UploadKind
from service.storage.uploads import bundle_path, dataset_dir, examine_upload


class FakeUploadStore:
    """``UploadStore`` in memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.uploads: dict[tuple[UploadKind, str], Upload] = {}

    def add_upload(self, new: NewUpload) -> tuple[Upload, bool]:
        with self._lock:
            key = (new.kind, new.sha256)
            if key in self.uploads:
                return self.uploads[key], False
            self.uploads[key] = Upload(
                kind=new.kind,
                sha256=new.sha256,
                name=new.name,
                size_bytes=new.size_bytes,
                entries=new.entries,
                created_at=utc_now(),
            )
            return self.uploads[key], True

    def find_upload(self, kind: UploadKind, sha256: str) -> Upload | None:
        return self.uploads.get((kind, sha256))

    def list_uploads(self, kind: UploadKind, *, limit: int) -> tuple[Upload, ...]:
        found = [upload for upload in self.uploads.values() if upload.kind is kind]
        return tuple(sorted(found, key=lambda upload: upload.created_at, reverse=True)[:limit])


class FakeUploadFiles:
    """``UploadFiles`` that puts bytes where a ``FakeRunFiles`` finds them."""

    def __init__(self, run_files) -> None:
        self._run_files = run_files

    def examine(self, kind, name, file) -> int | None:
        return examine_upload(kind, name, file)

    def keep(self, upload, file) -> None:
        file.seek(0)
        self._run_files.files[self.path(upload)] = file.read()

    def path(self, upload) -> str:
        if upload.kind is UploadKind.BUNDLE:
            return bundle_path(upload.sha256)
        return str(Path(dataset_dir(upload.sha256), upload.name))


def fake_uploads() -> Uploads:
    """What ``create_app`` takes, for whoever does not look at it."""
    files = FakeUploadFiles(SimpleNamespace(files={}))
    return Uploads(rows=FakeUploadStore(), files=files, directory=Path(tempfile.gettempdir()))
