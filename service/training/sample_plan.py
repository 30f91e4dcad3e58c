"""Which samples each step trains on, and which of them each rank computes when."""

import sys

import numpy as np
from numpy.typing import NDArray

from service.domain.batch_plan import BatchPlan
from service.domain.spec import JobSpec
from service.training.data import Source, Stream
from service.training.errors import DatasetError
from service.training.sampling import SampleOrder


class SamplePlan:
    """The sample order of a job, shared out to the ranks of a world.

    Args:
        spec: the job.
        samples: what it trains on.
        world_size: number of ranks.

    Attributes:
        num_steps: of the whole job.
        full: how a whole mini-batch is shared.
        tail: how an epoch's last, partial one is; None where there is none.

    Raises:
        NoPlan: this world cannot compute the job's batches.
        DatasetError: there are too few samples, or a number of epochs of a stream whose length nobody knows.
    """

    num_steps: int
    full: BatchPlan
    tail: BatchPlan | None

    def __init__(self, spec: JobSpec, samples: Source | Stream, world_size: int) -> None:
        num_samples = samples.num_samples if isinstance(samples, Stream) else len(samples)
        if num_samples is not None and num_samples < spec.batch.size:
            raise DatasetError(
                f"batch.size: {spec.batch.size} is more than the {num_samples} training samples. Use at most so many."
            )
        if num_samples is None and spec.steps is None:
            raise DatasetError("epochs: the dataset is a stream of unknown length. Give steps instead.")
        self.full = spec.batch_plan(world_size)
        self.tail = None if num_samples is None else spec.tail_plan(world_size, num_samples)
        self._order = SampleOrder(
            # A stream of unknown length is one endless epoch.
            num_samples=sys.maxsize if num_samples is None else num_samples,
            batch_size=spec.batch.size,
            seed=spec.seed,
            drop_last=spec.batch.drop_last,
            shuffled=not isinstance(samples, Stream),
        )
        self.num_steps = spec.steps if spec.steps is not None else (spec.epochs or 0) * self._order.steps_per_epoch

    @property
    def plans(self) -> tuple[BatchPlan, ...]:
        """All that a step may follow."""
        return (self.full,) if self.tail is None else (self.full, self.tail)

    def plan(self, step: int) -> BatchPlan:
        """Return how the mini-batch after ``step`` optimizer steps is shared."""
        is_last = (step + 1) % self._order.steps_per_epoch == 0
        return self.tail if self.tail is not None and is_last else self.full

    @property
    def steps_per_epoch(self) -> int:
        """Mini-batches in an epoch."""
        return self._order.steps_per_epoch

    def num_micro_steps(self, step: int) -> int:
        """Return the micro-steps of the optimizer step after ``step`` of them."""
        return self.plan(step).num_micro_steps

    def epoch(self, step: int) -> int:
        """Return the epoch of the mini-batch after ``step`` optimizer steps, from 0."""
        return step // self._order.steps_per_epoch

    def rows(self, step: int, micro_step: int, rank: int) -> NDArray[np.int64]:
        """Return the numbers of the samples that a rank computes in a micro-step."""
        return self._order.minibatch(step)[self.plan(step).rank_slice(micro_step, rank)]
