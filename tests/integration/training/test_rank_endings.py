"""Every way in which a training process ends: what it says, with which status, how fast.

A deadline that passes here means a rank that waits for peers that are gone, or for nobody.
"""

import os
import signal
import time

import pytest

from service.domain.journal import Metrics
from service.domain.rank_protocol import Finished, Stepped
from service.storage.manifest import verify_directory
from tests.integration.training.brought_code import HERE
from tests.integration.training.gang import MLP, Gang, job_spec, run_gang, run_job

ENDLESS = {"model": MLP, "steps": 1_000_000, "schedule": {"name": "constant"}, "checkpoint": {"every_steps": 1_000_000}}
NOTICED_WITHIN_S = 5.0  # gloo notices in 0.02 s; the rest is for a busy machine


def test_a_job_reports_every_step_and_finishes(tmp_path):
    spec = job_spec(model=MLP, steps=7, evaluation={"every_steps": 3}, checkpoint={"every_steps": 4})
    ranks = run_gang(spec, world_size=2, staging_dir=tmp_path)
    assert [rank.exit_status for rank in ranks] == [0, 0]
    assert [message.kind for message in ranks[1].messages] == ["stepped", "finished"]
    for rank in ranks:
        assert rank.of(Stepped) == [Stepped(num_steps=7)]
        assert rank.finished == Finished(step=7, stopped=False)
    first = ranks[0]
    assert [message.step for message in first.of(Metrics) if "train/loss" in message.values] == list(range(1, 8))
    assert [message.step for message in first.of(Metrics) if "eval/accuracy" in message.values] == [3, 6, 7]
    assert list(first.staged_dirs) == [4, 7]
    assert {"train/loss", "train/gradient_norm", "eval/loss"} <= verify_directory(first.staged_dirs[7]).metrics.keys()
    assert first.messages[-1].kind == "finished"
    assert "rank 0 of 2" in first.log
    assert "8 + 8" in first.log


def test_epochs_count_whole_minibatches(tmp_path):
    spec = job_spec(model=MLP, steps=None, epochs=2, batch={"size": 500}, schedule={})
    assert run_job(spec, world_size=1, staging_dir=tmp_path).finished.step == 2 * (1438 // 500) == spec.num_steps


def test_a_stop_is_agreed_on_and_leaves_a_checkpoint_to_continue_from(tmp_path):
    spec = job_spec(**ENDLESS)
    with Gang(spec, world_size=3, staging_dir=tmp_path) as gang:
        gang.wait_for_step(3)
        gang.request_stop(1)  # one rank is enough
        ranks = gang.wait_for_the_end()
    assert [rank.exit_status for rank in ranks] == [0, 0, 0]
    step = ranks[0].finished.step
    assert [rank.finished for rank in ranks] == [Finished(step=step, stopped=True)] * 3
    assert verify_directory(ranks[0].staged_dirs[step]).step == step
    with Gang(spec, world_size=2, staging_dir=tmp_path / "on", resume_dir=ranks[0].staged_dirs[step]) as gang:
        gang.wait_for_step(step + 1)
        assert gang.ranks[0].of(Metrics)[0].step == step + 1


@pytest.mark.parametrize("norm", ["sync", "local"])  # local: the first to notice is DDP, or the sum of the losses
def test_the_death_of_a_peer_ends_the_others_at_once(norm, tmp_path):
    with Gang(job_spec(**ENDLESS, norm={"kind": norm}), world_size=3, staging_dir=tmp_path) as gang:
        gang.wait_for_step(3)
        killed_at = time.monotonic()
        os.kill(gang.ranks[1].pid, signal.SIGKILL)
        ranks = gang.wait_for_the_end()
    assert [rank.exit_status for rank in ranks] == [1, -signal.SIGKILL, 1]
    for rank in (ranks[0], ranks[2]):
        assert rank.errored.cause == "collective", rank.log
        assert rank.ended_at - killed_at < NOTICED_WITHIN_S, rank.log


def test_a_peer_that_answers_no_more_is_given_up_after_the_timeout(tmp_path):
    with Gang(job_spec(**ENDLESS), world_size=2, staging_dir=tmp_path, collective_timeout_s=2.0) as gang:
        gang.wait_for_step(3)
        stopped_at = time.monotonic()
        os.kill(gang.ranks[1].pid, signal.SIGSTOP)
        gang.wait_for(lambda: gang.ranks[0].ended_at is not None)
    assert gang.ranks[0].errored.cause == "collective"
    assert gang.ranks[0].ended_at - stopped_at < 2.0 + NOTICED_WITHIN_S


def test_ranks_that_never_all_come_are_not_waited_for(tmp_path):
    with Gang(job_spec(**ENDLESS), world_size=2, staging_dir=tmp_path, collective_timeout_s=2.0) as gang:
        os.kill(gang.ranks[1].pid, signal.SIGKILL)
        gang.wait_for(lambda: gang.ranks[0].ended_at is not None)
    assert gang.ranks[0].errored.cause == "collective", gang.ranks[0].log


def test_the_end_of_the_channel_ends_the_process(tmp_path):
    with Gang(job_spec(**ENDLESS), world_size=2, staging_dir=tmp_path) as gang:
        gang.wait_for_step(3)
        gang.hang_up(0)
        ranks = gang.wait_for_the_end()
    assert [rank.exit_status for rank in ranks] == [1, 1]
    assert not ranks[0].of(Finished)
    assert ranks[1].errored.cause == "collective"


def test_a_loss_that_is_not_finite_is_reported_and_ends_the_job_at_the_same_step_everywhere(tmp_path):
    spec = job_spec(
        model=MLP,
        optimizer={"name": "sgd", "learning_rate": 1e6, "weight_decay": 1e3},
        schedule={"name": "constant"},
        steps=200,
    )
    ranks = run_gang(spec, world_size=2, staging_dir=tmp_path)
    assert [rank.exit_status for rank in ranks] == [1, 1]
    last = ranks[0].of(Metrics)[-1]
    assert {"train/loss", "train/gradient_norm"} & last.nonfinite.keys()
    for rank in ranks:
        assert (rank.errored.cause, rank.errored.error_type) == ("user", "NotFinite")
        assert rank.errored.message.startswith(f"step {last.step}:")
        assert "learning_rate" in rank.errored.message
        assert "Traceback" in rank.errored.traceback
    assert not ranks[0].staged_dirs


@pytest.mark.parametrize("kind", ["python", "torch"])
def test_memory_that_runs_out_is_named(kind, tmp_path):
    spec = job_spec(model={"factory": f"{HERE}:too_large_model", "args": {"kind": kind}})
    (rank,) = run_gang(spec, world_size=1, staging_dir=tmp_path)
    assert rank.exit_status == 1
    assert (rank.errored.cause, rank.errored.error_type) == ("memory", "BadFactory"), (
        rank.log
    )  # which it was raised from


def test_a_world_that_cannot_share_the_batch_is_an_error_of_the_user(tmp_path):
    spec = job_spec(model=MLP, batch={"size": 4, "normalization_size": 2}, workers=2)
    for rank in run_gang(spec, world_size=5, staging_dir=tmp_path):
        assert (rank.errored.cause, rank.errored.error_type) == ("user", "NoPlan"), rank.log


@pytest.mark.parametrize("max_file_bytes", [100_000, 800_000])  # between them: the weights fit, AdamW's state does not
def test_a_full_disk_leaves_no_torn_checkpoint(max_file_bytes, tmp_path):
    spec = job_spec(
        model={"factory": "builtin:mlp", "args": {"hidden_sizes": [512, 128]}},
        optimizer={"name": "adamw"},
        steps=5,
        checkpoint={"every_steps": 2, "on_failure": "stop"},
    )
    ranks = run_gang(spec, world_size=2, staging_dir=tmp_path, max_file_bytes=max_file_bytes)
    assert ranks[0].errored.cause == "checkpoint", ranks[0].log
    assert "step 2" in ranks[0].errored.message
    assert ranks[1].errored.cause == "collective"
    assert not ranks[0].staged_dirs
    assert list((tmp_path / "staging").iterdir()) == []
