"""The first steps of a job on two world sizes, compared."""

import gc
import logging
import math
from datetime import timedelta

import torch
import torch.distributed as dist

from service.domain.spec import JobSpec
from service.training.data import Dataset
from service.training.errors import NotExact
from service.training.sample_plan import SamplePlan
from service.training.tasks import Task
from service.training.trainer import Trainer
from service.training.world import World

TOLERANCE = 1e-9
"""Of the weights after the rehearsal, relative to the largest of their tensor, in float64: summation order alone makes
1e-13 in a few steps, a batch norm that sees another batch at least 1e-3."""

SMALLEST = 1e-6
"""A tensor without a value beyond it counts as zero: a bias that began at zero and that a batch norm follows holds
nothing but rounding, 1e-18, of which no two worlds agree on a digit."""

MAX_S = 600.0
"""How long ranks without a part in it wait for a rehearsal, at least."""

_log = logging.getLogger(__name__)


def rehearse(spec: JobSpec, dataset: Dataset, task: Task, world: World) -> str | None:
    """Run the first steps on two world sizes, as the specification asks for, and compare the weights.

    It is done in float64: in float32 training is chaotic, and a difference after some steps proves nothing.

    Args:
        spec: the job.
        dataset: what it names.
        task: what it learns.
        world: all ranks; they call it together.

    Returns:
        What it showed, in words, the same on every rank; None where it is not asked for.

    Raises:
        NotExact: the weights differ.
    """
    asked = spec.exactness.rehearse
    if asked is None:
        return None
    in_float64 = spec.model_copy(
        update={
            "precision": "float64",
            "compile": False,
            "diagnostics": spec.diagnostics.model_copy(update={"norm": False}),
        }
    )
    # Refused by all ranks alike, before any waits for another.
    plans = {size: SamplePlan(spec, dataset.training, size).plans for size in asked.worlds}
    waiting = dist.new_group(timeout=max(world.timeout, timedelta(seconds=MAX_S)))
    ends = []
    for size in asked.worlds:
        part = world.first_ranks(size, plans[size])
        ends.append({} if part is None else _weights_after(in_float64, dataset, task, part, asked.steps))
        gc.collect()  # the memory of a whole training
        dist.barrier(waiting)
    first, second = asked.worlds
    # The first rank took part in both.
    difference = world.gather(_difference(*ends) if world.rank == 0 else 0.0)[0]
    verdict = (
        f"Rehearsed {asked.steps} steps in float64 on {first} and on {second} worker(s): the weights differ by "
        f"{difference:.1e} of their size."
    )
    _log.info("%s", verdict)
    if difference > TOLERANCE:
        raise NotExact(
            f"exactness.rehearse: {verdict} More than {TOLERANCE:g} is no matter of summation order: something in the "
            "model or the loss depends on how samples are spread over workers. Remove it, or remove exactness.rehearse."
        )
    return verdict


def _weights_after(spec: JobSpec, dataset: Dataset, task: Task, world: World, steps: int) -> dict[str, torch.Tensor]:
    trainer = Trainer(spec=spec, dataset=dataset, task=task, world=world)
    trainer.settle()
    for _ in range(min(steps, trainer.num_steps)):
        trainer.step()
    end = {name: value.detach().cpu().clone() for name, value in trainer.model.state_dict().items()}
    trainer.close()
    return end


def _difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    largest = 0.0
    for name, value in first.items():
        if value.is_floating_point() and value.numel():
            scale = max(float(value.abs().max()), SMALLEST)
            difference = float((value - second[name]).abs().max()) / scale
            largest = max(largest, math.inf if math.isnan(difference) else difference)
    return largest
