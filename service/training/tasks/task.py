"""What a job learns: a loss that adds up over samples, and the metrics of an evaluation."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from service.training.data.source import Batch

WorldSum = Callable[[torch.Tensor], torch.Tensor]
"""Adds up a float64 vector (n,) over the ranks, on the device it is on; every rank gets the sum."""

WorldGather = Callable[[Any], list[Any]]
"""Collects an object that pickles (its tensors on the CPU) from every rank, by rank; every rank gets the list."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Ratio:
    """A mean that adds up: sums and weights of parts are those of the whole.

    Attributes:
        sum: shape (), without a gradient.
        weight: what the sum over all samples is divided by, shape ().
    """

    sum: torch.Tensor | float
    weight: torch.Tensor | float


@dataclass(frozen=True, kw_only=True, eq=False)
class Loss:
    """The loss of some samples, before any division. Its tensors are on the device; none was waited for.

    Attributes:
        sum: over the samples, shape (), differentiable.
        weight: what the sum over all ranks is divided by: samples, boxes or valid pixels; shape (). It may be zero
            over the whole mini-batch, and the sum is then divided by 1.
        metrics: shown beside the training loss, by name.
        adds_up: whether the sums and weights of the parts of a mini-batch are those of the whole. Where they are not,
            the result depends on how samples are spread over ranks.
    """

    sum: torch.Tensor
    weight: torch.Tensor | float
    metrics: Mapping[str, Ratio] = field(default_factory=dict)
    adds_up: bool = True


class TaskMetrics(ABC):
    """How good a model is on samples that come in batches, on several ranks, in shares of any size."""

    @abstractmethod
    def update(self, outputs: Any, targets: Any) -> None:  # noqa: ANN401 - what the task's models and datasets give
        """Count a batch; called without gradients."""

    @abstractmethod
    def compute(self, world_sum: WorldSum, world_gather: WorldGather) -> dict[str, float]:
        """Return the metrics of all samples of all ranks, the same on each of them.

        All ranks call it together, those that counted nothing too.

        Args:
            world_sum: adds up over the ranks.
            world_gather: collects from the ranks.

        Returns:
            Finite values by name. What is not defined is left out, such as an average over classes that never occur.
        """


class Task(ABC):
    """What is learned.

    Attributes:
        name: as in the job's ``task.name``.
        unsuited: why the result depends on how samples are spread over ranks; None where it does not.
    """

    name: str
    unsuited: str | None = None

    def prepare(self, model: nn.Module) -> None:  # noqa: B027 - most tasks take any model
        """Take what the task has to know of the model, before the first loss.

        Args:
            model: that learns it, not wrapped.

        Raises:
            BadFactory: it does not fit the task.
        """

    @abstractmethod
    def check(self, batch: Batch, num_outputs: int) -> None:
        """Check that samples can be learned from; on the CPU, before they go to the device.

        Args:
            batch: as the dataset gave it.
            num_outputs: of the dataset.

        Raises:
            BadSample: one does not fit, with its place in the batch.
        """

    @abstractmethod
    def loss(self, outputs: Any, targets: Any) -> Loss:  # noqa: ANN401 - what the task's models and datasets give
        """Compare a batch's outputs with its targets.

        Args:
            outputs: of the model.
            targets: of the same samples, on the same device.

        Raises:
            BadFactory: the model's outputs have a shape that the task does not know.
        """

    @abstractmethod
    def new_metrics(self, *, num_outputs: int, device: torch.device) -> TaskMetrics:
        """Begin an evaluation.

        Args:
            num_outputs: of the dataset.
            device: where outputs and targets will be.
        """
