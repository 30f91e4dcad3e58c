"""The commands that bring code and data, against the API over a fake store."""

import hashlib
import json

import numpy as np
import pytest
import yaml

from service.client.bundling import pack_directory
from tests.archives import HOSTILE
from tests.fakes import spec_data


@pytest.fixture
def code(tmp_path):
    directory = tmp_path / "code"
    directory.mkdir()
    (directory / "model.py").write_text("x = 1\n")
    return directory


@pytest.fixture
def job_file(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(spec_data(model={"factory": "model:build"})))
    return path


def test_bundle_prints_the_hash(service, cli, code):
    result = cli("bundle", code)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == hashlib.sha256(pack_directory(code)).hexdigest()
    assert "code: {bundle: " in result.stderr
    assert json.loads(cli("bundle", code, "--format", "json").stdout)["entries"] == 1


def test_dataset_prints_the_hash(service, cli, tmp_path):
    np.savez(tmp_path / "data.npz", inputs=np.zeros(3))
    result = cli("dataset", tmp_path / "data.npz", "--name", "three.npz")
    assert result.exit_code == 0, result.stderr
    assert list(service.files.files) == [f"datasets/{result.stdout.strip()}/three.npz"]
    assert f"upload:{result.stdout.strip()}" in result.stderr


def test_submit_with_code_uploads_it_and_names_it(service, cli, code, job_file):
    result = cli("submit", "-f", job_file, "--code", code)
    assert result.exit_code == 0, result.stderr
    sha256 = hashlib.sha256(pack_directory(code)).hexdigest()
    assert service.store.get(result.stdout.strip()).spec.code.bundle == sha256
    assert list(service.files.files) == [f"bundles/{sha256}.zip"]
    assert cli("submit", job_file, "--code", code, "--dry-run").exit_code == 0


def test_code_is_packed_once_so_that_the_job_names_what_was_sent(service, cli, code, job_file, monkeypatch):
    import service.client.bundling as module

    real = module.pack_directory

    def pack(*arguments):
        packed = real(*arguments)
        (code / "model.py").write_text("x = 2\n")  # an editor saves it just now
        return packed

    monkeypatch.setattr(module, "pack_directory", pack)
    result = cli("submit", job_file, "--code", code, "--set", "code.requirements=true")
    assert result.exit_code == 0, result.stderr
    (upload,) = service.uploads.uploads.values()
    assert service.store.get(result.stdout.strip()).spec.code.bundle == upload.sha256


def test_again_sends_what_the_service_has(service, cli, code, tmp_path):
    np.savez(tmp_path / "data.npz", inputs=np.zeros(3))
    for command in (("bundle", code), ("dataset", tmp_path / "data.npz")):
        assert cli(*command).exit_code == 0
        (path,) = service.files.files
        content = service.files.files[path]
        service.files.files[path] = bytes(len(content))  # damaged, and of the same size
        assert cli(*command).exit_code == 0
        assert service.files.files[path] != content
        assert cli(*command, "--again").exit_code == 0
        assert service.files.files.pop(path) == content


def test_a_job_that_is_wrong_is_refused_before_its_code_is_sent(service, cli, code, job_file):
    result = cli("submit", job_file, "--code", code, "--set", "batch.size=0")
    assert result.exit_code == 2
    assert not service.uploads.uploads


@pytest.mark.parametrize("command", ["bundle", "dataset"])
def test_what_cannot_be_sent_is_a_sentence(service, cli, tmp_path, command):
    (tmp_path / "bad.zip").write_bytes(HOSTILE["parent"][0])
    (tmp_path / "large.zip").write_bytes(b"x" * (1 << 23))
    (tmp_path / "empty").mkdir()
    for name, code, part in (
        ("bad.zip", 2, "../evil.py: leads out"),
        ("large.zip", 1, "at most"),
        ("none.zip", 1, "No such file"),
        ("empty", 1, "holds no file" if command == "bundle" else "directory"),
    ):
        result = cli(command, tmp_path / name)
        assert result.exit_code == code, (name, result.output)
        assert part in result.stderr
        assert "Traceback" not in result.output
    assert not service.uploads.uploads
