"""The promise of the product: neither the number of ranks nor accumulation changes what is computed.

If every world disagrees with the naive loop, the arithmetic of a step is wrong (order of samples, loss, clipping,
schedule); if only the larger worlds do, something is averaged over ranks instead of summed over samples; if only the
last figures of float64 differ, float32 has crept in. The control shows that these assertions can fail.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from service.domain.journal import ExactnessFound
from service.domain.spec import JobSpec
from service.training.checkpoints import read_checkpoint
from service.training.data import build_dataset
from service.training.models import build_model
from service.training.sampling import SampleOrder
from service.training.tasks import Loss, build_task
from service.training.tasks.classification import Classification
from service.training.trainer import Trainer
from service.training.world import World
from tests.integration.training.brought_code import HERE
from tests.integration.training.gang import JOB_ID, MLP, job_spec, run_gang, run_job
from tests.ranks import run_ranks

NUM_STEPS = 50


def brought(name, **arguments):
    return {"factory": f"{HERE}:{name}", "args": arguments}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    return run_job(_residual_spec(), world_size=1, staging_dir=tmp_path_factory.mktemp("one-rank"))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_step_of_any_world_has_the_same_loss(world_size, one_rank, tmp_path):
    rank = run_job(_residual_spec(), world_size=world_size, staging_dir=tmp_path)
    # Seen: 4e-16, two units in the last place; room for other processors' summation, far below float32's 6e-8.
    np.testing.assert_allclose(rank.curve("train/loss"), one_rank.curve("train/loss"), rtol=1e-11)
    np.testing.assert_allclose(rank.curve("train/gradient_norm"), one_rank.curve("train/gradient_norm"), rtol=1e-10)
    assert rank.curve("train/accuracy") == one_rank.curve("train/accuracy")
    assert rank.curve("eval/accuracy") == one_rank.curve("eval/accuracy")
    np.testing.assert_allclose(rank.curve("eval/loss"), one_rank.curve("eval/loss"), rtol=1e-10)
    _assert_same_model(rank, one_rank, rtol=1e-9)  # running statistics included


def test_local_batch_norm_does_depend_on_the_world(one_rank, tmp_path):
    rank = run_job(_residual_spec(norm={"kind": "local"}), world_size=4, staging_dir=tmp_path)
    truth, found = np.array(one_rank.curve("train/loss")), np.array(rank.curve("train/loss"))
    assert np.max(np.abs(found - truth) / truth) > 0.1
    (warning,) = [message for message in rank.messages if message.kind == "warning"]
    assert "depends on their number" in warning.message


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_step_is_what_a_naive_loop_computes(world_size, tmp_path):
    spec = _residual_spec(steps=12, gradient_clip_norm=0.75, schedule={"warmup_steps": 4, "final_fraction": 0.1})
    rank = run_job(spec, world_size=world_size, staging_dir=tmp_path)
    losses, norms = _naive_losses_and_norms(spec)
    np.testing.assert_allclose(rank.curve("train/loss"), losses, rtol=1e-11)
    np.testing.assert_allclose(rank.curve("train/gradient_norm"), norms, rtol=1e-10)
    assert max(norms) > 0.75, "nothing was clipped"


def test_accumulation_is_exact(tmp_path):
    spec = job_spec(
        model=MLP, batch={"size": 24, "normalization_size": 8, "max_per_rank": 8}, steps=20, precision="float64"
    )
    losses, norms = _naive_losses_and_norms(spec)
    runs = [run_job(spec, world_size=size, staging_dir=tmp_path / str(size)) for size in (1, 2, 3)]
    for rank in runs:
        np.testing.assert_allclose(rank.curve("train/loss"), losses, rtol=1e-11)
        np.testing.assert_allclose(rank.curve("train/gradient_norm"), norms, rtol=1e-10)
        _assert_same_model(rank, runs[0], rtol=1e-9)


CANVASES = {"num_training": 24, "num_held_out": 6, "height": 16, "width": 16, "max_digits": 2, "scale": 1}
TASKS = {
    "segmentation": {
        "task": {"name": "segmentation", "dice_weight": 0.5},
        "model": {"factory": "builtin:unet", "args": {"depth": 2, "width": 4}},
        "dataset": {"factory": "builtin:digits-segmentation", "args": CANVASES},
    },
    "detection": {
        "task": "detection",
        "model": {"factory": "builtin:detector", "args": {"width": 4, "num_blocks": 1, "head_depth": 1}},
        "dataset": {"factory": "builtin:digits-detection", "args": CANVASES},
        "optimizer": {"name": "adamw"},
    },
    "recurrent": {
        "model": {"factory": "builtin:recurrent", "args": {"hidden_size": 8, "dropout": 0.2}},
        "dataset": {"factory": "builtin:digits", "args": {"layout": "sequence", "test_fraction": 0.85}},
    },
    "regression": {
        "task": {"name": "regression", "loss": "huber"},
        "model": {"factory": "builtin:mlp", "args": {"hidden_sizes": [8]}},
        "dataset": {"factory": "builtin:diabetes"},
    },
}


@pytest.mark.parametrize("name", TASKS)
def test_every_kind_of_task_gives_the_same_on_any_world(name, tmp_path):
    # Where weights are pixels or boxes, ranks hold unequal shares of them, and some may hold none.
    spec = job_spec(
        **TASKS[name], batch={"size": 6}, steps=6, precision="float64", schedule={}, evaluation={"batch_size": 512}
    )
    one, *others = (run_job(spec, world_size=n, staging_dir=tmp_path / str(n)) for n in (1, 2, 4))
    for rank in others:
        assert _verdict(rank).exact
        assert one.curve("eval/loss")
        for curve in ("train/loss", "train/gradient_norm", "eval/loss"):
            np.testing.assert_allclose(rank.curve(curve), one.curve(curve), rtol=1e-9)
        _assert_same_model(rank, one, rtol=1e-9)


REASONS = {
    "local norm": ({"norm": {"kind": "local"}}, "norm.kind is local"),
    "draws from torch": ({"model": brought("draws", source="torch")}, "random numbers"),
    "draws from numpy": ({"model": brought("draws", source="numpy")}, "random numbers"),
    "draws from python": ({"model": brought("draws", source="python")}, "random numbers"),
    "dropout of its own": ({"model": brought("dropout_left_as_it_is")}, "random numbers"),
    "a buffer of its own": ({"model": brought("keeps_a_buffer")}, "changes between.scale in its forward"),
    "dropout over time first": ({"model": brought("drops_out_time_first")}, "between.dropout drops out values"),
    "a mean for a loss": ({"task": brought("MeanLoss")}, "Return (sum, weight)"),
    "a loss that compares samples": ({"task": brought("ContrastiveLoss")}, "compares the samples"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_depends_on_the_world_is_told(name, tmp_path):
    overrides, words = REASONS[name]
    spec = _brought_spec(**overrides)
    rank = run_job(spec, world_size=2, staging_dir=tmp_path / "2")
    (reason,) = _verdict(rank).reasons
    assert words in reason
    assert not _verdict(rank).exact


@pytest.mark.parametrize("name", ["local norm", "draws from torch", "dropout of its own", "a buffer of its own"])
def test_what_is_told_to_depend_on_the_world_does(name, tmp_path):
    # The control of the equalities of these files: masks, statistics and noise of each rank's own do show.
    spec = _brought_spec(**REASONS[name][0])
    one, two = (run_job(spec, world_size=n, staging_dir=tmp_path / str(n)) for n in (1, 2))
    error = np.max(np.abs(np.array(two.curve("train/loss")) / np.array(one.curve("train/loss")) - 1))
    assert error > 1e-6


def test_a_job_that_has_to_be_exact_fails_where_it_is_not(tmp_path):
    spec = _brought_spec(**REASONS["draws from torch"][0], exactness={"require": True})
    for rank in run_gang(spec, world_size=2, staging_dir=tmp_path):
        assert (rank.errored.cause, rank.errored.error_type) == ("user", "NotExact")
        assert rank.errored.message.startswith("exactness.require: ")
        assert "random numbers" in rank.errored.message
        assert not rank.staged_dirs


REHEARSED = {"workers": 3, "exactness": {"require": True, "rehearse": {"worlds": [1, 2], "steps": 3}}}


@pytest.mark.parametrize(
    "model",
    [
        brought("all_dropouts"),
        brought("plain", momentum=None),
        # Its bias stays zero but for rounding, of which no two worlds agree on a digit.
        brought("zero_bias_before_a_norm"),
    ],
    ids=lambda model: model["factory"].partition(":")[2],
)
def test_a_rehearsal_of_what_is_exact_says_so_and_leaves_no_trace(model, tmp_path):
    plain = run_job(_brought_spec(model=model), world_size=3, staging_dir=tmp_path / "plain")
    rehearsed = run_job(_brought_spec(model=model, **REHEARSED), world_size=3, staging_dir=tmp_path / "rehearsed")
    assert _verdict(rehearsed).rehearsed.startswith("Rehearsed 3 steps in float64 on 1 and on 2 worker(s)")
    assert rehearsed.curve("train/loss") == plain.curve("train/loss")
    _assert_same_model(rehearsed, plain, rtol=0)


@pytest.mark.parametrize("name", ["couples_samples", "keeps_a_buffer"])
def test_a_rehearsal_finds_what_only_a_comparison_shows(name, tmp_path):
    spec = _brought_spec(model=brought(name), precision="float32", **REHEARSED)
    for rank in run_gang(spec, world_size=3, staging_dir=tmp_path):
        assert (rank.errored.cause, rank.errored.error_type) == ("user", "NotExact")
        assert rank.errored.message.startswith("exactness.rehearse: Rehearsed 3 steps in float64 on 1 and on 2")
        assert not rank.staged_dirs


def test_float32_agrees_one_step_at_a_time(tmp_path):
    # Over many steps float32 proves nothing, since training is chaotic: each step starts from the same state.
    spec = job_spec(steps=21, checkpoint={"every_steps": 1})
    rank = run_job(spec, world_size=1, staging_dir=tmp_path)
    directories = list(rank.staged_dirs.values())[:20]
    truth = np.array(rank.curve("train/loss")[1:]), np.array(rank.curve("train/gradient_norm")[1:])
    for world_size in (1, 2, 3, 4):
        for steps in run_ranks(world_size, _one_step_from_each, spec.model_dump_json(), directories):
            loss_error = np.max(np.abs([loss for loss, _ in steps] / truth[0] - 1))
            norm_error = np.max(np.abs([norm for _, norm in steps] / truth[1] - 1))
            print(f"{world_size} ranks, 20 states: loss {loss_error:.1e}, gradient norm {norm_error:.1e}")
            # A sum over 16 samples, and one over 5000 weights, in float32 (2⁻²⁴ = 6e-8).
            np.testing.assert_allclose([loss for loss, _ in steps], truth[0], rtol=1e-6)
            np.testing.assert_allclose([norm for _, norm in steps], truth[1], rtol=1e-5)


def test_a_loss_that_does_not_weigh_every_sample_is_divided_by_its_global_weight():
    # Where ranks hold unequal numbers of valid samples, an average of their averages is wrong.
    spec = job_spec(model=MLP, precision="float64").model_dump_json()
    (truth,), *others = (run_ranks(size, _steps_ignoring_small_digits, spec) for size in (1, 2, 3))
    for ranks in others:
        for losses, norms in ranks:
            np.testing.assert_allclose(losses, truth[0], rtol=1e-12)
            np.testing.assert_allclose(norms, truth[1], rtol=1e-11)


def _brought_spec(**overrides):
    fields = {
        "model": brought("plain"),
        "dataset": {"factory": "builtin:digits", "args": {"test_fraction": 0.85}},
        "batch": {"size": 8},
        "schedule": {},
        "steps": 4,
        "precision": "float64",
        "evaluation": {"batch_size": 512},
        **overrides,
    }
    return job_spec(**fields)


def _verdict(rank):
    (found,) = rank.of(ExactnessFound)
    return found


def _residual_spec(**overrides):
    return job_spec(**{"precision": "float64", "steps": NUM_STEPS, **overrides})


def _assert_same_model(rank, other, *, rtol):
    found, expected = (load_file(max(run.staged_dirs.items())[1] / "model.safetensors") for run in (rank, other))
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)


def _trainer(rank, spec_json, task=None):
    spec = JobSpec.model_validate_json(spec_json)
    world = World(rank=rank, size=torch.distributed.get_world_size(), device=torch.device("cpu"))
    dataset = build_dataset(spec.dataset, seed=spec.seed)
    trainer = Trainer(spec=spec, dataset=dataset, task=task or build_task(spec.task), world=world)
    trainer.settle()
    return trainer


def _steps_ignoring_small_digits(rank, spec_json):
    class LargeDigits(Classification):
        def loss(self, logits, targets):
            valid = targets >= 3
            loss = F.cross_entropy(logits[valid], targets[valid], reduction="sum")
            return Loss(sum=loss, weight=float(valid.sum()))

    trainer = _trainer(rank, spec_json, task=LargeDigits())
    results = [trainer.step() for _ in range(5)]
    return [result.loss for result in results], [result.gradient_norm for result in results]


def _one_step_from_each(rank, spec_json, directories):
    trainer = _trainer(rank, spec_json)
    results = []
    for directory in directories:
        trainer.restore(read_checkpoint(directory, job_id=JOB_ID))
        result = trainer.step()
        results.append((result.loss, result.gradient_norm))
    return results


def _naive_losses_and_norms(spec):
    """Plain torch, one process, float64: what the job means."""
    dataset = build_dataset(spec.dataset, seed=spec.seed)
    order = SampleOrder(num_samples=len(dataset.training), batch_size=spec.batch.size, seed=spec.seed)
    model = build_model(
        spec.model, input_shape=(1, 8, 8), num_outputs=10, task="classification", seed=spec.seed
    ).double()
    options = spec.optimizer
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.SGD(
        [{"params": weights, "weight_decay": options.weight_decay}, {"params": others}],
        momentum=options.momentum,
        nesterov=options.nesterov,
    )
    warmup, steps, final = spec.schedule.warmup_steps, spec.num_steps, spec.schedule.final_fraction
    losses, norms = [], []
    for step in range(steps):
        cosine = (1 + np.cos(np.pi * (step - warmup + 1) / (steps - warmup))) / 2
        factor = (step + 1) / warmup if step < warmup else final + (1 - final) * cosine
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * factor
        optimizer.zero_grad()
        rows = torch.from_numpy(order.minibatch(step).copy())
        loss = sum(
            F.cross_entropy(model(dataset.training.inputs[part]), dataset.training.targets[part], reduction="sum")
            for part in rows.split(spec.batch.samples_normalized_together)
        )
        loss = loss / spec.batch.size
        loss.backward()
        clip = spec.gradient_clip_norm or float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms
