"""How good a model is on the held-out samples."""

import numpy as np
import torch
from torch import nn

from service.domain.spec import JobSpec
from service.training.data import Dataset, Loader
from service.training.layout import on_device
from service.training.precision import autocast
from service.training.tasks import Task
from service.training.world import World


class Evaluator:
    """Evaluates with running statistics; every rank takes its share, and all get the result.

    A batch holds the same samples in every world, and goes to one rank whole.

    Args:
        spec: the job.
        dataset: its held-out samples; there may be none.
        task: what is learned.
        world: the ranks that share the work.
    """

    def __init__(self, *, spec: JobSpec, dataset: Dataset, task: Task, world: World) -> None:
        self._spec = spec
        self._num_outputs = dataset.num_outputs
        self._task = task
        self._world = world
        self._num_samples = len(dataset.held_out)
        num_batches = -(-self._num_samples // spec.evaluation.batch_size)
        self._num_own_batches = len(range(world.rank, num_batches, world.size))
        self._loader = Loader(
            dataset.held_out,
            rows=self._rows,
            num_micro_steps=lambda _: 1,
            epoch_of=lambda _: 0,
            transform=None,
            num_workers=spec.loading.workers,
            prefetch=spec.loading.prefetch,
            pin_memory=world.device.type == "cuda",
        )

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Evaluate a model; all ranks call it together.

        Args:
            model: left in the modes that it is in.

        Returns:
            ``eval/loss`` and the task's metrics, means over the weight; nothing where no samples are held out.
        """
        if not self._num_samples:
            return {}
        world, task = self._world, self._task
        metrics = task.new_metrics(num_outputs=self._num_outputs, device=world.device)
        totals = torch.zeros(2, dtype=torch.float64, device=world.device)
        modes = {module: module.training for module in model.modules()}
        model.eval()
        with torch.inference_mode():
            for batch in self._loader.batches(0, self._num_own_batches - 1) if self._num_own_batches else ():
                task.check(batch, self._num_outputs)
                batch = on_device(batch, self._spec, world.device)
                with autocast(self._spec.precision, world.device):
                    outputs = model(batch.inputs)
                loss = task.loss(outputs, batch.targets)
                totals += torch.stack([torch.as_tensor(value).to(totals) for value in (loss.sum, loss.weight)])
                metrics.update(outputs, batch.targets)
        for module, training in modes.items():
            module.training = training
        total, weight = world.sum_tensor(totals).tolist()
        values = metrics.compute(world.sum_tensor, world.gather)
        return {"eval/loss": total / (weight or 1.0), **{f"eval/{name}": value for name, value in values.items()}}

    def close(self) -> None:
        """End what reads samples ahead."""
        self._loader.close()

    def _rows(self, turn: int, _: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        first = (self._world.rank + turn * self._world.size) * self._spec.evaluation.batch_size
        return np.arange(first, min(first + self._spec.evaluation.batch_size, self._num_samples))
