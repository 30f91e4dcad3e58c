"""The whole of a rank's work: steps, evaluations, checkpoints, and when to stop."""

import gc
import logging
import math
from pathlib import Path

from service.domain.journal import Metrics, Warned
from service.domain.rank_protocol import Finished, RankTask, Staged, Stepped
from service.training.channel import Channel
from service.training.checkpoints import read_checkpoint, write_checkpoint
from service.training.datasets import build_dataset
from service.training.errors import NotFinite
from service.training.trainer import StepResult, Trainer
from service.training.world import World

_log = logging.getLogger(__name__)


def train(task: RankTask, channel: Channel) -> Finished:
    """Do what a task asks for, reporting on the way.

    Args:
        task: of this rank.
        channel: to the rank actor.

    Returns:
        The last message, to be sent once the process group is left behind.

    Raises:
        TrainingError: see ``service.training.errors``.
        RuntimeError: from a collective, see ``is_collective_failure``.
        Exception: whatever a model, a dataset or an optimizer raises.
    """
    # What is wrong on every rank is told by every rank, before any of them waits for the others.
    task.spec.batch_plan(task.world_size)
    dataset = build_dataset(task.spec.dataset)
    world = World.join(task)
    trainer = Trainer(spec=task.spec, dataset=dataset, world=world)
    if task.resume_dir is not None:
        trainer.restore(read_checkpoint(Path(task.resume_dir), job_id=task.job_id))
    _describe(task, trainer, world)
    if task.spec.norm.kind == "local" and world.size > 1 and world.rank == 0:
        channel.send(
            Warned(
                message=f"norm.kind is local: each of the {world.size} workers normalizes its own samples, so the "
                "result depends on their number. norm.kind: sync makes it independent of it."
            )
        )
    finished = _Run(task, channel, trainer, world).to_the_end()
    world.await_all()
    _log.info("finished at step %d of %d%s", finished.step, trainer.num_steps, ", stopped" if finished.stopped else "")
    return finished


class _Run:
    def __init__(self, task: RankTask, channel: Channel, trainer: Trainer, world: World) -> None:
        self._task = task
        self._channel = channel
        self._trainer = trainer
        self._reports = world.rank == 0
        self._metrics: dict[str, float] = {}  # of the last step, for its checkpoint

    def to_the_end(self) -> Finished:
        trainer, spec = self._trainer, self._task.spec
        first, last = trainer.steps_done + 1, trainer.num_steps
        if first <= last:
            trainer.settle()
        gc.freeze()  # what exists by now stays; looking through it again and again took 3 % of a step
        for step in range(first, last + 1):
            result = trainer.step(stop=self._channel.stop_requested())
            self._report_step(step, result)
            if step == first:
                self._channel.send(Stepped(num_steps=last))
            if step == last or (spec.evaluation.every_steps and step % spec.evaluation.every_steps == 0):
                self._evaluate(step)
            if step == last or result.stop or step % spec.checkpoint.every_steps == 0:
                self._checkpoint(step)
            if result.stop and step < last:
                return Finished(step=step, stopped=True)
        return Finished(step=last, stopped=False)

    def _report_step(self, step: int, result: StepResult) -> None:
        self._metrics = {}
        self._report(step, result.metrics)
        if not result.is_finite:
            raise NotFinite(
                f"step {step}: the loss is {result.loss}, the norm of its gradient {result.gradient_norm}. Lower "
                "optimizer.learning_rate, lengthen schedule.warmup_steps or set gradient_clip_norm"
                + (", or train in float32." if self._task.spec.precision == "bfloat16" else ".")
            )

    def _evaluate(self, step: int) -> None:
        values = self._trainer.evaluate()
        _log.info("step %d: %s", step, ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
        self._report(step, values)

    def _report(self, step: int, values: dict[str, float]) -> None:
        self._metrics.update({name: value for name, value in values.items() if math.isfinite(value)})
        if self._reports:
            self._channel.send(Metrics.of(step, values))

    def _checkpoint(self, step: int) -> None:
        if not self._reports:
            return
        directory = write_checkpoint(self._trainer.capture(), self._task, self._metrics)
        _log.info("step %d: checkpoint in %s", step, directory)
        self._channel.send(Staged(step=step, directory=str(directory), metrics=self._metrics))


def _describe(task: RankTask, trainer: Trainer, world: World) -> None:
    plan = trainer.plan
    _log.info(
        "job %s, attempt %d: rank %d of %d on %s, %d thread(s)",
        task.job_id,
        task.attempt,
        world.rank,
        world.size,
        world.device,
        task.num_threads,
    )
    _log.info(
        "model %s: %d parameters, %s, norm %s",
        task.spec.model.factory,
        sum(parameter.numel() for parameter in trainer.model.parameters()),
        task.spec.precision,
        task.spec.norm.kind,
    )
    _log.info(
        "mini-batch of %d in %d micro-step(s) of %d over the ranks: %s",
        plan.size,
        plan.num_micro_steps,
        plan.normalization_size,
        " + ".join(str(count) for count in plan.counts),
    )
    _log.info("steps %d to %d", trainer.steps_done + 1, trainer.num_steps)
