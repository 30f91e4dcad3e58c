"""Files of checkpoints: ranges, entity tags and names."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.ranges import Unsatisfiable, parse_range
from tests.fakes import sha256

WEIGHTS = random.Random(0).randbytes(3 * 2**20 + 7)  # more than two chunks


@pytest.fixture
def job(service):
    job = service.submit()
    service.scheduler.start(job.id)
    service.scheduler.checkpoint(job.id, 5, {"model.safetensors": WEIGHTS, "empty": b""}, eval_accuracy=0.9)
    return job


@pytest.fixture
def url(job):
    return f"/v1/jobs/{job.id}/checkpoints/5/files/model.safetensors"


def test_list(api, job):
    (checkpoint,) = api.get(f"/v1/jobs/{job.id}/checkpoints").json()["checkpoints"]
    assert checkpoint["step"] == 5
    assert checkpoint["metrics"] == {"eval/accuracy": 0.9}
    assert checkpoint["files"][0] == {
        "name": "model.safetensors",
        "size_bytes": len(WEIGHTS),
        "sha256": sha256(WEIGHTS),
    }


def test_the_whole_file(api, url):
    answer = api.get(url)
    assert answer.status_code == 200
    assert answer.content == WEIGHTS
    assert answer.headers["ETag"] == f'"{sha256(WEIGHTS)}"'
    assert answer.headers["Content-Length"] == str(len(WEIGHTS))
    assert answer.headers["Accept-Ranges"] == "bytes"
    assert answer.headers["Content-Type"] == "application/octet-stream"


@pytest.mark.parametrize(
    ("header", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=100-199", 100, 200),
        ("bytes=-10", len(WEIGHTS) - 10, len(WEIGHTS)),
        (f"bytes={len(WEIGHTS) - 1}-", len(WEIGHTS) - 1, len(WEIGHTS)),
        ("bytes=1-99999999999", 1, len(WEIGHTS)),
        (f"bytes=-{len(WEIGHTS) * 2}", 0, len(WEIGHTS)),
        ("Bytes=1048570-2097160", 1048570, 2097161),
    ],
)
def test_a_range(api, url, header, start, stop):
    answer = api.get(url, headers={"Range": header})
    assert answer.status_code == 206
    assert answer.content == WEIGHTS[start:stop]
    assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(WEIGHTS)}"
    assert answer.headers["Content-Length"] == str(stop - start)


@pytest.mark.parametrize("header", [f"bytes={len(WEIGHTS)}-", "bytes=-0", "bytes=9999999999999999999-"])
def test_a_range_outside_the_file(api, url, header):
    answer = api.get(url, headers={"Range": header})
    assert answer.status_code == 416
    assert answer.headers["Content-Range"] == f"bytes */{len(WEIGHTS)}"
    assert answer.headers["Content-Type"] == "application/problem+json"


@pytest.mark.parametrize("header", ["bytes=5-1", "bytes=0-1,3-4", "lines=1-2", "bytes=-", "bytes=a-b", "bytes=", "x"])
def test_what_is_no_range_is_ignored(api, url, header):
    assert api.get(url, headers={"Range": header}).status_code == 200


def test_conditions(api, url):
    etag = f'"{sha256(WEIGHTS)}"'
    for header in (etag, f'"x", {etag}', f"W/{etag}", "*"):
        answer = api.get(url, headers={"If-None-Match": header})
        assert (answer.status_code, answer.content, answer.headers["ETag"]) == (304, b"", etag)
    assert api.get(url, headers={"If-None-Match": '"x"'}).status_code == 200
    assert api.get(url, headers={"Range": "bytes=0-1", "If-Range": etag}).status_code == 206
    assert api.get(url, headers={"Range": "bytes=0-1", "If-Range": '"x"'}).status_code == 200


def test_empty_files_and_the_manifest(api, job):
    folder = f"/v1/jobs/{job.id}/checkpoints/5/files"
    empty = api.get(f"{folder}/empty")
    assert (empty.status_code, empty.content, empty.headers["Content-Length"]) == (200, b"", "0")
    assert api.get(f"{folder}/empty", headers={"Range": "bytes=0-"}).status_code == 416
    manifest = api.get(f"{folder}/manifest.json")
    assert manifest.json() == {"format": 1}
    assert manifest.headers["ETag"] == f'"{sha256(manifest.content)}"'
    assert manifest.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    "name", ["other", "..%2f4%2fmodel.safetensors", "%2e%2e", "model.safetensors%00", "%ff", "a%2fb"]
)
def test_only_names_that_the_checkpoint_lists(service, api, job, name):
    service.files.files["secret"] = b"x"
    answer = api.get(f"/v1/jobs/{job.id}/checkpoints/5/files/{name}")
    assert answer.status_code == 404
    assert answer.headers["Content-Type"] == "application/problem+json"


def test_other_steps(api, job):
    for step, status in (("4", 404), ("-1", 422), ("x", 422), ("9" * 5000, 422)):
        assert api.get(f"/v1/jobs/{job.id}/checkpoints/{step}/files/model.safetensors").status_code == status


def test_a_file_that_differs_from_its_row_is_not_sent(service, api, url, job):
    path = service.store.checkpoints(job.id)[0].path
    service.files.files[f"{path}/model.safetensors"] = WEIGHTS[:-1]
    answer = api.get(url)
    assert (answer.status_code, answer.json()["type"]) == (500, "urn:syncbn:problem:corrupt-checkpoint")


@given(start=st.integers(0, 50), last=st.integers(0, 50), size=st.integers(0, 40))
def test_ranges_are_what_slicing_says(start, last, size):
    content = bytes(range(size))
    wanted = {
        f"bytes={start}-{last}": content[start : last + 1] if start <= last else None,
        f"bytes={start}-": content[start:],
        f"bytes=-{last}": content[max(0, size - last) :],
    }
    for header, expected in wanted.items():
        try:
            part = parse_range(header, size)
        except Unsatisfiable:
            assert expected == b""
        else:
            assert (None if part is None else content[part.start : part.stop]) == expected
            assert part is None or len(part) > 0
