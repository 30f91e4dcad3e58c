"""The sums of a step: what the micro-steps of all ranks add up to, in one exchange."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from service.training.tasks import Loss, Ratio
from service.training.world import World


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Of a mini-batch, over all ranks.

    Attributes:
        loss: sum over weight; 0 where the weight is zero.
        weight: samples, boxes or valid pixels.
        means: of the task's metrics; those without any weight are left out.
        num_stopping: ranks that want to stop.
    """

    loss: float
    weight: float
    means: dict[str, float]
    num_stopping: int


_NOTHING = Ratio(sum=0.0, weight=0.0)


def tally(losses: Sequence[Loss], *, stop: bool, world: World) -> Tally:
    """Add up the losses of a step; the only wait for the device in it. All ranks call it together.

    Args:
        losses: of this rank's micro-steps; all ranks name the same metrics.
        stop: whether this rank wants to stop.
        world: the ranks.
    """
    names = sorted({name for loss in losses for name in loss.metrics})
    ratios = [[loss.metrics.get(name, _NOTHING) for loss in losses] for name in names]
    columns: list[list[torch.Tensor | float]] = [
        [loss.sum.detach() for loss in losses],
        [loss.weight for loss in losses],
    ]
    for of_all in ratios:
        columns += [[ratio.sum for ratio in of_all], [ratio.weight for ratio in of_all]]
    columns.append([float(stop)])
    loss, weight, *sums, num_stopping = world.sum_tensor(_totals(columns, world.device)).tolist()
    pairs = zip(names, sums[::2], sums[1::2], strict=True)
    return Tally(
        loss=loss / (weight or 1.0),
        weight=weight,
        means={name: total / divisor for name, total, divisor in pairs if divisor},
        num_stopping=round(num_stopping),
    )


def _totals(columns: Sequence[Sequence[torch.Tensor | float]], device: torch.device) -> torch.Tensor:
    """Add up each column, float64 (n,) on the device."""
    if device.type == "cpu":  # nothing to wait for, and an operator takes longer than a sum
        return torch.tensor([sum(map(float, column)) for column in columns], dtype=torch.float64)
    return torch.stack(
        [
            torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in column]).sum()
            for column in columns
        ]
    )
