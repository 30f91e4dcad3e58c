"""The learning rate of each step."""

import math

from service.domain.spec import ScheduleSpec


def learning_rate_factor(schedule: ScheduleSpec, *, step: int, num_steps: int) -> float:
    """Return what the base learning rate is multiplied by.

    It rises in ``warmup_steps`` equal stairs to 1. Then, with t going from 0 at the top to 1 at the last step, and
    f = ``final_fraction``, it is

    - constant: 1;
    - cosine: f + (1 − f)(1 + cos πt)/2 (Loshchilov & Hutter 2017, equation 5);
    - linear: f + (1 − f)(1 − t);
    - polynomial: f + (1 − f)(1 − t)^power (Liu et al. 2016, "poly");
    - step: gamma^n after n of the milestones, which count steps from the start of the job.

    Args:
        schedule: which of them.
        step: optimizer steps done before this one.
        num_steps: of the whole job.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "step":
        return schedule.gamma ** sum(step >= milestone for milestone in schedule.milestones)
    peak, last = max(schedule.warmup_steps - 1, 0), num_steps - 1
    if last == peak:
        return 1.0
    progress = (step - peak) / (last - peak)
    if schedule.name == "cosine":
        remaining = (1 + math.cos(math.pi * progress)) / 2
    elif schedule.name == "linear":
        remaining = 1 - progress
    else:
        remaining = (1 - progress) ** schedule.power
    return schedule.final_fraction + (1 - schedule.final_fraction) * remaining
