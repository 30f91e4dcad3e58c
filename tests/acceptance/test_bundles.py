"""Code and data that people bring, from the command line to a trained model.

A failure in the first test points at the way of a bundle, its requirements or a file of data to the ranks; in the
second at the way of a refusal back to the job.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.acceptance.embedded_service import EmbeddedServiceProcess
from tests.unit.cluster.test_requirements import wheel

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

CODE = {
    "brought/__init__.py": "",
    "brought/networks.py": """
import os
from torch import nn
import tiny
from brought.secrets_seen import secrets_seen

def classifier(width, input_shape, num_outputs):
    print("wheel:", tiny.where, "secrets:", secrets_seen(), flush=True)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(input_shape[0], width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, num_outputs)
    )
""",
    "brought/secrets_seen.py": """
import os
from pathlib import Path

def secrets_seen():
    environments = [Path(f"/proc/{pid}/environ").read_text() for pid in ("self", os.getppid())]
    names = [variable.partition("=")[0] for text in environments for variable in text.split(chr(0))]
    return sorted({name for name in [*os.environ, *names] if name.startswith(("SYNCBN_", "RAY_", "AWS_"))})
""",
    "brought/samples.py": """
import numpy as np

def clouds(path, held_out):
    with np.load(path) as arrays:
        inputs, targets = arrays["inputs"], arrays["targets"]
    return (inputs[held_out:], targets[held_out:]), (inputs[:held_out], targets[:held_out]), 2
""",
    "brought/losses.py": """
import torch.nn.functional as F

class Smoothed:
    def __init__(self, smoothing):
        self.smoothing = smoothing

    def loss(self, outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="sum", label_smoothing=self.smoothing), len(targets)

    def metrics(self, outputs, targets):
        return {"right": ((outputs.argmax(1) == targets).sum(), len(targets))}
""",
    "requirements.txt": "--no-index\n--find-links wheels\ntiny\n",
}


def test_a_model_a_dataset_and_a_loss_of_ones_own_train(service: EmbeddedServiceProcess, tmp_path: Path) -> None:
    code = _write(tmp_path / "code", CODE)
    wheel(code / "wheels")
    random = np.random.default_rng(0)
    targets = random.integers(0, 2, 200)
    np.savez(tmp_path / "clouds.npz", inputs=random.normal(size=(200, 5)) + 2.0 * targets[:, None], targets=targets)
    data = _syncbn(service, "dataset", tmp_path / "clouds.npz").stdout.strip()
    spec = _spec(
        model={"factory": "brought.networks:classifier", "args": {"width": 16}},
        dataset={"factory": "brought.samples:clouds", "args": {"path": f"upload:{data}", "held_out": 40}},
        task={"factory": "brought.losses:Smoothed", "args": {"smoothing": 0.1}},
        code={"requirements": True},
    )
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec))
    result = _syncbn(service, "submit", tmp_path / "job.yaml", "--code", code)
    assert result.returncode == 0, result
    job = service.wait_for_end(result.stdout.strip())
    log = service.http.get(f"/v1/jobs/{job['id']}/logs").text
    assert job["status"] == "succeeded", (job, log)
    assert (job["step"], job["attempt"]) == (20, 1)
    losses = service.series(job["id"], "train/loss")["values"]
    assert losses[-1] < 0.6 * losses[0]
    assert service.series(job["id"], "eval/right")["values"][-1] > 0.9  # the clouds hardly overlap
    # The same run in both ranks: what is printed shows that the wheel was there, and no secret.
    for rank in range(2):
        log = service.http.get(f"/v1/jobs/{job['id']}/logs", params={"rank": rank}).text
        assert "wheel: wheel secrets: []" in log


@pytest.mark.parametrize(
    ("requirements", "message"),
    [("--no-index\nabsent-thing\n", "requirements.txt cannot be installed"), ("-e .\n", "Line 1 of the bundle's")],
)
def test_requirements_that_cannot_be_installed_fail_the_job_once(
    service: EmbeddedServiceProcess, tmp_path: Path, requirements: str, message: str
) -> None:
    code = _write(tmp_path / "code", {"mine.py": "", "requirements.txt": requirements})
    bundle = json.loads(_syncbn(service, "bundle", code, "--format", "json").stdout)["sha256"]
    job = service.wait_for_end(service.submit(_spec(code={"bundle": bundle, "requirements": True})))
    assert (job["status"], job["reason"], job["attempt"]) == ("failed", "user_error", 1)
    assert job["failure"]["error_type"] == "UserCodeRefused"
    assert message in job["failure"]["message"]
    assert "Traceback" not in job["failure"]["message"]


def _spec(**changes: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "name": "brought",
        "model": {"factory": "builtin:mlp"},
        "dataset": {"factory": "builtin:digits"},
        "batch": {"size": 16},
        "optimizer": {"name": "sgd", "learning_rate": 0.1},
        "workers": 2,
        "steps": 20,
    }
    return spec | changes


def _write(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return directory


def _syncbn(service: EmbeddedServiceProcess, *arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "service.cli.main", *map(str, arguments), "--data-dir", str(service.data_dir)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ,
    )
