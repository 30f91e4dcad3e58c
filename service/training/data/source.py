"""Where samples come from: by number, or as a stream."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from service.training.errors import BadSample


class Sample(NamedTuple):
    """One sample.

    Attributes:
        input: (C, *), floating point or uint8.
        target: a tensor of one shape for all samples; or, where they differ in length, a dictionary of tensors.
    """

    input: torch.Tensor
    target: Any


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Samples stacked.

    Attributes:
        inputs: (n, C, *).
        targets: (n, *), or a list of n dictionaries of tensors.
    """

    inputs: torch.Tensor
    targets: Any

    def __len__(self) -> int:
        return len(self.inputs)

    def pin_memory(self) -> "Batch":
        """Return a copy in page-locked memory, from which a GPU can read by itself."""
        return Batch(inputs=self.inputs.pin_memory(), targets=_map(self.targets, torch.Tensor.pin_memory))

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        """Return it on a device; floating-point tensors get the dtype, uint8 inputs too."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype, non_blocking=True)

        inputs = self.inputs.to(device, dtype, non_blocking=True)
        return Batch(inputs=inputs, targets=_map(self.targets, move))


class Source(ABC):
    """Samples by number; the same number gives the same sample, on every rank and every time.

    Attributes:
        reads_ahead: whether a thread may read samples while the model computes: reading takes long, mostly outside of
            Python, and touches no state that is shared.
    """

    reads_ahead: bool = False

    @abstractmethod
    def __len__(self) -> int:
        """Return how many there are."""

    @abstractmethod
    def sample(self, index: int) -> Sample:
        """Read one."""

    def samples(self, indices: NDArray[np.int64]) -> list[Sample]:
        """Read several, in the order asked for. Raises ``BadSample``."""
        return [self.sample(int(index)) for index in indices]

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """Read at least one, and stack them in the order asked for. Raises ``BadSample``."""
        return collate(self.samples(indices), indices)

    def of_epoch(self, epoch: int) -> "Source":
        """Return the samples as an epoch sees them; the same in every one, unless reading them draws at random."""
        del epoch
        return self


class InMemorySource(Source):
    """All samples of a split, in memory.

    Args:
        inputs: (N, C, *).
        targets: (N, *), or a list of N dictionaries of tensors.
    """

    def __init__(self, inputs: torch.Tensor, targets: Any) -> None:  # noqa: ANN401 - see Sample.target
        assert len(inputs) == len(targets)
        self.inputs = inputs
        self.targets = targets

    def __len__(self) -> int:
        return len(self.inputs)

    def sample(self, index: int) -> Sample:
        """Read one."""
        return Sample(self.inputs[index], self.targets[index])

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """Read any number of them."""
        if not isinstance(self.targets, torch.Tensor):
            return super().batch(indices)
        rows = torch.from_numpy(np.array(indices))
        return Batch(inputs=self.inputs.index_select(0, rows), targets=self.targets.index_select(0, rows))


class Stream(ABC):
    """Samples in one order only, such as those of a generator.

    Their numbers are their places in the stream, the same on every rank: each rank reads it and keeps its own.

    Attributes:
        num_samples: in one epoch; None where that is not known. Samples are then numbered on and on: where the stream
            ends, it begins again, and so a job asks for steps, not epochs.
    """

    num_samples: int | None

    @abstractmethod
    def read(self, epoch: int) -> Iterator[Sample | Callable[[], Sample]]:
        """Begin an epoch, from 0.

        What it yields may be a function that makes the sample: only ranks that need the sample call it.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """What a job trains on and what it is evaluated on.

    Attributes:
        training: samples to train on.
        held_out: samples to evaluate; empty where there are none.
        num_outputs: classes to tell apart; for regression, values to predict.
    """

    training: Source | Stream
    held_out: Source
    num_outputs: int


def collate(samples: Sequence[Sample], indices: NDArray[np.int64]) -> Batch:
    """Stack samples.

    Args:
        samples: at least one.
        indices: their numbers, to name one that does not fit.

    Raises:
        BadSample: the shape or dtype of one differs from those of the first.
    """
    first = samples[0]
    for sample, index in zip(samples, indices, strict=True):
        for what, tensor, expected in (("input", sample.input, first.input), ("target", sample.target, first.target)):
            if not isinstance(expected, torch.Tensor):
                continue
            if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
                raise BadSample(
                    f"dataset: the {what} of sample {index} is {_describe(tensor)}, that of sample {indices[0]} "
                    f"{_describe(expected)}. Samples of a dataset have one shape and dtype; resize or crop them."
                )
    targets: Any = [sample.target for sample in samples]
    if isinstance(first.target, torch.Tensor):
        targets = torch.stack(targets)
    return Batch(inputs=torch.stack([sample.input for sample in samples]), targets=targets)


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {'×'.join(map(str, tensor.shape)) or 'scalar'}"


def _map(targets: Any, function: Any) -> Any:  # noqa: ANN401 - a tensor, or tensors nested in lists and dictionaries
    if isinstance(targets, torch.Tensor):
        return function(targets)
    if isinstance(targets, dict):
        return {name: _map(value, function) for name, value in targets.items()}
    return [_map(value, function) for value in targets]
