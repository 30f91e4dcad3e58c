"""``UploadStore`` on every implementation. A failure means an upload that is listed twice, or under another's hash."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from service.domain.uploads import NewUpload, UploadKind
from tests.contract.store_databases import KINDS
from tests.contract.store_fixtures import _database_url
from tests.fake_uploads import FakeUploadStore

A, B, C = ("a" * 64, "b" * 64, "c" * 64)


@pytest.fixture(params=[*KINDS, "fake"])
def uploads(request, tmp_path):
    if request.param == "fake":
        yield FakeUploadStore()
        return
    from service.store import SqlStore

    store = SqlStore(_database_url(request.param, request, tmp_path))
    yield store
    store.close()


def new(sha256, kind=UploadKind.BUNDLE, **changes):
    fields = {"name": f"{sha256}.zip", "size_bytes": 3 << 30, "entries": 2, "owner": "token"}
    return NewUpload(kind=kind, sha256=sha256, **{**fields, **changes})


def test_an_upload_is_listed_once_as_it_was_first(uploads):
    first, created = uploads.add_upload(new(A))
    assert created
    assert (first.sha256, first.name, first.size_bytes, first.entries) == (A, f"{A}.zip", 3 << 30, 2)
    assert first.created_at.tzinfo is not None
    again, created = uploads.add_upload(new(A, name="other", entries=None))
    assert (again, created) == (first, False)
    assert uploads.find_upload(UploadKind.BUNDLE, A) == first


def test_kinds_do_not_meet(uploads):
    uploads.add_upload(new(A))
    assert uploads.find_upload(UploadKind.DATASET, A) is None
    data, created = uploads.add_upload(new(A, UploadKind.DATASET, name="x.npz", entries=None))
    assert created
    assert uploads.find_upload(UploadKind.DATASET, A) == data
    assert uploads.find_upload(UploadKind.BUNDLE, B) is None


def test_the_latest_are_listed_first(uploads):
    for sha256 in (A, B, C):
        stored, _ = uploads.add_upload(new(sha256))
        while datetime.now(UTC) - stored.created_at < timedelta(milliseconds=2):
            pass  # the clock of a database may tell no less than a millisecond
    uploads.add_upload(new(A, UploadKind.DATASET))
    assert [one.sha256 for one in uploads.list_uploads(UploadKind.BUNDLE, limit=2)] == [C, B]
    assert [one.sha256 for one in uploads.list_uploads(UploadKind.DATASET, limit=500)] == [A]
    assert uploads.list_uploads(UploadKind.BUNDLE, limit=0) == ()


def test_of_many_at_once_one_lists_it(uploads):
    barrier = threading.Barrier(6)

    def add(number):
        barrier.wait()
        return uploads.add_upload(new(A, name=str(number)))

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(add, range(6)))
    assert sum(created for _, created in found) == 1
    assert len({upload for upload, _ in found}) == 1
