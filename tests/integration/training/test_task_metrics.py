"""Metrics and loss scaling over several ranks, one of them empty. A failure here is a state that does not add up, or
ranks that do not agree. What a metric is, the unit tests say."""

import math

import pytest
import torch
import torch.distributed as dist

from service.domain.spec import ClassificationTask, CustomTask, DetectionTask, RegressionTask, SegmentationTask
from service.training.models.detector import Detector
from service.training.optimization import LossScaler
from service.training.tasks import build_task
from tests.ranks import run_ranks

CPU = torch.device("cpu")
SHARES = ((0, 5), (5, 5), (5, 8))
"""Which of the 8 samples each of 3 ranks evaluates."""


class Bias:
    def loss(self, outputs, targets):
        return (outputs - targets).abs().sum(), len(targets)

    def metrics(self, outputs, targets):
        return {"bias": ((outputs - targets).double().sum(), len(targets))}


def samples(name):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    if name == "classification":
        return ClassificationTask(), draw(8, 11), torch.randint(11, (8,), generator=generator), 11
    if name == "segmentation":
        masks = torch.randint(3, (8, 4, 4), generator=generator)
        masks[5:] = 255  # the last rank has samples, and nothing that counts
        return SegmentationTask(name="segmentation"), draw(8, 3, 4, 4), masks, 3
    if name == "regression":
        return RegressionTask(name="regression"), draw(8, 2), 50 + draw(8, 2), 2
    if name == "custom":
        return CustomTask(factory=f"{__name__}:Bias"), draw(8, 1), draw(8, 1), 1
    outputs = {"scores": draw(8, 2, 3, 3), "boxes": 4 + draw(8, 4, 3, 3).abs()}
    boxes = torch.tensor([[1.0, 1, 13, 12], [8, 6, 22, 20]])
    targets = [{"boxes": boxes[: place % 3], "labels": torch.tensor([0, 1])[: place % 3]} for place in range(8)]
    return DetectionTask(name="detection"), outputs, targets, 2


def evaluate(name, start, end, world_sum, world_gather):
    spec, outputs, targets, num_outputs = samples(name)
    task = build_task(spec)
    task.prepare(Detector(in_channels=1, num_outputs=2, stride=8, width=2, num_blocks=0, head_depth=0))
    metrics = task.new_metrics(num_outputs=num_outputs, device=CPU)
    for place in range(start, end, 2):
        rows = slice(place, min(place + 2, end))
        part = {key: value[rows] for key, value in outputs.items()} if isinstance(outputs, dict) else outputs[rows]
        with torch.inference_mode():
            metrics.update(part, targets[rows])
    return metrics.compute(world_sum, world_gather)


def all_sum(values):
    assert values.dtype == torch.float64
    assert values.ndim == 1
    dist.all_reduce(values)
    return values


def all_gather(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def evaluate_share(rank, name):
    return evaluate(name, *SHARES[rank], all_sum, all_gather)


@pytest.mark.parametrize("name", ["classification", "segmentation", "detection", "regression", "custom"])
def test_three_ranks_get_what_one_gets(name):
    expected = evaluate(name, 0, 8, lambda values: values, lambda value: [value])
    assert expected
    assert all(math.isfinite(value) and value != 0 for value in expected.values())
    first, *others = run_ranks(3, evaluate_share, name)
    assert others == [first, first]
    # Counts are whole numbers; sums of floats are merged in another order.
    assert first == pytest.approx(expected, rel=1e-12 if name in ("regression", "custom") else 0)


def unscale(rank):
    scaler = LossScaler(initial_scale=4.0)
    finite = scaler.unscale_([torch.full((3,), 8.0)], world_sum=all_sum)
    overflowed = scaler.unscale_([torch.tensor([1.0, math.inf if rank == 1 else 1.0])], world_sum=all_sum)
    return finite, overflowed


def test_an_overflow_on_one_rank_is_all_ranks():
    assert run_ranks(3, unscale) == [(True, False)] * 3
