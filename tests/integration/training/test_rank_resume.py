"""A job that was interrupted gives what the undisturbed one gives.

If curves agree but not to the last bit, the order of a sum changed: look at the gradient buckets (``Trainer.settle``).
If they part at once, a part of the state is missing from the checkpoint, or the sample order forgot where it was.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from service.domain.spec import JobSpec
from service.training.data import build_dataset
from service.training.tasks import build_task
from service.training.trainer import Trainer, wrap
from service.training.world import World
from tests.integration.training.gang import JOB_ID, MLP, job_spec, run_gang, run_job
from tests.ranks import run_ranks

ADAMW = {"name": "adamw", "learning_rate": 0.01}


@pytest.mark.parametrize(
    ("precision", "world_size", "overrides"),
    [("float64", 3, {}), ("float32", 3, {"optimizer": ADAMW}), ("bfloat16", 2, {"model": MLP})],
)
def test_a_resumed_job_equals_the_undisturbed_one_to_the_last_bit(precision, world_size, overrides, tmp_path):
    # Three ranks: the sum of two does not depend on its order.
    spec = job_spec(precision=precision, steps=12, checkpoint={"every_steps": 5}, **overrides)
    undisturbed = run_job(spec, world_size=world_size, staging_dir=tmp_path / "undisturbed")
    resumed = run_job(
        spec, world_size=world_size, staging_dir=tmp_path / "resumed", resume_dir=undisturbed.staged_dirs[5]
    )
    for name in ("train/loss", "train/gradient_norm", "train/accuracy", "train/learning_rate"):
        assert resumed.curve(name) == undisturbed.curve(name)[5:]
    assert resumed.curve("eval/loss") == undisturbed.curve("eval/loss")
    last = [run.staged_dirs[12] for run in (resumed, undisturbed)]
    weights = [(directory / "model.safetensors").read_bytes() for directory in last]
    assert weights[0] == weights[1]
    states = [torch.load(directory / "training_state.pt", weights_only=True) for directory in last]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_a_job_resumed_on_another_world_goes_on_the_same(tmp_path):
    spec = job_spec(precision="float64", steps=12, checkpoint={"every_steps": 5})
    undisturbed = run_job(spec, world_size=1, staging_dir=tmp_path / "undisturbed")
    resumed = run_job(spec, world_size=2, staging_dir=tmp_path / "resumed", resume_dir=undisturbed.staged_dirs[5])
    # As between worlds in an undisturbed run, with some room.
    np.testing.assert_allclose(resumed.curve("train/loss"), undisturbed.curve("train/loss")[5:], rtol=1e-10)
    found, expected = (load_file(run.staged_dirs[12] / "model.safetensors") for run in (resumed, undisturbed))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("normalization_size", [24, 12])
def test_only_settled_buckets_give_equal_bits(normalization_size):
    # The control of the bit equality above: without settling, the first step sums in another order than the second.
    spec = job_spec(batch={"size": 24, "normalization_size": normalization_size}, steps=5).model_dump_json()
    for settle in (True, False):
        first, second = run_ranks(4, _weights_of_the_same_step_twice, spec, settle)[0]
        assert torch.equal(first, second) == settle


def test_a_finished_job_that_is_resumed_has_nothing_left_to_do(tmp_path):
    spec = job_spec(model=MLP, steps=5)
    rank = run_job(spec, world_size=1, staging_dir=tmp_path / "first")
    again = run_job(spec, world_size=2, staging_dir=tmp_path / "again", resume_dir=rank.staged_dirs[5])
    assert [message.kind for message in again.messages] == ["finished"]
    assert again.finished.step == 5


def test_a_checkpoint_of_another_job_is_refused(tmp_path):
    spec = job_spec(model=MLP, steps=5)
    rank = run_job(spec, world_size=1, staging_dir=tmp_path / "first")
    manifest = rank.staged_dirs[5] / "manifest.json"
    manifest.write_text(manifest.read_text().replace(JOB_ID, "job-other"))
    (refused,) = run_gang(spec, world_size=1, staging_dir=tmp_path / "other", resume_dir=rank.staged_dirs[5])
    assert refused.exit_status == 1
    assert (refused.errored.cause, refused.errored.error_type) == ("user", "CheckpointMismatch")
    assert "of job-other" in refused.errored.message


def _weights_of_the_same_step_twice(rank, spec_json, settle):
    spec = JobSpec.model_validate_json(spec_json)
    world = World(rank=rank, size=torch.distributed.get_world_size(), device=torch.device("cpu"))
    dataset = build_dataset(spec.dataset, seed=spec.seed)
    trainer = Trainer(spec=spec, dataset=dataset, task=build_task(spec.task), world=world)
    if settle:
        trainer.settle()
    else:
        trainer._parallel = wrap(trainer.model, world, finds_unused=False)
    start = trainer.capture()
    start = replace(start, model={name: tensor.clone() for name, tensor in start.model.items()})
    weights = []
    for _ in range(2):
        trainer.step()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]).clone())
        trainer.restore(start)
        trainer._optimizer.state.clear()  # before the first step there is no momentum
    return weights


def test_a_resume_with_channels_last_is_the_undisturbed_run(tmp_path):
    # Moments that lie otherwise in memory than their weights would be paired with the wrong ones.
    spec = job_spec(channels_last=True, precision="float64", steps=8, checkpoint={"every_steps": 4})
    whole = run_job(spec, world_size=1, staging_dir=tmp_path / "whole")
    resumed = run_job(spec, world_size=1, staging_dir=tmp_path / "resumed", resume_dir=whole.staged_dirs[4])
    assert resumed.curve("train/loss") == whole.curve("train/loss")[4:]
