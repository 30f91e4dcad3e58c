"""Run storage on S3, over HTTP. A failure means stale listings, half uploads, or refusals that nobody understands."""

import os
import subprocess
import sys

import pytest

from service.domain.errors import NotFound, StorageError
from service.storage.object_store import ObjectStore
from tests.s3 import error_body


def _keys(s3_server, store):
    bucket, _, prefix = store.url.removeprefix("s3://").partition("/")
    listed = s3_server.client().list_objects_v2(Bucket=bucket, Prefix=prefix)
    return [entry["Key"].removeprefix(f"{prefix}/") for entry in listed.get("Contents", [])]


def test_what_another_client_did_is_seen_at_once(s3_server, s3_store):
    bucket, _, prefix = s3_store.url.removeprefix("s3://").partition("/")
    other = s3_server.client()
    s3_store.write("d/a", b"1")
    assert (s3_store.names("d"), s3_store.exists("d/b"), s3_store.size("d/a")) == (["a"], False, 1)
    other.put_object(Bucket=bucket, Key=f"{prefix}/d/b", Body=b"22")
    other.put_object(Bucket=bucket, Key=f"{prefix}/d/a", Body=b"333")
    assert (s3_store.names("d"), s3_store.exists("d/b"), s3_store.size("d/a")) == (["a", "b"], True, 3)
    other.delete_object(Bucket=bucket, Key=f"{prefix}/d/b")
    assert (s3_store.names("d"), s3_store.exists("d/b")) == (["a"], False)


def test_exclusive_creation_is_one_conditional_request(s3_server, s3_store):
    before = len(s3_server.requests)
    assert s3_store.create_exclusively("marker", b"1")
    assert [method for method, *_ in s3_server.requests[before:]] == ["PUT"], "looking first is a race"


def test_a_name_that_is_taken_is_told_by_the_code_alone(s3_server, s3_store):
    # Not every server that speaks S3 names the condition that failed, as Amazon's does.
    refusal = ("412 Precondition Failed", error_body("PreconditionFailed"))
    with s3_server.faults(lambda method, *_: refusal if method == "PUT" else None):
        assert not s3_store.create_exclusively("marker", b"1")


LARGE = 101 << 20  # more than two parts


def test_large_files_go_up_in_parts_and_appear_whole(s3_server, s3_store, tmp_path):
    content = os.urandom(1 << 20) * (LARGE >> 20)
    (tmp_path / "large").write_bytes(content)
    before = len(s3_server.requests)
    s3_store.upload(tmp_path / "large", "large")
    assert any("uploadId" in query for _, _, query in s3_server.requests[before:])
    s3_store.download("large", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    assert s3_store.read("large", LARGE - 5, LARGE + 5) == content[-5:]


def test_an_upload_in_parts_that_breaks_off_leaves_nothing(s3_server, s3_store, tmp_path):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(LARGE)
    refusal = ("403 Forbidden", error_body("AccessDenied"))
    with (
        s3_server.faults(lambda method, _, query: refusal if method == "PUT" and "partNumber=2" in query else None),
        pytest.raises(StorageError),
    ):
        s3_store.upload(tmp_path / "large", "large")
    assert _keys(s3_server, s3_store) == []
    assert not s3_server.client().list_multipart_uploads(Bucket=s3_server.bucket).get("Uploads"), "not aborted"
    assert not s3_store.exists("large")


ACTS = {
    "identify": lambda store, _: store.identify(),
    "create": lambda store, _: store.create_exclusively("f", b""),
    "write": lambda store, _: store.write("f", b""),
    "read": lambda store, _: store.read("f"),
    "range": lambda store, _: store.read("f", 1, 2),
    "size": lambda store, _: store.size("f"),
    "names": lambda store, _: store.names("f"),
    "remove": lambda store, _: store.remove("f"),
    "upload": lambda store, directory: store.upload(directory / "source", "f"),
    "download": lambda store, directory: store.download("f", directory / "copy"),
}


@pytest.mark.parametrize("act", ACTS)
def test_a_bucket_that_is_not_there_is_named(s3_server, tmp_path, act):
    (tmp_path / "source").write_bytes(b"1")
    with pytest.raises(StorageError, match=r"s3://none-such/runs does not exist.*Create the bucket"):
        ACTS[act](ObjectStore("s3://none-such/runs"), tmp_path)


@pytest.mark.parametrize("act", ACTS)
def test_denied_access_says_what_is_missing(s3_server, s3_store, tmp_path, act):
    (tmp_path / "source").write_bytes(b"1")
    refusal = ("403 Forbidden", error_body("AccessDenied"))
    with s3_server.faults(lambda *_: refusal), pytest.raises(StorageError, match="denies access") as caught:
        ACTS[act](s3_store, tmp_path)
    assert not isinstance(caught.value, NotFound)


@pytest.mark.parametrize(
    ("status", "code"), [("503 Slow Down", "SlowDown"), ("500 Internal Server Error", "InternalError")]
)
def test_what_passes_is_tried_again(s3_server, s3_store, status, code):
    s3_store.write("f", b"content")
    left = [2]

    def fail_twice(*_):
        left[0] -= 1
        return (status, error_body(code)) if left[0] >= 0 else None

    with s3_server.faults(fail_twice):
        assert s3_store.read("f") == b"content"
    assert left[0] < 0


def test_what_does_not_pass_is_no_verdict_on_the_file(s3_server, s3_store):
    with (
        s3_server.faults(lambda *_: ("500 Internal Server Error", error_body("InternalError"))),
        pytest.raises(OSError, match="Internal"),
    ):
        s3_store.read("f")


CLIENT = """
import sys
from service.domain.errors import StorageError
from service.storage.object_store import ObjectStore
try:
    ObjectStore("s3://runs/x").write("f", b"")
except (StorageError, OSError) as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"AWS_ACCESS_KEY_ID": None}, ("StorageError", "AWS_ACCESS_KEY_ID")),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, ("OSError", "does not answer")),  # where nobody listens
    ],
)
def test_without_credentials_or_server_it_says_so(s3_server, environment, expected):
    # Of their own: the library keeps a session for as long as a process lives.
    variables = os.environ | {"AWS_MAX_ATTEMPTS": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", CLIENT],
        env={name: value for name, value in variables.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=60,
    )
    kind, part = expected
    assert done.stdout.startswith(kind), done.stdout + done.stderr
    assert part in done.stdout


def test_the_library_is_imported_by_those_who_use_it():
    script = "import sys, service.storage.object_store as o; o.ObjectStore('/tmp'); o.ObjectStore('memory://x')\n"
    script += "print([name for name in ('s3fs', 'aiobotocore', 'botocore', 'aiohttp') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
