"""The builtin optimizers, and the learning rate of each step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from service.domain.spec import OptimizerSpec, ScheduleSpec, SgdSpec


def build_optimizer(spec: OptimizerSpec, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Build the optimizer that a specification names."""
    if isinstance(spec, SgdSpec):
        return torch.optim.SGD(
            parameters,
            lr=spec.learning_rate,
            momentum=spec.momentum,
            nesterov=spec.nesterov,
            weight_decay=spec.weight_decay,
        )
    return torch.optim.AdamW(
        parameters, lr=spec.learning_rate, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay
    )


def learning_rate_factor(schedule: ScheduleSpec, *, step: int, num_steps: int) -> float:
    """Return what the base learning rate is multiplied by.

    It rises in ``warmup_steps`` equal stairs to 1, then stays there or follows half a cosine (Loshchilov & Hutter
    2017, equation 5) down to ``final_fraction`` at the last step.

    Args:
        schedule: which of them.
        step: optimizer steps done before this one.
        num_steps: of the whole job.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    peak, last = max(schedule.warmup_steps - 1, 0), num_steps - 1
    if schedule.name == "constant" or last == peak:
        return 1.0
    progress = (step - peak) / (last - peak)
    return schedule.final_fraction + (1 - schedule.final_fraction) * (1 + math.cos(math.pi * progress)) / 2
