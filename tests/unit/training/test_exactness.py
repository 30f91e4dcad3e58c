"""What makes a job's result depend on the number of ranks, put into words. A failure is a verdict that is wrong."""

import re

import pytest
import torch
from torch import nn

from service.domain.spec import JobSpec
from service.training.exactness import Exactness
from service.training.rehearsal import TOLERANCE, _difference
from service.training.tasks import Loss
from service.training.tasks.classification import Classification
from syncbn import SyncBatchNorm


class _Coupling(Classification):
    unsuited = "it compares samples with each other."


def _exactness(norm="sync", task=None, model=None):
    spec = JobSpec.model_validate(
        {
            "name": "any",
            "model": {"factory": "builtin:mlp"},
            "dataset": {"factory": "builtin:digits"},
            "batch": {"size": 4},
            "steps": 1,
            "norm": {"kind": norm},
        }
    )
    return Exactness(spec, task or Classification(), model or nn.Linear(1, 1))


def _loss(**fields):
    return Loss(sum=torch.zeros(()), weight=1.0, **fields)


NOTHING = {"loss": _loss(), "changed_buffers": [], "draws_others": False, "misfits": ()}


@pytest.mark.parametrize("norm", ["sync", "frozen", "group", "none"])
def test_nothing_that_was_seen_is_no_reason(norm):
    exactness = _exactness(norm)
    exactness.observe(**NOTHING)
    assert exactness.reasons == []


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        ({"loss": _loss(adds_up=False)}, ["task", "does not add up|do not add up", r"Return \(sum, weight\)"]),
        ({"draws_others": True}, ["model", "random numbers", "Use nn.Dropout"]),
        ({"misfits": {"head.drop"}}, ["model", "head.drop", "laid out by samples"]),
        ({"changed_buffers": ["block.center"]}, ["model", "block.center"]),
        (
            {"changed_buffers": ["b.x", "a.x", "d.x", "e.x", "c.x"]},
            ["model", "a.x, b.x, c.x and 2 more"],
        ),
    ],
)
def test_each_reason_names_the_part_of_the_job_and_what_it_is(seen, words):
    exactness = _exactness()
    exactness.observe(**{**NOTHING, **seen})
    (reason,) = exactness.reasons
    assert reason.startswith(words[0] + ":")
    for word in words[1:]:
        assert re.search(word, reason)


def test_running_statistics_may_change_where_ranks_share_them():
    model = nn.Sequential(SyncBatchNorm(2, skip_nonfinite=True), nn.InstanceNorm1d(2, track_running_stats=True))
    shared = [f"0.{name}" for name, _ in model[0].named_buffers()]
    assert len(shared) == 4
    exactness = _exactness(model=model)
    exactness.observe(**{**NOTHING, "changed_buffers": shared})
    assert exactness.reasons == []
    exactness.observe(**{**NOTHING, "changed_buffers": [*shared, "1.running_mean"]})
    assert "1.running_mean" in exactness.reasons[0]


def test_ghost_batches_are_cut_by_rank():
    (reason,) = _exactness(model=nn.Sequential(SyncBatchNorm(2, ghost_size=4))).reasons
    assert "ghost batches" in reason


def test_what_is_known_from_the_job_needs_no_observation():
    assert "norm.kind is local" in _exactness("local").reasons[0]
    assert _exactness(task=_Coupling()).reasons == ["task: it compares samples with each other."]


def test_reasons_add_up_and_are_told_once():
    exactness = _exactness("local", _Coupling())
    for _ in range(2):  # a model that leaves parameters unused is observed twice
        exactness.observe(loss=_loss(adds_up=False), changed_buffers=["x"], draws_others=True, misfits={"drop"})
    assert len(exactness.reasons) == len(set(exactness.reasons)) == 6


def _state(**values):
    return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in values.items()}


def test_a_rehearsal_compares_each_tensor_by_its_own_size():
    first = _state(large=[1000.0, 2000.0], small=[0.001])
    assert _difference(first, _state(large=[1000.0, 2000.0], small=[0.001])) == 0
    assert _difference(first, _state(large=[1000.0, 2000.2], small=[0.001])) == pytest.approx(1e-4)
    assert _difference(first, _state(large=[1000.0, 2000.0], small=[0.0011])) == pytest.approx(0.1)


def test_a_rehearsal_takes_rounding_about_zero_for_zero():
    # A bias before a batch norm has no gradient but rounding, of which no two worlds agree on a digit.
    assert _difference(_state(bias=[1e-18, -3e-18]), _state(bias=[-2e-18, 4e-18])) < TOLERANCE


def test_a_rehearsal_does_not_take_a_nan_for_agreement():
    for values in (([float("nan")], [1.0]), ([1.0], [float("nan")])):
        first, second = (_state(weight=value) for value in values)
        assert _difference(first, second) > TOLERANCE


def test_a_rehearsal_leaves_out_counters_and_what_is_empty():
    first = {"count": torch.tensor(3), "none": torch.empty(0)}
    assert _difference(first, {"count": torch.tensor(4), "none": torch.empty(0)}) == 0
