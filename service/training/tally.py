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


def tally(losses: Sequence[Loss], *, stop: bool, world: World) -> Tally:
    """Add up the losses of a step; the only wait for the device in it. All ranks call it together.

    Args:
        losses: of this rank's micro-steps; all ranks name the same metrics.
        stop: whether this rank wants to stop.
        world: the ranks.
    """
    names = sorted({name for loss in losses for name in loss.metrics})
    none = Ratio(sum=0.0, weight=0.0)
    rows: list[Sequence[torch.Tensor | float]] = [
        [value for name in names for value in _parts(loss.metrics.get(name, none))] for loss in losses
    ]
    values = [_total([loss.sum.detach() for loss in losses], world), _total([loss.weight for loss in losses], world)]
    values += [_total(column, world) for column in zip(*rows, strict=True)]
    values.append(torch.tensor(float(stop), dtype=torch.float64, device=world.device))
    loss, weight, *sums, num_stopping = world.sum_tensor(torch.stack(values)).tolist()
    pairs = zip(names, sums[::2], sums[1::2], strict=True)
    return Tally(
        loss=loss / (weight or 1.0),
        weight=weight,
        means={name: total / divisor for name, total, divisor in pairs if divisor},
        num_stopping=round(num_stopping),
    )


def _parts(ratio: Ratio) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    return ratio.sum, ratio.weight


def _total(values: Sequence[torch.Tensor | float], world: World) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for value in values:
        total += value
    return total
