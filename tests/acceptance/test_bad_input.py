"""What a user gets wrong is told with the field and the remedy, through the command line and over REST.

A failure in the first tests points at the command line; in the second at the API. In both, nothing may have started.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml

from tests.acceptance.embedded_service import EmbeddedServiceProcess, digits_job

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]

MISTAKES = [
    pytest.param({"colour": "blue"}, "colour", "Remove it", id="unknown field"),
    pytest.param(
        {"optimizer": {"name": "sgd", "learning_rate": float("nan")}}, "optimizer.learning_rate", "finite", id="NaN"
    ),
    pytest.param(
        {"batch": {"size": 16, "max_per_rank": 4}},
        "batch.max_per_rank",
        "Use 4 worker(s)",
        id="batch no world holds",
    ),
    pytest.param(
        {"model": {"factory": "builtin:small-resnt"}},
        "model.factory",
        "Did you mean builtin:small-resnet?",
        id="factory",
    ),
    pytest.param({"batch": {"size": 64}, "workers": 60}, "workers", "Use at most 8 workers", id="too many workers"),
]


def _syncbn(*arguments: str, environment: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "service.cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | (environment or {}),
    )


def _num_jobs(service: EmbeddedServiceProcess) -> int:
    return len(service.get("/v1/jobs?limit=500")["jobs"])


@pytest.mark.parametrize(("change", "field", "remedy"), MISTAKES)
def test_the_command_line_names_field_and_remedy(
    service: EmbeddedServiceProcess, tmp_path: Path, change: dict[str, object], field: str, remedy: str
) -> None:
    before = _num_jobs(service)
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(digits_job(**change)))
    result = _syncbn("submit", str(file), "--data-dir", str(service.data_dir))
    assert result.returncode == 2, result
    assert f"{field}: " in result.stderr
    assert remedy in result.stderr
    assert "Traceback" not in result.stderr
    assert _num_jobs(service) == before


def test_a_dry_run_ends_as_the_submission_would(service: EmbeddedServiceProcess, tmp_path: Path) -> None:
    before = _num_jobs(service)
    for workers, code in ((4, 0), (16, 2)):
        file = tmp_path / f"{workers}.yaml"
        file.write_text(yaml.safe_dump(digits_job(workers=workers)))
        result = _syncbn("submit", "--dry-run", str(file), "--data-dir", str(service.data_dir))
        assert result.returncode == code, result
    assert _num_jobs(service) == before


@pytest.mark.parametrize(("change", "field", "remedy"), MISTAKES)
def test_the_api_names_field_and_remedy(
    service: EmbeddedServiceProcess, change: dict[str, object], field: str, remedy: str
) -> None:
    before = _num_jobs(service)
    # json.dumps writes NaN as it is, as Python clients do; httpx's own encoder would refuse.
    body = json.dumps(digits_job(**change))
    response = service.http.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 422, response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    errors = {error["field"]: error["message"] for error in response.json()["errors"]}
    assert remedy in errors[field]
    assert _num_jobs(service) == before


@pytest.mark.parametrize("token", [None, "wrong"])
def test_a_missing_or_wrong_token(service: EmbeddedServiceProcess, tmp_path: Path, token: str | None) -> None:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    response = httpx.post(f"{service.url}/v1/jobs", json=digits_job(), headers=headers)
    assert response.status_code == 401
    assert "token" in response.json()["detail"]

    environment = {"SYNCBN_URL": service.url, "SYNCBN_DATA_DIR": str(tmp_path)}
    if token is not None:
        environment["SYNCBN_TOKEN"] = token
    result = _syncbn("ls", environment=environment)
    assert result.returncode == 4, result
    assert "token" in result.stderr
    assert "Traceback" not in result.stderr
