"""The whole of a rank's work: steps, evaluations, checkpoints, and when to stop."""

import gc
import logging
import math
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from service.domain.journal import ExactnessFound, Metrics, Warned
from service.domain.rank_protocol import Finished, RankTask, Stepped
from service.training.channel import Channel
from service.training.checkpoint_delivery import CheckpointDelivery
from service.training.checkpoint_writer import CheckpointWriter
from service.training.checkpoints import read_checkpoint
from service.training.code import bring_code
from service.training.data import build_dataset
from service.training.errors import ChannelClosed, CheckpointFailed, NotExact, NotFinite, UnknownMetric
from service.training.export import export
from service.training.norm import has_batch_norm
from service.training.optimization import Patience
from service.training.rehearsal import rehearse
from service.training.step_result import StepResult
from service.training.tasks import build_task
from service.training.trainer import Trainer
from service.training.user_loop import run_train_function
from service.training.world import World

MAX_SKIPPED_IN_A_ROW = 100
"""Steps without an update after which a job that skips what is not finite ends all the same."""

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
    spec = task.spec
    bring_code(task)
    if spec.train_function is not None:
        return run_train_function(task, channel)
    # What is wrong on every rank is told by every rank, before any of them waits for the others.
    spec.batch_plan(task.world_size)
    uploads = {sha256: Path(path) for sha256, path in task.uploads.items()}
    dataset = build_dataset(spec.dataset, seed=spec.seed, uploads=uploads)
    learned = build_task(spec.task)
    world = World.join(task)
    verdict = rehearse(spec, dataset, learned, world)
    trainer = Trainer(spec=spec, dataset=dataset, task=learned, world=world)
    run = _Run(task, channel, trainer, world)
    try:
        return run.to_the_end(rehearsed=verdict)
    finally:
        trainer.close()


class _Run:
    def __init__(self, task: RankTask, channel: Channel, trainer: Trainer, world: World) -> None:
        self._task = task
        self._channel = channel
        self._trainer = trainer
        self._world = world
        self._reports = world.rank == 0
        self._metrics: dict[str, float] = {}  # of the last step, for its checkpoint
        self._patience = Patience()
        self._num_skipped = self._num_skipped_in_a_row = 0
        self._writer = CheckpointWriter(task)
        self._delivery = CheckpointDelivery(self._writer, channel, task.spec.checkpoint.on_failure)
        self._longest_wait_s = task.collective_timeout_s / 2

    def to_the_end(self, *, rehearsed: str | None) -> Finished:
        trainer = self._trainer
        if self._task.resume_dir is not None:
            self._resume(Path(self._task.resume_dir), self._task.resume_job_id or self._task.job_id)
        _describe(self._task, trainer, self._world)
        self._warn()
        first, last = trainer.steps_done + 1, trainer.num_steps
        if first <= last:
            trainer.settle()
            self._tell_exactness(rehearsed)
        gc.collect()  # the rest stays for good
        gc.freeze()  # what exists by now stays; looking through it again and again took 3 % of a step
        try:
            with self._writer:
                return self._take_steps(first, last)
        except BaseException:
            # What has been written by now saves the next attempt its steps.
            with suppress(CheckpointFailed, ChannelClosed):
                self._delivery.deliver_written()
            raise

    def _take_steps(self, first: int, last: int) -> Finished:
        trainer, spec = self._trainer, self._task.spec
        step, note = trainer.steps_done, self._why_early(trainer.steps_done)
        while step < last and not note:
            result = trainer.step(stop=self._channel.stop_requested())
            step += 1
            self._report_step(step, result)
            if step == first:
                self._channel.send(Stepped(num_steps=last))
            if step == last:
                self._evaluate_at_the_end(step)
            elif spec.evaluation.every_steps and step % spec.evaluation.every_steps == 0:
                note = self._judge(step, self._evaluate(step))
                if note and spec.norm.recalibrate is not None:
                    self._evaluate_at_the_end(step)
            if result.stop and step < last and not note:
                self._finish_checkpoints(step, exporting=False)
                return Finished(step=step, stopped=True)
            if step < last and not note and step % spec.checkpoint.every_steps == 0:
                self._checkpoint(step)
            self._delivery.deliver_written()
        if step >= first:
            self._finish_checkpoints(step, exporting=True)
        _log.info("finished at step %d of %d. %s", step, last, note)
        return Finished(step=step, stopped=False, note=note if step < last else "")

    def _resume(self, directory: Path, job_id: str) -> None:
        checkpoint = read_checkpoint(directory, job_id=job_id)
        self._trainer.restore(checkpoint)
        self._num_skipped = checkpoint.state.get("num_skipped", 0)
        if "early_stopping" in checkpoint.state and job_id == self._task.job_id:  # a fork begins with new patience
            self._patience = Patience.from_state_dict(checkpoint.state["early_stopping"])

    def _warn(self) -> None:
        kind, world = self._task.spec.norm.kind, self._world
        if not self._reports:
            return
        if kind == "local" and world.size > 1:
            self._channel.send(
                Warned(
                    message=f"norm.kind is local: each of the {world.size} workers normalizes its own samples, so the "
                    "result depends on their number. norm.kind: sync makes it independent of it."
                )
            )
        if kind in ("sync", "frozen") and not has_batch_norm(self._trainer.model):
            message = f"norm.kind: {kind} has nothing to do: the model has no BatchNorm layer."
            self._channel.send(Warned(message=message))

    def _tell_exactness(self, rehearsed: str | None) -> None:
        reasons = tuple(self._trainer.exactness.reasons)
        if reasons and self._task.spec.exactness.require:
            raise NotExact(f"exactness.require: the result would depend on the number of workers. {' '.join(reasons)}")
        if self._reports:
            self._channel.send(ExactnessFound(exact=not reasons, reasons=reasons, rehearsed=rehearsed))

    def _report_step(self, step: int, result: StepResult) -> None:
        self._metrics = {}
        values = result.metrics
        if result.is_finite:
            self._num_skipped_in_a_row = 0
        else:
            self._num_skipped += 1
            self._num_skipped_in_a_row += 1
        if self._num_skipped:
            values["train/skipped_steps"] = float(self._num_skipped)
        self._report(step, values)
        if not result.is_finite:
            self._judge_nonfinite(step, result)

    def _judge_nonfinite(self, step: int, result: StepResult) -> None:
        spec = self._task.spec
        what = (
            f"step {step}: the loss is {result.loss}, the norm of its gradient {result.gradient_norm}; {result.cause}. "
        )
        remedy = "Lower optimizer.learning_rate, lengthen schedule.warmup_steps or set gradient_clip_norm"
        remedy += "." if spec.precision in ("float32", "float64") else ", or train in float32."
        if spec.nonfinite == "stop" or result.is_hopeless:
            raise NotFinite(what + remedy)
        if self._num_skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NotFinite(f"{what}So were the {MAX_SKIPPED_IN_A_ROW} steps up to it. {remedy}")
        if self._reports and self._num_skipped == 1 and spec.precision != "float16":
            self._channel.send(Warned(message=f"{what}The step is skipped, as will be others like it."))

    def _evaluate_at_the_end(self, step: int) -> None:
        recalibrated = self._task.spec.norm.recalibrate
        if recalibrated is not None:
            self._trainer.recalibrate(recalibrated)
        self._evaluate(step)

    def _evaluate(self, step: int) -> Mapping[str, float]:
        values = self._trainer.evaluate()
        if values:
            _log.info("step %d: %s", step, ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
            self._report(step, values)
        return values

    def _judge(self, step: int, values: Mapping[str, float]) -> str:
        """Say why to end early after an evaluation, if there is a reason."""
        spec = self._task.spec.early_stopping
        if spec is None:
            return ""
        if spec.metric not in values and self._patience.best is None:
            known = ", ".join(sorted(values)) or "nothing, since no samples are held out"
            raise UnknownMetric(f"early_stopping.metric: {spec.metric} is none of what is evaluated: {known}.")
        # One that is not defined this time is no improvement.
        self._patience = self._patience.after(values.get(spec.metric, math.nan), spec)
        return self._why_early(step)

    def _why_early(self, step: int) -> str:
        spec = self._task.spec.early_stopping
        if spec is None or not self._patience.is_over(spec):
            return ""
        return f"Stopped early at step {step}: {spec.metric} has not improved for {spec.patience} evaluations."

    def _report(self, step: int, values: Mapping[str, float]) -> None:
        self._metrics.update({name: value for name, value in values.items() if math.isfinite(value)})
        if self._reports:
            self._channel.send_soon(Metrics.of(step, values))

    def _checkpoint(self, step: int) -> None:
        if not self._reports:
            return
        if not self._writer.wait_until_free(self._longest_wait_s):
            # The other ranks wait for this one, and not for ever.
            self._channel.send(
                Warned(message=f"The checkpoint of step {step} is left out: the one before it is still being written.")
            )
            return
        self._save(step)

    def _save(self, step: int, *, extra_dir: Path | None = None) -> None:
        checkpoint = self._trainer.capture()
        checkpoint.state["num_skipped"] = self._num_skipped
        if self._task.spec.early_stopping is not None:
            checkpoint.state["early_stopping"] = self._patience.state_dict()
        held_up_s = self._writer.save(checkpoint, self._metrics, extra_dir=extra_dir)
        _log.info("step %d: checkpoint, %.3f s", step, held_up_s)

    def _finish_checkpoints(self, step: int, *, exporting: bool) -> None:
        """Write the last checkpoint, and the files for other programs beside it."""
        # From here on no rank needs another one; the first may take its time.
        self._world.await_all()
        if not self._reports:
            return
        formats = self._task.spec.export if exporting else ()
        with tempfile.TemporaryDirectory(prefix="export-") as directory:
            if formats:
                self._export(Path(directory))
            self._save(step, extra_dir=Path(directory) if formats else None)
            self._delivery.deliver_all()

    def _export(self, directory: Path) -> None:
        with self._trainer.averaged():
            exported = export(self._trainer.model, self._task.spec.export, self._trainer.example_input(), directory)
        for warning in exported.warnings:
            self._channel.send(Warned(message=warning))


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
        "mini-batch of %d in %d micro-step(s) of %d group(s) over the ranks: %s",
        plan.size,
        plan.num_micro_steps,
        plan.num_groups,
        " + ".join(str(count) for count in plan.counts),
    )
    _log.info("steps %d to %d", trainer.steps_done + 1, trainer.num_steps)
