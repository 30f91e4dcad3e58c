"""Where a step stopped being finite."""

from collections.abc import Sequence

import torch
from torch import nn

from service.training.tasks import Loss
from service.training.wording import first_of
from service.training.world import World


def where_not_finite(losses: Sequence[Loss], model: nn.Module, world: World) -> str:
    """Say which ranks' loss is not finite, or else which parameters' gradient. All ranks call it together.

    Args:
        losses: of this rank's micro-steps.
        model: with the gradients, which are the same on every rank.
        world: the ranks.

    Returns:
        In words, the same on every rank.
    """
    is_finite = all(bool(torch.isfinite(loss.sum)) for loss in losses)
    ranks = [rank for rank, finite in enumerate(world.gather(is_finite)) if not finite]
    if ranks:
        return f"the loss of rank {', '.join(map(str, ranks))} is not finite"
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
    ]
    if not names:
        return "the norm of the gradient overflows"
    return f"the loss is finite, the gradient of {first_of(names)} is not"
