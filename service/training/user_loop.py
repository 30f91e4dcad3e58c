"""A training loop of the job's own code, in place of the service's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from service.domain.batch_plan import BatchPlan
from service.domain.journal import ExactnessFound, Metrics, Warned
from service.domain.rank_protocol import Finished, RankTask, Stepped
from service.domain.spec import JobSpec
from service.training.channel import Channel
from service.training.checkpoint_delivery import CheckpointDelivery
from service.training.checkpoint_writer import CheckpointWriter
from service.training.checkpoints import Checkpoint, read_checkpoint
from service.training.errors import BadFactory
from service.training.factories import import_factory
from service.training.world import World


class TrainingContext:
    """What ``train_function`` is called with, on every rank.

    The default process group of ``torch.distributed`` is there: SyncBatchNorm, DDP and collectives work as anywhere.
    On every rank call ``report`` once a step, so that the job counts as running and its curves grow.

    Attributes:
        rank: of this process, from 0.
        world_size: number of ranks.
        device: where this rank computes.
        spec: the job.
        plan: how a mini-batch of ``spec.batch`` is shared: ``plan.rank_slice(micro_step, rank)``.
        seed: of the job.
        num_steps: of the job, where it says so.
        resumed_from: optimizer steps that were done when ``load`` was saved; 0 at the beginning.
        step: that was reported last.
        saved_step: that was saved last in this attempt, by the first rank; None before.
    """

    rank: int
    world_size: int
    device: torch.device
    spec: JobSpec
    plan: BatchPlan
    seed: int
    num_steps: int | None
    resumed_from: int
    step: int
    saved_step: int | None

    def __init__(
        self,
        task: RankTask,
        channel: Channel,
        world: World,
        writer: CheckpointWriter,
        delivery: CheckpointDelivery,
    ) -> None:
        self._task = task
        self._channel = channel
        self._world = world
        self._writer = writer
        self._delivery = delivery
        self._has_stepped = self._is_stopping = False
        self._values: dict[str, float] = {}
        self.saved_step = None
        self.rank, self.world_size, self.device = world.rank, world.size, world.device
        self.spec, self.seed, self.num_steps = task.spec, task.spec.seed, task.spec.steps
        self.plan = task.spec.batch_plan(world.size)
        self._loaded: Checkpoint | None = None
        if task.resume_dir is not None:
            self._loaded = read_checkpoint(Path(task.resume_dir), job_id=task.resume_job_id or task.job_id)
        self.resumed_from = 0 if self._loaded is None else self._loaded.step
        self.step = self.resumed_from

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Report metrics of a step; those of the first rank count.

        Args:
            step: optimizer steps done; grows from call to call.
            values: by name, such as ``train/loss``; the same over all ranks.
        """
        if step <= self.step and (self._has_stepped or self.resumed_from):
            raise BadFactory(f"train_function: it reported step {step} after step {self.step}. Steps have to grow.")
        self.step = step
        self._values = {name: float(value) for name, value in values.items()}
        if self.rank == 0:
            self._channel.send_soon(Metrics.of(step, self._values))
        if not self._has_stepped:
            self._has_stepped = True
            self._channel.send(Stepped(num_steps=self.num_steps))
        self._delivery.deliver_written()

    def save(self, model: Mapping[str, torch.Tensor], state: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint of the step that was reported last; the first rank's counts.

        There is one checkpoint of a step: saving again before the next is reported does nothing.

        Args:
            model: a ``state_dict``.
            state: whatever else the next step depends on: dictionaries, lists, numbers, strings and tensors.

        Raises:
            BadFactory: one of them holds something else.
        """
        if self.rank != 0 or self.step == self.saved_step:
            return
        checkpoint = Checkpoint(step=self.step, model=model, optimizer={}, state=dict(state or {}))
        finite = Metrics.of(self.step, self._values).values
        try:
            self._writer.save(checkpoint, finite)
        except BadFactory as error:
            raise BadFactory(f"train_function: context.save cannot keep what it was given. {error}") from error
        self.saved_step = self.step
        self._delivery.deliver_written()

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Return model and state as they were saved, on the CPU; None at the beginning."""
        if self._loaded is None:
            return None
        return dict(self._loaded.model), self._loaded.state

    def should_stop(self) -> bool:
        """Tell whether to save and return; the same on every rank, which call it together."""
        self._is_stopping = self._world.sum([float(self._channel.stop_requested())])[0] > 0
        return self._is_stopping

    @property
    def is_stopping(self) -> bool:
        """Whether ``should_stop`` said so."""
        return self._is_stopping


def run_train_function(task: RankTask, channel: Channel) -> Finished:
    """Run the training loop that the job names, on this rank.

    Args:
        task: of this rank.
        channel: to the rank actor.

    Raises:
        BadFactory: it cannot be imported, or never reported a step.
        Exception: whatever it raises.
    """
    assert task.spec.train_function is not None
    function = import_factory(task.spec.train_function, field="train_function")
    task.spec.batch_plan(task.world_size)
    reason = "train_function: the service cannot see what a training loop of your own does with its workers."
    world = World.join(task)
    with CheckpointWriter(task) as writer:
        delivery = CheckpointDelivery(writer, channel, task.spec.checkpoint.on_failure)
        context = TrainingContext(task, channel, world, writer, delivery)
        if world.rank == 0:
            channel.send(ExactnessFound(exact=False, reasons=(reason,)))
        function(context)
        world.await_all()
        delivery.deliver_all()
        if world.rank == 0 and context.resumed_from < context.step != context.saved_step:
            saved = f"only step {context.saved_step}" if context.saved_step else "no step"
            channel.send(
                Warned(
                    message=f"train_function: it ended after step {context.step}, and saved {saved} before. Call "
                    "context.save after the last one."
                )
            )
    # One that was resumed may have been done already.
    if context.step == context.resumed_from == 0 and not context.is_stopping:
        raise BadFactory("train_function: it returned without reporting a step. Call context.report(step, values).")
    stopped = context.is_stopping and (context.num_steps is None or context.step < context.num_steps)
    return Finished(step=context.step, stopped=stopped)
