"""The commands that bring code and data, against the API over a fake store."""

import json

import numpy as np
import pytest
import yaml

from service.client.bundling import bundle_sha256
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
    assert result.stdout.strip() == bundle_sha256(code)
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
    sha256 = bundle_sha256(code)
    assert service.store.get(result.stdout.strip()).spec.code.bundle == sha256
    assert list(service.files.files) == [f"bundles/{sha256}.zip"]
    assert cli("submit", job_file, "--code", code, "--dry-run").exit_code == 0


def test_a_hash_that_looks_like_a_number_stays_a_hash(service, cli, job_file, code, monkeypatch):
    monkeypatch.setattr("service.client.bundling.bundle_sha256", lambda _: "1" * 62 + "e1")
    result = cli("submit", job_file, "--code", code)
    assert result.exit_code == 2
    assert "code.bundle: there is no bundle 1111" in result.stderr


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
