"""`make demo` as a newcomer runs it: it learns, tells where the checkpoint is, and leaves no process behind."""

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import yaml

from tests.acceptance.embedded_service import MARKER, marked_processes, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240), pytest.mark.usefixtures("clean_machine")]

DEMO = Path("examples/demo.py")


def _start(data_dir: Path, marker: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(DEMO), "--data-dir", str(data_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {MARKER: marker},
        # A terminal's Ctrl-C goes to the foreground group; so does the test's.
        start_new_session=True,
    )


def test_the_demo_reaches_97_percent_in_at_most_350_steps(tmp_path: Path) -> None:
    job = yaml.safe_load(Path("examples/digits.yaml").read_text())
    assert job["steps"] <= 350
    assert (job["workers"], job["batch"]["size"], job["batch"]["max_per_rank"]) == (4, 16, 4)
    marker = uuid.uuid4().hex
    demo = _start(tmp_path / "demo", marker)
    output, _ = demo.communicate(timeout=200)
    assert demo.returncode == 0, output
    accuracy = next(line for line in output.splitlines() if line.startswith("test accuracy")).split()[2]
    assert float(accuracy) >= 0.97, output
    path = next(line for line in output.splitlines() if line.startswith("checkpoint")).split()[-1]
    assert (tmp_path / "demo" / "runs" / path / "model.safetensors").exists()
    assert "load_file" in output
    evaluated = subprocess.run(
        [sys.executable, "examples/evaluate_checkpoint.py", path], capture_output=True, text=True, timeout=60
    )
    assert f"test accuracy {accuracy}" in evaluated.stdout, evaluated
    assert not marked_processes(marker)


def test_ctrl_c_leaves_no_process(tmp_path: Path) -> None:
    marker = uuid.uuid4().hex
    demo = _start(tmp_path / "demo", marker)
    assert demo.stdout is not None
    for line in demo.stdout:
        if "running" in line:
            break
    os.killpg(demo.pid, signal.SIGINT)
    demo.communicate(timeout=60)
    assert demo.returncode == 130
    wait_until(lambda: not marked_processes(marker), 5, lambda: f"left behind: {marked_processes(marker)}")
