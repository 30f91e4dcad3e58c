"""The model and the optimizer of a rank, and what one step does to them."""

import math
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from service.domain.batch_plan import BatchPlan
from service.domain.spec import JobSpec
from service.training.checkpoints import Checkpoint
from service.training.datasets import Dataset
from service.training.evaluation import evaluate
from service.training.models import build_model, configure_norm
from service.training.optimizers import build_optimizer, learning_rate_factor
from service.training.precision import autocast, parameter_dtype
from service.training.sampling import SampleOrder, derive_seed
from service.training.tasks import Loss, classification_loss
from service.training.world import World


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What all ranks know after a step; the same on each of them, but for its time.

    Attributes:
        loss: mean over the mini-batch.
        accuracy: likewise.
        learning_rate: of this step.
        gradient_norm: L2, before clipping.
        time_s: on this rank.
        stop: whether any rank wants to stop here.
    """

    loss: float
    accuracy: float
    learning_rate: float
    gradient_norm: float
    time_s: float
    stop: bool

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient are numbers; if not, the step changed no weight."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)

    @property
    def metrics(self) -> dict[str, float]:
        """The values by their names in the training curves."""
        return {
            "train/loss": self.loss,
            "train/accuracy": self.accuracy,
            "train/learning_rate": self.learning_rate,
            "train/gradient_norm": self.gradient_norm,
            "train/step_time_s": self.time_s,
        }


class Trainer:
    """Takes optimizer steps together with the other ranks.

    Args:
        spec: the job.
        dataset: what it names.
        world: the ranks; their number may differ from ``spec.workers``.
        loss_of: of outputs and targets; it adds up over samples.

    Attributes:
        model: the network, not wrapped.
        plan: which part of a mini-batch each rank computes.
        num_steps: of the whole job.
        steps_done: so far.

    Raises:
        NoPlan: this world cannot compute the job's batch.
    """

    model: nn.Module
    plan: BatchPlan
    num_steps: int
    steps_done: int

    def __init__(
        self,
        *,
        spec: JobSpec,
        dataset: Dataset,
        world: World,
        loss_of: Callable[[torch.Tensor, torch.Tensor], Loss] = classification_loss,
    ) -> None:
        self._spec = spec
        self._loss_of = loss_of
        self._dataset = dataset
        self._world = world
        self._dtype = parameter_dtype(spec.precision)
        self.plan = spec.batch_plan(world.size)
        self._order = SampleOrder(num_samples=len(dataset.training), batch_size=spec.batch.size, seed=spec.seed)
        self.num_steps = spec.steps if spec.steps is not None else (spec.epochs or 0) * self._order.steps_per_epoch
        self.steps_done = 0
        model = build_model(
            spec.model,
            input_shape=tuple(dataset.training.inputs.shape[1:]),
            num_classes=dataset.num_classes,
            seed=spec.seed,
        )
        self.model = configure_norm(model, spec.norm).to(device=world.device, dtype=self._dtype)
        self._optimizer = build_optimizer(spec.optimizer, self.model.parameters())
        self._parallel = _wrap(self.model)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go to where a checkpoint was taken."""
        self.model.load_state_dict(checkpoint.model)
        self._optimizer.load_state_dict(checkpoint.optimizer)
        self.steps_done = checkpoint.step

    def capture(self) -> Checkpoint:
        """Return the present state; its tensors are the live ones."""
        return Checkpoint(step=self.steps_done, model=self.model.state_dict(), optimizer=self._optimizer.state_dict())

    def settle(self) -> None:
        """Let DDP arrange its gradient buckets before the first step; call it once, on all ranks.

        DDP regroups its buckets after the first backward, in the order in which gradients became ready, and keeps
        them from then on. gloo adds up in an order that depends on a value's place in the bucket. So a process's
        first step would sum in another order than its later ones, and a resumed job would differ from an
        undisturbed one in the last bits. Here a forward and a backward are spent on it, which leave no trace.
        """
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        self._accumulate(micro_step=self.plan.num_micro_steps - 1)  # the one that DDP reduces after
        self._optimizer.zero_grad()
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)

    def step(self, *, stop: bool = False) -> StepResult:
        """Take the next optimizer step.

        Args:
            stop: whether this rank wants to stop after it.
        """
        started = time.perf_counter()
        spec, world = self._spec, self._world
        learning_rate = spec.optimizer.learning_rate * learning_rate_factor(
            spec.schedule, step=self.steps_done, num_steps=self.num_steps
        )
        # Whatever a model draws is then a function of (seed, step, rank), before and after a resume.
        torch.manual_seed(derive_seed(seed=spec.seed, purpose=f"rank {world.rank}", index=self.steps_done))

        self._optimizer.zero_grad()
        losses = [self._accumulate(micro_step=micro_step) for micro_step in range(self.plan.num_micro_steps)]
        loss_sum, weight, num_correct, num_stopping = world.sum(
            [
                sum(float(loss.sum) for loss in losses),
                sum(loss.weight for loss in losses),
                sum(loss.num_correct for loss in losses),
                float(stop),
            ]
        )
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        if weight != self.plan.size:
            for gradient in gradients:
                gradient.mul_(self.plan.size / weight)
        norm = torch.nn.utils.get_total_norm(gradients)
        result = StepResult(
            loss=loss_sum / weight,
            accuracy=num_correct / weight,
            learning_rate=learning_rate,
            gradient_norm=float(norm),
            time_s=time.perf_counter() - started,
            stop=num_stopping > 0,
        )
        if result.is_finite:
            if spec.gradient_clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), spec.gradient_clip_norm, norm)
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
        self.steps_done += 1
        return result

    def evaluate(self) -> dict[str, float]:
        """Evaluate the held-out samples with running statistics."""
        if self._spec.norm.kind == "local":  # every rank has its own; those of the checkpoints count
            self._world.take_buffers_of_first_rank(self.model)
        return evaluate(
            self.model,
            self._dataset.held_out,
            loss_of=self._loss_of,
            batch_size=self._spec.evaluation.batch_size,
            precision=self._spec.precision,
            world=self._world,
        )

    def _accumulate(self, *, micro_step: int) -> Loss:
        world = self._world
        rows = self._order.minibatch(self.steps_done)[self.plan.rank_slice(micro_step, world.rank)]
        inputs, targets = self._dataset.training.select(rows, device=world.device, dtype=self._dtype)
        is_last = micro_step == self.plan.num_micro_steps - 1
        with nullcontext() if is_last else self._parallel.no_sync():
            with autocast(self._spec.precision, world.device):
                outputs = self._parallel(inputs)
            loss = self._loss_of(outputs, targets)
            # DDP divides by the number of ranks what it sums over them.
            (loss.sum * (world.size / self.plan.size)).backward()  # type: ignore[no-untyped-call]
        return replace(loss, sum=loss.sum.detach())


def _wrap(model: nn.Module) -> DistributedDataParallel:
    with warnings.catch_warnings():
        # torch 2.13 renames the argument; the old name is what earlier releases know.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.* is deprecated", category=FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False)
