"""Packing and sending code and data. A failure means bytes that differ from one packing to the next, or that are sent
for nothing, or that arrive as something else."""

import hashlib
import io
import os
import shutil
import zipfile

import numpy as np
import pytest

from service.client.bundling import open_bundle, pack_directory
from service.client.errors import RequestRefused, UploadFailed
from service.domain.uploads import UploadKind
from service.storage.archive import check_archive
from tests.archives import HOSTILE, make_zip


@pytest.fixture
def code(tmp_path):
    directory = tmp_path / "code"
    for name, text in {
        "train.py": "x = 1\n",
        "pkg/__init__.py": "",
        "pkg/nät.py": "y = 2\n",
        "pkg/__pycache__/nät.cpython-311.pyc": "old",
        ".git/config": "secret",
        "data/big.bin": "zeros",
        "notes/draft.txt": "later",
        "pkg/draft.txt": "later",
    }.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    (directory / ".syncbnignore").write_text("# what jobs do not need\n\ndata/\n/notes/*\n")
    return directory


@pytest.fixture
def sent(service, monkeypatch):
    """The bodies of uploads that reach the service."""
    from tests.fake_uploads import FakeUploadFiles

    sizes = []
    real = FakeUploadFiles.examine

    def examine(self, kind, name, file):
        sizes.append(file.seek(0, 2))
        return real(self, kind, name, file)

    monkeypatch.setattr(FakeUploadFiles, "examine", examine)
    return sizes


def names(packed):
    return zipfile.ZipFile(io.BytesIO(packed)).namelist()


def test_what_is_ignored_is_left_out_and_the_rest_sorted(code):
    assert names(pack_directory(code)) == ["pkg/__init__.py", "pkg/draft.txt", "pkg/nät.py", "train.py"]
    (code / ".syncbnignore").write_text("draft.txt\n*.bin\n")
    assert names(pack_directory(code)) == ["pkg/__init__.py", "pkg/nät.py", "train.py"]


def test_the_same_files_give_the_same_bytes(code, tmp_path):
    packed = pack_directory(code)
    copy = tmp_path / "copy"
    shutil.copytree(code, copy)
    for path in sorted(copy.rglob("*"), reverse=True):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    shutil.rmtree(copy / ".git")
    assert pack_directory(copy) == packed
    (copy / "train.py").write_text("x = 2\n")
    assert pack_directory(copy) != packed


def test_what_is_packed_is_accepted(code):
    assert len(check_archive(io.BytesIO(pack_directory(code)))) == 4


def test_what_cannot_be_packed_is_named(code, tmp_path):
    (code / "link.py").symlink_to("train.py")
    with pytest.raises(UploadFailed, match=r"link\.py is a link.*syncbnignore"):
        pack_directory(code)
    (code / ".syncbnignore").write_text("link.py")
    pack_directory(code)
    os.close(os.open(os.fsencode(code) + b"/\xff.py", os.O_CREAT))
    with pytest.raises(UploadFailed, match="Rename it"):
        pack_directory(code)
    (code / ".syncbnignore").write_bytes(b"\xff\xfe")
    with pytest.raises(UploadFailed, match=r"\.syncbnignore is no UTF-8 text"):
        pack_directory(code)
    empty = tmp_path / "empty"
    (empty / ".git").mkdir(parents=True)
    with pytest.raises(UploadFailed, match="holds no file"):
        pack_directory(empty)
    with pytest.raises(FileNotFoundError):
        open_bundle(tmp_path / "none")


def test_a_bundle_is_sent_once(service, client, code, sent):
    pieces = []
    upload = client.upload_bundle(code, on_bytes=pieces.append)
    assert upload.sha256 == hashlib.sha256(pack_directory(code)).hexdigest()
    assert upload == service.uploads.find_upload(UploadKind.BUNDLE, upload.sha256)
    assert sum(pieces) == upload.size_bytes
    assert client.upload_bundle(code) == upload
    assert sent == [upload.size_bytes]


def test_a_zip_archive_is_sent_as_it_is(client, tmp_path):
    path = tmp_path / "code.zip"
    path.write_bytes(make_zip({"a.py": b""}))
    assert client.upload_bundle(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_of_data_is_sent_once(service, client, tmp_path, sent):
    path = tmp_path / "data.npz"
    np.savez(path, inputs=np.arange(400_000))
    upload = client.upload_dataset(path)
    assert (upload.name, upload.size_bytes) == ("data.npz", path.stat().st_size)
    assert service.files.files[f"datasets/{upload.sha256}/data.npz"] == path.read_bytes()
    assert client.upload_dataset(path, name="other.npz") == upload
    assert len(sent) == 1


def test_what_is_too_large_is_told_before_anything_is_sent(service, client, tmp_path, sent):
    path = tmp_path / "code.zip"
    path.write_bytes(os.urandom(service.limits["max_bundle_bytes"] + 1))
    with pytest.raises(UploadFailed, match=f"at most {service.limits['max_bundle_bytes']}. Nothing was sent"):
        client.upload_bundle(path)
    assert sent == []


def test_packing_ends_where_the_service_takes_no_more(service, client, code, sent, monkeypatch):
    from service.client import bundling

    monkeypatch.setattr(bundling, "BLOCK_BYTES", 1 << 16)
    limit = service.limits["max_bundle_bytes"]
    (code / "big.bin").write_bytes(os.urandom(limit + (1 << 17)))
    with pytest.raises(
        UploadFailed, match=rf"the {limit} bytes .*at most; big\.bin reaches the limit. Nothing was sent"
    ):
        client.upload_bundle(code)
    assert sent == []


def test_what_storage_has_lost_is_sent_again(service, client, code, sent):
    upload = client.upload_bundle(code)
    service.files.files.clear()
    assert client.upload_bundle(code) == upload
    assert list(service.files.files) == [f"bundles/{upload.sha256}.zip"]
    client.upload_bundle(code, again=True)
    assert len(sent) == 3


def test_a_refusal_names_the_entry(client, tmp_path):
    path = tmp_path / "code.zip"
    path.write_bytes(HOSTILE["parent"][0])
    with pytest.raises(RequestRefused) as caught:
        client.upload_bundle(path)
    assert [problem.field for problem in caught.value.problems] == ["../evil.py"]


def test_an_upload_survives_a_restart_of_the_service(service, client, code):
    import threading

    service.stop()
    timer = threading.Timer(0.3, service.start)
    timer.start()
    assert client.upload_bundle(code).entries == 4
    timer.join()


def test_what_changes_while_it_is_sent_is_told(service, client, tmp_path, monkeypatch):
    path = tmp_path / "code.zip"
    path.write_bytes(make_zip({"a.py": b"x = 1\n"}))
    other = make_zip({"a.py": b"x = 2\n"})
    assert len(other) == path.stat().st_size
    from tests.fake_uploads import FakeUploadStore

    real = FakeUploadStore.find_upload

    def find(self, kind, sha256):
        path.write_bytes(other)
        return real(self, kind, sha256)

    monkeypatch.setattr(FakeUploadStore, "find_upload", find)
    with pytest.raises(UploadFailed, match="changed while it was sent"):
        client.upload_bundle(path)
