"""How good a model is on the held-out samples."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from service.training.datasets import Samples
from service.training.precision import autocast, parameter_dtype
from service.training.tasks import Loss
from service.training.world import World


def evaluate(
    model: nn.Module,
    samples: Samples,
    *,
    loss_of: Callable[[torch.Tensor, torch.Tensor], Loss],
    batch_size: int,
    precision: Literal["float64", "float32", "bfloat16"],
    world: World,
) -> dict[str, float]:
    """Evaluate with running statistics; every rank takes its share, and all get the result.

    A batch holds the same samples in every world, and goes to one rank whole.

    Args:
        model: left in training mode.
        samples: non-empty.
        loss_of: of outputs and targets.
        batch_size: samples that a rank evaluates at once.
        precision: of the forward passes.
        world: the ranks that share the work.

    Returns:
        ``eval/loss`` and ``eval/accuracy``, means over the weight.
    """
    loss = weight = num_correct = 0.0
    model.eval()
    with torch.inference_mode(), autocast(precision, world.device):
        for start in range(world.rank * batch_size, len(samples), world.size * batch_size):
            rows = slice(start, start + batch_size)
            inputs, targets = samples.select(rows, device=world.device, dtype=parameter_dtype(precision))
            batch = loss_of(model(inputs), targets)
            loss += float(batch.sum)
            weight += batch.weight
            num_correct += batch.num_correct
    model.train()
    loss, weight, num_correct = world.sum([loss, weight, num_correct])
    return {"eval/loss": loss / weight, "eval/accuracy": num_correct / weight}
