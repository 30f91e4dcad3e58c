"""A rank's directory on its node. A failure means checkpoints that fill a disk, or that vanish under a living rank."""

import os
import signal
import subprocess
import sys

import pytest

from service.cluster.rank_directory import RankDirectory, remove_abandoned

HOLDER = """
import sys, time
from pathlib import Path
from service.cluster.rank_directory import RankDirectory
directory = RankDirectory(Path(sys.argv[1]), job_id="job", attempt=1, rank=0)
(directory.path / "staging").mkdir()
(directory.path / "staging" / "weights").write_bytes(b"1")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_what_a_killed_actor_left_is_removed_and_what_a_living_one_holds_is_not(tmp_path, holder):
    ours = RankDirectory(tmp_path, job_id="job", attempt=2, rank=1)
    (ours.path / "output.log").write_text("line")
    remove_abandoned(tmp_path)
    assert (tmp_path / "job" / "1" / "rank-0" / "staging" / "weights").exists()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    remove_abandoned(tmp_path)
    assert not (tmp_path / "job" / "1" / "rank-0").exists()
    assert (ours.path / "output.log").read_text() == "line"
    ours.remove()
    assert not ours.path.exists()


def test_what_is_no_rank_s_is_left_alone(tmp_path):
    for path in ("checkpoints/job/copy", "forkserver.log"):
        (tmp_path / path).mkdir(parents=True)
    held = RankDirectory(tmp_path, job_id="job", attempt=1, rank=0)
    held.remove()
    remove_abandoned(tmp_path)
    assert (tmp_path / "checkpoints" / "job" / "copy").exists()
    assert (tmp_path / "forkserver.log").exists()


def test_a_rank_s_directory_is_one_s_alone(tmp_path):
    first = RankDirectory(tmp_path, job_id="job", attempt=1, rank=0)
    (first.path / "output.log").write_text("line")
    with pytest.raises(OSError, match="not empty"):
        RankDirectory(tmp_path, job_id="job", attempt=1, rank=0)
