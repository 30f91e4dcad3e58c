"""The options of a job on several ranks: what each changes, and that the number of ranks changes nothing.

The name of a test says which option is broken. Where one rank is right and several are wrong, or hang, ranks decide
something each by itself. Groups of ranks, and exactness itself, have files of their own.
"""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from service.domain.journal import ExactnessFound, Metrics, Warned
from service.domain.rank_protocol import Finished, Stepped
from service.training.sampling import SampleOrder
from tests.integration.training.brought_code import HERE
from tests.integration.training.gang import MLP, Gang, job_spec, run_gang, run_job

SMALL = {"factory": "builtin:digits", "args": {"test_fraction": 0.8459}}  # 277 images to train on
EVALUATED = {"every_steps": 2, "batch_size": 512}


def _code(name, **arguments):
    return {"factory": f"{HERE}:{name}", "args": arguments}


def _spec(**overrides):
    fields = {"model": _code("plain"), "dataset": SMALL, "batch": {"size": 8}, "schedule": {}, "steps": 6, **overrides}
    return job_spec(**{"precision": "float64", "evaluation": {"batch_size": 512}, **fields})


def _model(run):
    return load_file(max(run.staged_dirs.items())[1] / "model.safetensors")


def _assert_same(found, expected, *, rtol=1e-9):
    for name in ("train/loss", "train/gradient_norm", "eval/loss"):
        assert expected.curve(name), name
        np.testing.assert_allclose(found.curve(name), expected.curve(name), rtol=rtol, err_msg=name)
    torch.testing.assert_close(_model(found), _model(expected), rtol=rtol, atol=rtol)


def _differs(found, expected):
    ours, theirs = _model(found), _model(expected)
    return ours.keys() != theirs.keys() or not all(
        torch.allclose(ours[name], value, rtol=1e-7, atol=1e-9) for name, value in theirs.items()
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run_job(_spec(), world_size=1, staging_dir=tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    ("overrides", "changes_the_model"),
    [
        pytest.param({"optimizer": {"name": "lars"}}, True, id="lars"),
        pytest.param({"norm": {"kind": "frozen"}}, True, id="frozen"),
        pytest.param({"norm": {"kind": "group", "group_size": 2}}, True, id="group"),
        pytest.param({"norm": {"kind": "none"}}, True, id="none"),
        pytest.param({"norm": {"recalibrate": 3}}, True, id="recalibrate"),
        pytest.param({"schedule": {"name": "step", "milestones": [2, 4], "gamma": 0.5}}, True, id="step schedule"),
        pytest.param({"channels_last": True}, False, id="channels_last"),
        pytest.param({"loading": {"workers": 1}}, False, id="loading"),
        pytest.param({"ema": {"decay": 0.5}}, False, id="ema"),
    ],
)
def test_an_option_gives_on_three_ranks_what_it_gives_on_one(overrides, changes_the_model, plain, tmp_path):
    one, three = (run_job(_spec(**overrides), world_size=n, staging_dir=tmp_path / str(n)) for n in (1, 3))
    _assert_same(three, one)
    assert three.of(ExactnessFound)[0].exact
    assert _differs(one, plain) == changes_the_model


def test_recalibration_pools_over_the_mini_batches_it_names(tmp_path):
    # The statistics of a linear layer's input: known without any training.
    spec = _spec(norm={"recalibrate": 2}, steps=3)
    (one, three) = (run_job(spec, world_size=n, staging_dir=tmp_path / str(n)) for n in (1, 3))
    assert _model(one)["norm.num_batches_tracked"] == _model(three)["norm.num_batches_tracked"] == 2


def test_the_average_is_what_is_evaluated_and_survives_a_resume(plain, tmp_path):
    spec = _spec(ema={"decay": 0.5}, checkpoint={"every_steps": 4})
    run = run_job(spec, world_size=3, staging_dir=tmp_path / "whole")
    assert run.curve("eval/loss") != pytest.approx(plain.curve("eval/loss"), rel=1e-3)
    state = torch.load(run.staged_dirs[6] / "training_state.pt", weights_only=True)
    average = {name: value for name, value in _average(state).items() if value.is_floating_point()}
    assert not torch.allclose(average["conv.weight"], _model(run)["conv.weight"])
    resumed = run_job(spec, world_size=2, staging_dir=tmp_path / "resumed", resume_dir=run.staged_dirs[4])
    np.testing.assert_allclose(resumed.curve("eval/loss"), run.curve("eval/loss"), rtol=1e-9)


def _average(state):
    """Where the average is in a checkpoint's state."""
    found = [value for key, value in _items(state) if key == "average"]
    assert len(found) == 1
    return found[0]


def _items(value):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _items(inner)


STOPPING = {
    # Nothing improves by so much: the first evaluation stays the best one.
    "early_stopping": {"metric": "eval/loss", "mode": "min", "patience": 2, "min_delta": 1e8},
    "evaluation": EVALUATED,
    "steps": 20,
}


def test_early_stopping_ends_every_rank_after_its_patience_and_remembers_it(tmp_path):
    spec = _spec(**STOPPING, checkpoint={"every_steps": 5})
    ranks = run_gang(spec, world_size=3, staging_dir=tmp_path / "whole")
    note = "Stopped early at step 6: eval/loss has not improved for 2 evaluations."
    for rank in ranks:
        assert rank.exit_status == 0, rank.log
        assert rank.finished == Finished(step=6, stopped=False, note=note)
    assert list(ranks[0].staged_dirs) == [5, 6]
    # One evaluation without an improvement was behind it at step 5.
    resumed = run_job(spec, world_size=2, staging_dir=tmp_path / "on", resume_dir=ranks[0].staged_dirs[5])
    assert resumed.finished == Finished(step=6, stopped=False, note=note)
    again = run_job(spec, world_size=2, staging_dir=tmp_path / "again", resume_dir=ranks[0].staged_dirs[6])
    assert again.finished == Finished(step=6, stopped=False, note=note)


def test_a_metric_that_improves_stops_nothing(tmp_path):
    stopping = {**STOPPING, "early_stopping": {"metric": "eval/loss", "mode": "min", "patience": 2, "min_delta": -0.0}}
    spec = _spec(**{**stopping, "steps": 8}, optimizer={"name": "sgd", "learning_rate": 0.01})
    run = run_job(spec, world_size=2, staging_dir=tmp_path)
    assert run.curve("eval/loss") == sorted(run.curve("eval/loss"), reverse=True)
    assert run.finished == Finished(step=8, stopped=False)


def test_a_metric_that_nothing_evaluates_is_an_error_that_lists_those_that_are(tmp_path):
    stopping = {"metric": "eval/acuracy", "mode": "max"}
    for rank in run_gang(_spec(early_stopping=stopping, evaluation=EVALUATED), world_size=2, staging_dir=tmp_path):
        assert (rank.errored.cause, rank.errored.error_type) == ("user", "UnknownMetric")
        assert rank.errored.message.startswith("early_stopping.metric: eval/acuracy is none")
        assert "eval/accuracy" in rank.errored.message


POISONED = {
    "model": _code("linear"),
    "task": "regression",
    "dataset": _code("poisoned", value=1e200),  # its square is infinite; one sample of twelve
    "optimizer": {"name": "sgd", "learning_rate": 0.01},
    "batch": {"size": 6},
}


def _poisoned_steps_and_rank(world_size):
    order = SampleOrder(num_samples=12, batch_size=6, seed=0)
    places = {step: order.minibatch(step).tolist() for step in range(6)}
    steps = [step for step, rows in places.items() if 5 in rows]
    return steps, places[steps[0]].index(5) // (6 // world_size)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_loss_that_is_not_finite_stops_the_job_and_names_step_and_rank(world_size, tmp_path):
    (first, *_), rank_at_fault = _poisoned_steps_and_rank(world_size)
    for rank in run_gang(_spec(**POISONED), world_size=world_size, staging_dir=tmp_path):
        assert (rank.errored.cause, rank.errored.error_type) == ("user", "NotFinite"), rank.log
        assert rank.errored.message.startswith(f"step {first + 1}: the loss is inf")
        assert f"the loss of rank {rank_at_fault} is not finite" in rank.errored.message


def test_skipped_steps_leave_the_weights_as_they_are_and_are_counted(tmp_path):
    steps, _ = _poisoned_steps_and_rank(3)
    spec = _spec(**POISONED, nonfinite="skip", checkpoint={"every_steps": 1, "keep_last": 9})
    one, three = (run_job(spec, world_size=n, staging_dir=tmp_path / str(n)) for n in (1, 3))
    before = None
    for step, directory in three.staged_dirs.items():
        weights = load_file(directory / "model.safetensors")
        torch.testing.assert_close(
            weights, load_file(one.staged_dirs[step] / "model.safetensors"), rtol=1e-9, atol=1e-12
        )
        if before is not None:
            assert torch.equal(weights["weight"], before["weight"]) == (step - 1 in steps)
        before = weights
    assert three.curve("train/skipped_steps")[-1] == len(steps)
    assert {message.step for message in three.of(Metrics) if "train/loss" in message.nonfinite} == {
        step + 1 for step in steps
    }
    (warning,) = [message for message in three.of(Warned) if "skipped" in message.message]
    assert warning.message.startswith(f"step {steps[0] + 1}: the loss is inf")


def test_a_job_that_only_skips_ends_all_the_same(tmp_path):
    everything = {**POISONED, "dataset": _code("poisoned", value=1e200, num_samples=6)}
    spec = _spec(**{**everything, "steps": 200}, nonfinite="skip")
    for rank in run_gang(spec, world_size=2, staging_dir=tmp_path):
        assert rank.errored.error_type == "NotFinite"
        assert rank.errored.message.startswith("step 100: ")
        assert "So were the 100 steps up to it." in rank.errored.message


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_learns_about_the_same_on_one_rank_and_on_two(precision, plain, tmp_path):
    spec = _spec(precision=precision, channels_last=True)
    one, two = (run_job(spec, world_size=n, staging_dir=tmp_path / str(n)) for n in (1, 2))
    # Products of 8 bits (bfloat16) round to 2⁻⁹ = 0.002; three steps, of which float16 may skip the next ones while it
    # finds its scale, do not multiply that by twenty.
    for run in (one, two):
        np.testing.assert_allclose(run.curve("train/loss")[:3], plain.curve("train/loss")[:3], rtol=0.04)
        assert {value.dtype for name, value in _model(run).items() if "num" not in name} == {torch.float32}
    if precision == "float16":
        # A scale that overflows at once does so on any world; one at the edge, where a partial sum decides, need not.
        assert one.curve("train/loss_scale")[:2] == two.curve("train/loss_scale")[:2]
        assert all(math.log2(scale).is_integer() for scale in one.curve("train/loss_scale"))
        assert not one.of(Warned)


def test_float16_lowers_its_scale_until_steps_are_taken(tmp_path):
    # A loss that is large makes the scaled gradient overflow at first, on one rank of the two.
    poisoned = {**POISONED, "dataset": _code("poisoned", value=1e3)}
    spec = _spec(**{**poisoned, "steps": 20, "optimizer": {"name": "sgd", "learning_rate": 1e-6}}, precision="float16")
    run = run_job(spec, world_size=2, staging_dir=tmp_path)
    scales = run.curve("train/loss_scale")
    assert scales[-1] < scales[0]
    assert 0 < run.curve("train/skipped_steps")[-1] < 20
    assert np.isfinite(run.curve("train/gradient_norm")[-1])


def test_a_compiled_model_gives_the_same_on_one_rank_and_on_two(plain, tmp_path):
    spec = _spec(model=MLP, compile=True, steps=3)
    eager = run_job(_spec(model=MLP, steps=3), world_size=1, staging_dir=tmp_path / "eager")
    two = run_job(spec, world_size=2, staging_dir=tmp_path / "2")
    _assert_same(two, eager)


OWN_LOOP = {"train_function": f"{HERE}:train", "model": _code("linear"), "checkpoint": {"every_steps": 2}, "steps": 5}


def test_a_training_loop_of_ones_own_runs_reports_saves_and_resumes(tmp_path):
    spec = _spec(**OWN_LOOP)
    whole = run_gang(spec, world_size=3, staging_dir=tmp_path / "whole")
    for rank in whole:
        assert rank.exit_status == 0, rank.log
        assert rank.of(Stepped) == [Stepped(num_steps=5)]
        assert rank.finished == Finished(step=5, stopped=False)
    assert list(whole[0].staged_dirs) == [2, 4, 5]
    assert len(whole[0].curve("train/loss")) == 5
    (verdict,) = whole[0].of(ExactnessFound)
    assert not verdict.exact
    assert verdict.reasons[0].startswith("train_function:")
    one = run_job(spec, world_size=1, staging_dir=tmp_path / "one", resume_dir=whole[0].staged_dirs[2])
    assert [message.step for message in one.of(Metrics)] == [3, 4, 5]
    # The user's loop weighs by samples; the service's plan, SyncBatchNorm and checkpoint do the rest.
    np.testing.assert_allclose(one.curve("train/loss"), whole[0].curve("train/loss")[2:], rtol=1e-9)


def test_a_training_loop_that_was_done_has_nothing_left_to_do(tmp_path):
    whole = run_job(_spec(**OWN_LOOP), world_size=1, staging_dir=tmp_path / "whole")
    again = run_job(_spec(**OWN_LOOP), world_size=1, staging_dir=tmp_path / "again", resume_dir=whole.staged_dirs[5])
    assert again.finished == Finished(step=5, stopped=False)


def test_a_training_loop_of_ones_own_is_stopped_with_a_checkpoint(tmp_path):
    spec = _spec(**{**OWN_LOOP, "steps": 10**6, "checkpoint": {"every_steps": 10**6}})
    with Gang(spec, world_size=2, staging_dir=tmp_path) as gang:
        gang.wait_for_step(3)
        gang.request_stop(1)
        ranks = gang.wait_for_the_end()
    for rank in ranks:
        assert rank.finished.stopped, rank.log
        assert rank.finished.step == ranks[0].finished.step < 10**6


@pytest.mark.parametrize(
    ("function", "error_type", "words"),
    [
        ("never_reports", "BadFactory", "train_function: it returned without reporting a step"),
        ("fails", "ValueError", "does not like this"),
        ("missing", "BadFactory", "train_function: "),
    ],
)
def test_a_training_loop_that_does_not_work_says_why(function, error_type, words, tmp_path):
    spec = _spec(**{**OWN_LOOP, "train_function": f"{HERE}:{function}"})
    (rank,) = run_gang(spec, world_size=1, staging_dir=tmp_path)
    assert (rank.errored.cause, rank.errored.error_type) == ("user", error_type)
    assert words in rank.errored.message
