"""Uploading over HTTP. A failure means that a file is kept that should not be, is lost, or is kept twice; or that a job
is accepted whose code or data nobody uploaded."""

import hashlib
import io
import socket
from pathlib import Path

import numpy as np
import pytest

from service.api.limits import MAX_BODY_BYTES, UPLOAD_DEADLINE_S
from service.api.uploads import MAX_UPLOADS_PER_JOB
from service.domain.uploads import MAX_BUNDLE_BYTES, MAX_DATASET_BYTES, UploadKind
from service.storage.archive import BUNDLE_LIMITS, MAX_NAME_BYTES, MAX_PART_BYTES, RATIO_MATTERS_FROM_BYTES
from service.storage.uploads import DATASET_SUFFIXES
from tests.archives import HOSTILE, make_zip
from tests.fakes import spec_data

BUNDLE = make_zip({"train.py": b"x = 1\n", "pkg/model.py": b"y = 2\n"})
SHA256 = hashlib.sha256(BUNDLE).hexdigest()
HEX = "0" * 64


def npz():
    buffer = io.BytesIO()
    np.savez(buffer, inputs=np.zeros((4, 2)), targets=np.zeros(4))
    return buffer.getvalue()


TAR = b"\0" * 257 + b"ustar" + b"\0" * 762
DATA = {"a.npz": (npz(), 2), "b.zip": (BUNDLE, 2), "c.parquet": (b"PAR1....PAR1", None), "d.tar": (TAR, None)}


def test_a_bundle_is_kept_once_under_its_hash(service, api):
    first = api.post("/v1/bundles", content=BUNDLE)
    assert first.status_code == 201
    assert first.headers["Location"] == f"/v1/bundles/{SHA256}"
    body = first.json()
    assert (body["sha256"], body["size_bytes"], body["entries"]) == (SHA256, len(BUNDLE), 2)
    again = api.post("/v1/bundles", content=BUNDLE)
    assert (again.status_code, again.json()) == (200, body)
    assert api.get(f"/v1/bundles/{SHA256}").json() == body
    assert service.files.files == {f"bundles/{SHA256}.zip": BUNDLE}


def test_a_bundle_that_was_damaged_in_storage_is_repaired_by_sending_it_again(service, api):
    api.post("/v1/bundles", content=BUNDLE)
    service.files.files[f"bundles/{SHA256}.zip"] = b"damaged"
    assert api.post("/v1/bundles", content=BUNDLE).status_code == 200
    assert service.files.files[f"bundles/{SHA256}.zip"] == BUNDLE


@pytest.mark.parametrize("content", [None, BUNDLE[:-1], b""])
def test_what_storage_has_lost_is_not_found_and_sending_it_again_brings_it_back(service, api, content):
    paths = {f"/v1/bundles/{SHA256}": f"bundles/{SHA256}.zip"}
    api.post("/v1/bundles", content=BUNDLE)
    sha256 = api.post("/v1/datasets", params={"name": "b.zip"}, content=BUNDLE).json()["sha256"]
    paths[f"/v1/datasets/{sha256}"] = f"datasets/{sha256}/b.zip"
    for path, file in paths.items():
        if content is None:
            del service.files.files[file]
        else:
            service.files.files[file] = content
        for answer in (api.get(path), api.get(f"{path}/content")):
            assert answer.status_code == 404
            assert "Upload it again: `syncbn" in answer.json()["detail"]
    assert api.post("/v1/bundles", content=BUNDLE).status_code == 200
    assert api.get(f"/v1/bundles/{SHA256}/content").content == BUNDLE


def test_a_bundle_is_sent_back_with_tag_and_ranges(api):
    api.post("/v1/bundles", content=BUNDLE)
    whole = api.get(f"/v1/bundles/{SHA256}/content")
    assert (whole.content, whole.headers["ETag"]) == (BUNDLE, f'"{SHA256}"')
    part = api.get(f"/v1/bundles/{SHA256}/content", headers={"Range": "bytes=3-9"})
    assert (part.status_code, part.content) == (206, BUNDLE[3:10])
    headers = {"If-None-Match": f'"{SHA256}"'}
    assert api.get(f"/v1/bundles/{SHA256}/content", headers=headers).status_code == 304
    headers = {"Range": f"bytes={len(BUNDLE)}-"}
    assert api.get(f"/v1/bundles/{SHA256}/content", headers=headers).status_code == 416


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_bundle_is_refused_with_the_entry_and_the_remedy(service, api, name):
    data, entry, part = HOSTILE[name]
    answer = api.post("/v1/bundles", content=data)
    assert answer.status_code == 422
    assert answer.headers["Content-Type"] == "application/problem+json"
    problem = answer.json()
    assert problem["type"] == "urn:syncbn:problem:invalid-upload"
    assert entry[:900] in [error["field"][:900] for error in problem["errors"]]  # long ones are cut short
    assert part in str(problem["errors"])
    assert not service.files.files
    assert not service.uploads.uploads


@pytest.mark.parametrize("body", [b"", b"PK", b'{"json": true}', BUNDLE[:-10]])
def test_what_is_no_bundle_is_refused(service, api, body):
    answer = api.post("/v1/bundles", content=body)
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:syncbn:problem:invalid-upload")
    assert not service.uploads.uploads


@pytest.mark.parametrize("name", DATA)
def test_a_file_of_data_is_kept_under_hash_and_name(service, api, name):
    content, entries = DATA[name]
    sha256 = hashlib.sha256(content).hexdigest()
    answer = api.post("/v1/datasets", params={"name": name}, content=content)
    assert answer.status_code == 201, answer.text
    assert (answer.json()["name"], answer.json()["entries"]) == (name, entries)
    assert service.files.files == {f"datasets/{sha256}/{name}": content}
    # The same bytes have one name.
    again = api.post("/v1/datasets", params={"name": f"other-{name}"}, content=content)
    assert (again.status_code, again.json()) == (200, answer.json())
    assert list(service.files.files) == [f"datasets/{sha256}/{name}"]
    assert api.get(f"/v1/datasets/{sha256}").json() == answer.json()
    assert api.get(f"/v1/datasets/{sha256}/content").content == content


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.csv", b"1,2", "of no kind that is accepted"),
        ("a.npz", b"PK\3\4", "damaged"),
        ("a.npz", BUNDLE, "where a .npz file holds arrays"),
        ("a.parquet", b"PAR1", "no Parquet file"),
        ("a.parquet", b"PAR1" + b"x" * 100, "no Parquet file"),
        ("a.tar", b"\x1f\x8b" + b"x" * 600, "no tar file"),
        ("a.zip", HOSTILE["parent"][0], "not accepted"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(service, api, name, content, part):
    answer = api.post("/v1/datasets", params={"name": name}, content=content)
    assert answer.status_code == 422
    assert part in answer.json()["detail"]
    assert not service.files.files


@pytest.mark.parametrize("name", ["", "../a.npz", "a/b.npz", ".npz", "a b.npz", "a\n.npz", "ä.npz", "x" * 201 + ".npz"])
def test_a_name_that_is_none_is_refused(api, name):
    answer = api.post("/v1/datasets", params={"name": name}, content=npz())
    assert answer.status_code == 422
    assert [error["field"] for error in answer.json()["errors"]] == ["name"]


def test_uploads_are_listed_with_the_limits(service, api):
    others = [make_zip({f"{n}.py": b""}) for n in range(3)]
    for content in others:
        api.post("/v1/bundles", content=content)
    listed = api.get("/v1/bundles", params={"limit": 2}).json()
    assert [one["sha256"] for one in listed["bundles"]] == [hashlib.sha256(one).hexdigest() for one in others[:0:-1]]
    assert listed["max_bytes"] == service.limits["max_bundle_bytes"]
    assert api.get("/v1/datasets").json() == {"datasets": [], "max_bytes": service.limits["max_dataset_bytes"]}


@pytest.mark.parametrize("sha256", [HEX, "x", "A" * 64, "..", "%2e%2e%2f"])
def test_what_was_not_uploaded_is_not_found(api, sha256):
    for path in (f"/v1/bundles/{sha256}", f"/v1/bundles/{sha256}/content", f"/v1/datasets/{sha256}"):
        assert api.get(path).status_code == 404


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("path", "limit"), [("/v1/bundles", 1 << 21), ("/v1/datasets?name=a.npz", 1 << 22)])
def test_uploads_may_be_larger_than_other_bodies_up_to_their_own_limit(service, api, path, limit, chunked):
    def chunks(size):
        return (b" " * 4096 for _ in range(size // 4096)) if chunked else b" " * size

    within = api.post(path, content=chunks(limit))
    assert limit > MAX_BODY_BYTES
    assert within.json()["type"] == "urn:syncbn:problem:invalid-upload"  # it was read to its end
    beyond = api.post(path, content=chunks(limit + 4096))
    assert (beyond.status_code, beyond.headers["Connection"]) == (413, "close")
    assert f"{limit} bytes" in beyond.json()["detail"]
    # Of other methods and routes nothing is lifted.
    assert api.request("GET", path, content=b" " * (MAX_BODY_BYTES + 1)).status_code == 413
    assert api.post("/v1/jobs", content=b" " * (MAX_BODY_BYTES + 1)).status_code == 413


def test_a_body_that_breaks_off_is_not_kept(service, api):
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])), timeout=5) as connection:
        connection.sendall(
            b"POST /v1/bundles HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "
            + service.token.encode()
            + b"\r\nContent-Length: %d\r\n\r\n" % len(BUNDLE)
            + BUNDLE[:-1]
        )
        connection.shutdown(socket.SHUT_WR)
        connection.recv(4096)
    assert not service.uploads.uploads
    assert not service.files.files
    assert api.get("/healthz").status_code == 200


def test_storage_that_refuses_is_a_problem_and_nothing_is_listed(service, api, monkeypatch):
    from service.domain.errors import StorageError
    from tests.fake_uploads import FakeUploadFiles

    def refuse(*_):
        raise StorageError("Run storage did not take it: no space.")

    monkeypatch.setattr(FakeUploadFiles, "keep", refuse)
    answer = api.post("/v1/bundles", content=BUNDLE)
    assert (answer.status_code, answer.json()["type"]) == (500, "urn:syncbn:problem:storage-error")
    assert not service.uploads.uploads


def test_a_directory_that_cannot_be_written_is_a_problem_with_a_remedy(service, api, monkeypatch):
    from service.api import uploads

    def refuse(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(uploads, "TemporaryFile", refuse)
    answer = api.post("/v1/bundles", content=BUNDLE)
    assert answer.status_code == 507
    assert answer.json()["type"] == "urn:syncbn:problem:disk-full"
    assert "No space left" in answer.json()["detail"]


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/jobs/plan"])
@pytest.mark.parametrize(
    ("changes", "field", "part"),
    [
        ({"code": {"bundle": HEX}}, "code.bundle", "syncbn bundle"),
        (
            {"dataset": {"factory": "builtin:npz", "args": {"path": f"upload:{HEX}"}}},
            "dataset.args.path",
            "syncbn dataset",
        ),
        ({"dataset": {"factory": "builtin:npz", "args": {"path": "upload:abc"}}}, "dataset.args.path", "is no upload"),
        (
            {"dataset": {"factory": "mine:data", "args": {"parts": [{"file": f"upload:{HEX}"}]}}},
            "dataset.args.parts.0.file",
            "syncbn dataset",
        ),
    ],
)
def test_a_job_that_names_what_was_not_uploaded_is_refused(service, api, path, changes, field, part):
    answer = api.post(path, json=spec_data(**changes))
    assert answer.status_code == 422, answer.text
    assert answer.json()["type"] == "urn:syncbn:problem:invalid-spec"
    (error,) = answer.json()["errors"]
    assert error["field"] == field
    assert part in error["message"]
    assert not service.store.list_jobs().jobs


def test_a_job_that_names_what_was_uploaded_is_accepted(service, api):
    api.post("/v1/bundles", content=BUNDLE)
    sha256 = api.post("/v1/datasets", params={"name": "a.npz"}, content=npz()).json()["sha256"]
    dataset = {"factory": "builtin:npz", "args": {"path": f"upload:{sha256}"}}
    answer = api.post("/v1/jobs", json=spec_data(code={"bundle": SHA256}, dataset=dataset))
    assert answer.status_code == 201, answer.text
    assert answer.json()["spec"]["code"] == {"bundle": SHA256, "requirements": False}
    # A bundle is no file of data.
    dataset["args"]["path"] = f"upload:{SHA256}"
    assert api.post("/v1/jobs", json=spec_data(dataset=dataset)).status_code == 422
    assert service.uploads.find_upload(UploadKind.DATASET, SHA256) is None


def test_each_upload_of_a_job_is_looked_up_once_and_their_number_is_limited(service, api, monkeypatch):
    from tests.fake_uploads import FakeUploadStore

    looked_up = []
    real = FakeUploadStore.find_upload
    monkeypatch.setattr(FakeUploadStore, "find_upload", lambda *args: looked_up.append(args[2]) or real(*args))

    def errors(hashes):
        dataset = {"factory": "mine:data", "args": {"files": [f"upload:{sha256}" for sha256 in hashes]}}
        answer = api.post("/v1/jobs/plan", json=spec_data(dataset=dataset))
        assert answer.status_code == 422
        return answer.json()["errors"]

    assert [error["field"] for error in errors([HEX] * 50 + ["1" * 64])] == [
        "dataset.args.files.0",
        "dataset.args.files.50",
    ]
    assert looked_up == [HEX, "1" * 64]
    looked_up.clear()
    (error,) = errors([f"{n:064x}" for n in range(MAX_UPLOADS_PER_JOB + 1)])
    assert error["field"] == f"dataset.args.files.{MAX_UPLOADS_PER_JOB}"
    assert not looked_up


def test_limits_are_documented():
    document = (Path(__file__).parents[3] / "docs" / "bringing.md").read_text()
    limits = BUNDLE_LIMITS
    for part in (
        f"At most {MAX_BUNDLE_BYTES >> 20} MiB",
        f"{limits.entries}\nentries, {limits.unpacked_bytes >> 20} MiB unpacked",
        f"more than {RATIO_MATTERS_FROM_BYTES >> 20} MiB that is compressed more than {limits.ratio} times",
        f"{MAX_PART_BYTES} bytes a part and {MAX_NAME_BYTES} in all",
        f"At most {MAX_DATASET_BYTES >> 30} GiB a file",
        f"at most {MAX_UPLOADS_PER_JOB} uploads",
        *(f"`{suffix}`" for suffix in DATASET_SUFFIXES),
    ):
        assert part in document, part
    assert f"took longer than {UPLOAD_DEADLINE_S:g} s" in (Path(__file__).parents[3] / "docs" / "api.md").read_text()
