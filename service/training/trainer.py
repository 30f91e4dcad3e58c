"""The model and the optimizer of a rank, and what one step does to them."""

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from service.domain.batch_plan import BatchPlan
from service.domain.spec import JobSpec
from service.training.activation_checkpointing import checkpoint_activations
from service.training.checkpoints import Checkpoint
from service.training.data import Batch, Dataset, Loader, build_augmentations
from service.training.diagnostics import Diagnostics
from service.training.dropout import DropoutContext, share_dropout
from service.training.errors import BadFactory, CheckpointMismatch
from service.training.evaluation import Evaluator
from service.training.exactness import Exactness
from service.training.layout import memory_format, on_device, to_format
from service.training.models import build_model
from service.training.nonfinite import where_not_finite
from service.training.norm import NormalizationGroups, configure_norm
from service.training.optimization import Ema, GradientNoise, LossScaler, build_optimizer, learning_rate_factor
from service.training.precision import autocast, parameter_dtype
from service.training.sample_plan import SamplePlan
from service.training.sampling import derive_seed
from service.training.step_result import StepResult
from service.training.tally import tally
from service.training.tasks import Loss, Task
from service.training.world import World
from syncbn import recalibrate


class Trainer:
    """Takes optimizer steps together with the other ranks.

    Args:
        spec: the job.
        dataset: what it names.
        task: what it learns.
        world: the ranks; their number may differ from what was asked for.

    Attributes:
        model: the network, not wrapped.
        samples: which of them each step trains on, and who computes which.
        exactness: whether the result depends on the number of ranks, once ``settle`` was called.
        steps_done: so far.

    Raises:
        NoPlan: this world cannot compute the job's batch.
        TrainingError: model or dataset do not fit the job.
    """

    model: nn.Module
    samples: SamplePlan
    exactness: Exactness
    steps_done: int

    def __init__(self, *, spec: JobSpec, dataset: Dataset, task: Task, world: World) -> None:
        self._spec = spec
        self._task = task
        self._dataset = dataset
        self._world = world
        self.samples = SamplePlan(spec, dataset.training, world.size)
        self.steps_done = 0
        self._loader = Loader(
            dataset.training,
            rows=lambda step, micro_step: self.samples.rows(step, micro_step, world.rank),
            num_micro_steps=self.samples.num_micro_steps,
            epoch_of=self.samples.epoch,
            transform=build_augmentations(spec.augmentation, spec.seed),
            num_workers=spec.loading.workers,
            prefetch=spec.loading.prefetch,
            pin_memory=world.device.type == "cuda",
        )
        self._batches: Iterator[Batch] | None = None
        self._evaluator = Evaluator(spec=spec, dataset=dataset, task=task, world=world)
        shape = tuple(self._loader.read(0, 0).inputs.shape[1:])
        model = build_model(
            spec.model, input_shape=shape, num_outputs=dataset.num_outputs, task=task.name, seed=spec.seed
        )
        if not model.training:
            model.train()
        model = configure_norm(model, spec.norm).to(device=world.device, dtype=parameter_dtype(spec.precision))
        self.model = to_format(model, memory_format(spec, 1 + len(shape)))
        self._parameters = list(self.model.parameters())  # looking them up takes longer than a small step's norm
        task.prepare(self.model)
        self.exactness = Exactness(spec, task, self.model)
        self._dropout = DropoutContext(seed=spec.seed)
        share_dropout(self.model, self._dropout, is_compiled=spec.compile)
        if spec.activation_checkpointing:
            checkpoint_activations(self.model)
        self._groups = NormalizationGroups(self.model, world)
        for plan in self.samples.plans:
            self._groups.prepare(plan)
        self._optimizer = build_optimizer(spec.optimizer, self.model)
        self._ema = Ema(self.model, decay=spec.ema.decay) if spec.ema is not None else None
        self._scaler = LossScaler() if spec.precision == "float16" else None
        if spec.compile:
            self.model.compile()
        self._parallel: DistributedDataParallel | None = None  # before it is known what the model uses
        self._diagnostics = Diagnostics(spec, self.model, world)

    @property
    def num_steps(self) -> int:
        """Of the whole job."""
        return self.samples.num_steps

    @property
    def plan(self) -> BatchPlan:
        """How a whole mini-batch is shared."""
        return self.samples.full

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go to where a checkpoint was taken."""
        try:
            self.model.load_state_dict(checkpoint.model)
        except RuntimeError as error:
            raise CheckpointMismatch(
                f"the checkpoint of step {checkpoint.step} does not fit the model that the job builds: {error} "
                "Give model, model.args and the dataset's number of outputs as they were when it was written."
            ) from error
        settings = [
            {name: value for name, value in group.items() if name != "params"} for group in self._parameter_groups()
        ]
        self._optimizer.load_state_dict(checkpoint.optimizer)
        for group, own in zip(self._parameter_groups(), settings, strict=True):
            group.update(own)  # a fork may have other ones than the job that wrote them down
        self._lay_out_optimizer_state()
        for name, part in self._stateful.items():
            if name in checkpoint.state:
                part.load_state_dict(checkpoint.state[name])
        if self._spec.ema is not None and "ema" not in checkpoint.state:  # a fork that turned it on: it begins here
            self._ema = Ema(self.model, decay=self._spec.ema.decay)
        self.steps_done = checkpoint.step
        self._batches = None  # what was read ahead belongs to other steps

    def capture(self) -> Checkpoint:
        """Return the present state; its tensors are the live ones."""
        return Checkpoint(
            step=self.steps_done,
            model=self.model.state_dict(),
            optimizer=self._optimizer.state_dict(),
            state={name: part.state_dict() for name, part in self._stateful.items()},
        )

    def settle(self) -> None:
        """Run one micro-step that leaves no trace, before the first step; call it once, on all ranks.

        DDP regroups its buckets after the first backward, in the order in which gradients became ready, and keeps
        them from then on. gloo adds up in an order that depends on a value's place in the bucket. So a process's
        first step would sum in another order than its later ones, and a resumed job would differ from an
        undisturbed one in the last bits. Here that first backward is spent.

        It also shows what a model does beside computing: which parameters it leaves unused, which buffers it changes,
        and whether it draws random numbers of its own.

        Raises:
            TrainingError: samples or model do not fit the task.
        """
        loss = self._try_micro_step()  # on the model alone: ranks whose passes differ would wait for each other in DDP
        unused = {
            name
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and parameter.grad is None
        }
        found = self._world.gather((unused, self.exactness.reasons, sorted(loss.metrics)))
        for _, reasons, names in found:
            self.exactness.add(reasons)
            if names != sorted(loss.metrics):
                raise BadFactory(
                    f"task: its metrics are {', '.join(names) or 'none'} on one worker and "
                    f"{', '.join(sorted(loss.metrics)) or 'none'} on another. Return the same names from every call."
                )
        self._optimizer.zero_grad()
        self._parallel = wrap(self.model, self._world, finds_unused=any(names for names, *_ in found))
        self._try_micro_step()
        self._optimizer.zero_grad()

    def step(self, *, stop: bool = False) -> StepResult:
        """Take the next optimizer step; ``settle`` comes before the first.

        Args:
            stop: whether this rank wants to stop after it.

        Raises:
            TrainingError: samples or model do not fit the task.
        """
        started = time.perf_counter()
        assert self._parallel is not None
        spec, world, plan = self._spec, self._world, self.samples.plan(self.steps_done)
        learning_rate = spec.optimizer.learning_rate * learning_rate_factor(
            spec.schedule, step=self.steps_done, num_steps=self.num_steps
        )
        # Whatever a model draws is then a function of (seed, step, rank), before and after a resume.
        world.seed(derive_seed(seed=spec.seed, purpose=f"rank {world.rank}", index=self.steps_done))

        self._optimizer.zero_grad()
        self._groups.follow(plan)
        self._diagnostics.begin(self.steps_done, plan)
        losses, data_wait_s = [], 0.0
        for micro_step in range(plan.num_micro_steps):
            asked = time.perf_counter()
            batch = self._next_batch()
            data_wait_s += time.perf_counter() - asked
            losses.append(self._accumulate(batch, plan, micro_step))
        totals = tally(losses, stop=stop, world=world)
        gradients = self._gradients()
        if self._scaler is not None:
            self._scaler.update(is_finite=self._scaler.unscale_(gradients, world_sum=world.sum_tensor))
            torch._foreach_mul_(gradients, world.size)
        if totals.weight != plan.size:
            torch._foreach_mul_(gradients, plan.size / (totals.weight or 1.0))
        norm = torch.nn.utils.get_total_norm(gradients)
        gradient_norm = float(norm)
        is_finite = math.isfinite(totals.loss) and math.isfinite(gradient_norm)
        details = self._diagnostics.end(gradient_norm=gradient_norm, weight=totals.weight)
        if self._scaler is not None:
            details["train/loss_scale"] = self._scaler.scale
        self._groups.commit()
        if is_finite:
            self._take_step(learning_rate, norm)
        self.steps_done += 1
        return StepResult(
            loss=totals.loss,
            means=totals.means,
            learning_rate=learning_rate,
            gradient_norm=gradient_norm,
            time_s=time.perf_counter() - started,
            data_wait_s=data_wait_s,
            stop=totals.num_stopping > 0,
            cause="" if is_finite else where_not_finite(losses, self.model, world),
            is_hopeless=self._scaler is not None and self._scaler.is_exhausted,
            details=details,
        )

    def evaluate(self) -> dict[str, float]:
        """Evaluate the held-out samples with running statistics, and with averaged weights where there are any."""
        with self.averaged():
            if self._spec.norm.kind == "local":  # every rank has its own; those of the checkpoints count
                self._world.take_buffers_of_first_rank(self.model)
            return self._evaluator(self.model)

    def averaged(self) -> AbstractContextManager[None]:
        """Return the context in which the model has its averaged weights, where the job keeps any."""
        return nullcontext() if self._ema is None else self._ema.swapped_in()

    def example_input(self) -> torch.Tensor:
        """Return a batch as the model takes it, (n, C, *), on its device."""
        return on_device(self._loader.read(0, 0), self._spec, self._world.device).inputs

    def recalibrate(self, num_batches: int) -> None:
        """Compute the running statistics anew, from the first mini-batches of an epoch. All ranks call it together.

        Those that belong to the averaged weights are computed too, where the job keeps any.
        """
        self._groups.follow(self.samples.full)
        whole = (step for step in range(self.samples.steps_per_epoch) if self.samples.plan(step) is self.samples.full)
        steps = list(islice(whole, num_batches))
        self._recalibrate(steps)
        if self._ema is not None:
            with self._ema.swapped_in():
                self._recalibrate(steps)

    def _recalibrate(self, steps: Sequence[int]) -> None:
        plan = self.samples.full
        places = ((step, micro_step) for step in steps for micro_step in range(plan.num_micro_steps))
        read = self._loader.read_several(places)
        batches = (on_device(batch, self._spec, self._world.device).inputs for batch in read)
        with autocast(self._spec.precision, self._world.device):
            recalibrate(self.model, batches, process_group=self._world.group)
        self._groups.discard()
        # Groups of ranks compute several batches at once; how many there were does not depend on that.
        for layer in self.model.modules():
            if isinstance(layer, _BatchNorm) and layer.num_batches_tracked is not None:
                layer.num_batches_tracked.fill_(len(steps) * plan.num_normalization_batches)

    def close(self) -> None:
        """End what reads samples ahead."""
        self._loader.close()
        self._evaluator.close()

    def _next_batch(self) -> Batch:
        if self._batches is None:
            self._batches = self._loader.batches(self.steps_done, self.num_steps - 1)
        return next(self._batches)

    def _accumulate(self, batch: Batch, plan: BatchPlan, micro_step: int) -> Loss:
        """Add the gradient of one micro-step; after the last, over all ranks."""
        spec, world = self._spec, self._world
        self._task.check(batch, self._dataset.num_outputs)
        batch = on_device(batch, spec, world.device)
        index = plan.normalization_batch(micro_step, world.rank)
        whole, own = plan.normalization_slice(index), plan.rank_slice(micro_step, world.rank)
        self._dropout.begin(
            step=self.steps_done,
            batch=index,
            num_samples=whole.stop - whole.start,
            first=own.start - whole.start,
            count=own.stop - own.start,
        )
        is_last = micro_step == plan.num_micro_steps - 1
        network = self._parallel or self.model
        waits = network.no_sync() if isinstance(network, DistributedDataParallel) and not is_last else nullcontext()
        with waits, self._groups.batch(index):
            with autocast(spec.precision, world.device):
                outputs = network(batch.inputs)
            loss = self._task.loss(outputs, batch.targets)
            # DDP divides by the number of ranks what it sums over them. Where half precision could overflow that is
            # made good only afterwards: which steps are skipped must not depend on the number of ranks.
            factor = (world.size if self._scaler is None else self._scaler.scale) / plan.size
            num_samples = own.stop - own.start
            with self._diagnostics.backward(num_samples=num_samples, factor=1 / (factor * num_samples)):
                (loss.sum * factor).backward()  # type: ignore[no-untyped-call]
        return replace(loss, sum=loss.sum.detach())

    def _take_step(self, learning_rate: float, norm: torch.Tensor) -> None:
        if self._spec.gradient_clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._spec.gradient_clip_norm, norm)
        for group in self._parameter_groups():
            group["lr"] = learning_rate
        self._optimizer.step()
        if self._ema is not None:
            self._ema.update()

    def _try_micro_step(self) -> Loss:
        """Run the one that DDP reduces after; only gradients are left of it."""
        plan = self.samples.full
        last = plan.num_micro_steps - 1
        before = [(name, buffer, buffer.clone()) for name, buffer in self.model.named_buffers()]
        self._groups.follow(plan)
        batch = self._loader.read(0, last)
        with self._dropout.watching() as drew_others:
            loss = self._accumulate(batch, plan, last)
        self._groups.discard()
        changed = [name for name, buffer, value in before if not torch.equal(buffer, value)]
        self.exactness.observe(loss, changed_buffers=changed, draws_others=drew_others(), misfits=self._dropout.misfits)
        with torch.no_grad():
            for _, buffer, value in before:
                buffer.copy_(value)
        return loss

    def _parameter_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def _lay_out_optimizer_state(self) -> None:
        """Give moments the layout of their weights: fused optimizers pair values by their place in memory."""
        for parameter, state in self._optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def _gradients(self) -> list[torch.Tensor]:
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    @property
    def _stateful(self) -> dict[str, Ema | LossScaler | GradientNoise]:
        parts = {"ema": self._ema, "scaler": self._scaler, "gradient_noise": self._diagnostics.noise}
        return {name: part for name, part in parts.items() if part is not None}


def wrap(model: nn.Module, world: World, *, finds_unused: bool) -> DistributedDataParallel:
    """Let a model's gradients be averaged over the ranks.

    Args:
        model: on its device.
        world: the ranks.
        finds_unused: look in each backward for parameters that it does not reach.
    """
    with warnings.catch_warnings():
        # torch 2.13 renames the argument; the old name is what earlier releases know.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.* is deprecated", category=FutureWarning)
        return DistributedDataParallel(
            model, process_group=world.group, broadcast_buffers=False, find_unused_parameters=finds_unused
        )
