"""Datasets from code of the job's own."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import IterableDataset, TensorDataset

from service.domain.spec import DatasetSpec
from service.domain.uploads import UPLOAD_PREFIX
from service.training.data.context import DataContext
from service.training.data.files import local_file
from service.training.data.randomness import RandomState, randomness_kept, seed_all
from service.training.data.source import Dataset, InMemorySource, Sample, Source, Stream
from service.training.data.stream import ShuffledStream
from service.training.errors import BadFactory, BadSample
from service.training.factories import call_factory, import_factory
from service.training.sampling import derive_seed

_FIELD = "dataset.factory"
_RETURNS = (
    "return a Dataset, or (training, held_out, num_outputs) of torch datasets, or of pairs of tensors; held_out may be "
    "None"
)


def build_user_dataset(spec: DatasetSpec, context: DataContext) -> Dataset:
    """Call a user's function with the job's arguments and, where it takes one, the job's seed.

    Arguments that are ``upload:`` and a SHA-256 become the path of the upload. ``shuffle_buffer`` shuffles a stream,
    unless the function takes an argument of that name itself.

    Raises:
        BadFactory: it cannot be imported or called, or returns something else.
        DatasetError: there is no such upload.
    """
    arguments: dict[str, Any] = {}
    for name, value in spec.args.items():
        is_upload = isinstance(value, str) and value.startswith(UPLOAD_PREFIX)
        arguments[name] = str(local_file(value, context, field=f"dataset.args.{name}")) if is_upload else value
    shuffle_buffer = None
    if not _takes(import_factory(spec.factory, field=_FIELD), "shuffle_buffer"):
        shuffle_buffer = arguments.pop("shuffle_buffer", None)
    result = call_factory(spec.factory, arguments, field=_FIELD, offers={"seed": context.seed})
    if not isinstance(result, Dataset):
        result = _dataset_of_parts(result, spec.factory, context.seed)
    if shuffle_buffer is None:
        return result
    return _shuffled(result, shuffle_buffer, context.seed)


class MapSource(Source):
    """A map-style dataset of torch's: it has a length, and samples by number.

    What reading a sample draws from the generators of Python, NumPy and torch is a function of (seed, epoch, number);
    the generators are then left as they were.

    Args:
        dataset: its items are pairs of input and target.
        seed: of the job.
        epoch: pass over the samples.
    """

    def __init__(self, dataset: Any, *, seed: int, epoch: int = 0) -> None:  # noqa: ANN401 - torch's type has no length
        self._dataset = dataset
        self._seed = seed
        self._purpose = f"dataset/{epoch}"

    def __len__(self) -> int:
        return len(self._dataset)

    def sample(self, index: int) -> Sample:
        """Read one. Raises ``BadSample``, or whatever the dataset raises."""
        return self.samples(np.array([index]))[0]

    def samples(self, indices: NDArray[np.int64]) -> list[Sample]:
        """Read several."""
        with randomness_kept():
            return [self._read(int(index)) for index in indices]

    def of_epoch(self, epoch: int) -> "MapSource":
        """Return the samples as an epoch sees them."""
        return MapSource(self._dataset, seed=self._seed, epoch=epoch)

    def _read(self, index: int) -> Sample:
        seed_all(derive_seed(seed=self._seed, purpose=self._purpose, index=index))
        return to_sample(self._dataset[index], index)


class IterableStream(Stream):
    """An iterable dataset of torch's; every rank iterates over all of it.

    An item may be a function without arguments, which returns the sample; only the rank that needs the sample calls it.
    What is drawn from the generators of Python, NumPy and torch is a function of (seed, epoch), or in such a
    function of (seed, epoch, number). A dataset with a method ``set_epoch`` is told the epoch.

    Args:
        dataset: its items are pairs of input and target.
        seed: of the job.
    """

    def __init__(self, dataset: Any, *, seed: int) -> None:  # noqa: ANN401 - its items may be anything
        self._dataset = dataset
        self._seed = seed
        try:
            self.num_samples = len(dataset)
        except TypeError:
            self.num_samples = None

    def read(self, epoch: int) -> Iterator[Sample | Callable[[], Sample]]:
        """Begin an epoch, from 0."""
        for index, item in enumerate(self._items(epoch)):
            yield self._later(item, epoch, index) if callable(item) else to_sample(item, index)

    def _items(self, epoch: int) -> Iterator[Any]:
        # Between two items the generators belong to whoever reads them.
        with randomness_kept():
            seed_all(derive_seed(seed=self._seed, purpose="stream", index=epoch))
            if hasattr(self._dataset, "set_epoch"):
                self._dataset.set_epoch(epoch)
            items = iter(self._dataset)
            state = RandomState.capture()
        while True:
            with randomness_kept():
                state.restore()
                try:
                    item = next(items)
                except StopIteration:
                    return
                state = RandomState.capture()
            yield item

    def _later(self, make: Callable[[], Any], epoch: int, index: int) -> Callable[[], Sample]:
        def sample() -> Sample:
            with randomness_kept():
                seed_all(derive_seed(seed=self._seed, purpose=f"stream/{epoch}", index=index))
                return to_sample(make(), index)

        return sample


def to_sample(item: Any, index: int) -> Sample:  # noqa: ANN401 - whatever a user's dataset has
    """Return an item as tensors: arrays, images of Pillow's and numbers are converted.

    Raises:
        BadSample: it is not a pair of input and target.
    """
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise BadSample(
            f"dataset: sample {index} is {_describe(item)}; a sample is a pair of the input and the target."
        )
    target = item[1]
    if isinstance(target, Mapping):
        return Sample(
            _tensor(item[0], index, "input"), {name: _tensor(value, index, name) for name, value in target.items()}
        )
    return Sample(_tensor(item[0], index, "input"), _tensor(target, index, "target"))


def _tensor(value: Any, index: int, what: str) -> torch.Tensor:  # noqa: ANN401
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, Image.Image):
        pixels = np.array(value)
        return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())
    if isinstance(value, float):
        return torch.tensor(value)  # float32
    try:
        array = np.array(value)  # a copy: the original may be read-only, or a view with negative strides
        return torch.from_numpy(array)
    except (TypeError, ValueError):
        raise BadSample(f"dataset: the {what} of sample {index} is {_describe(value)}; make it a tensor.") from None


def _dataset_of_parts(result: Any, reference: str, seed: int) -> Dataset:  # noqa: ANN401 - whatever the function returned
    if not isinstance(result, (tuple, list)) or len(result) != 3:
        raise BadFactory(f"{_FIELD}: {reference} returned {_describe(result)}; {_RETURNS}.")
    training, held_out, num_outputs = result
    if not isinstance(num_outputs, int) or isinstance(num_outputs, bool) or num_outputs < 1:
        raise BadFactory(
            f"{_FIELD}: the third value that {reference} returned, the number of outputs, is {_describe(num_outputs)}; "
            "it is a whole number of at least 1."
        )
    training_source = _source(training, "training", reference, seed)
    if isinstance(training_source, Source) and not len(training_source):
        raise BadFactory(f"{_FIELD}: {reference} returned no samples to train on.")
    if held_out is None:
        held_out_source: Source | Stream = InMemorySource(torch.empty(0), torch.empty(0))
    else:
        held_out_source = _source(held_out, "held-out", reference, seed)
    if isinstance(held_out_source, Stream):
        raise BadFactory(
            f"{_FIELD}: the held-out samples that {reference} returned are a stream; evaluation divides them among "
            "workers by number, so return a dataset with a length and samples by number."
        )
    return Dataset(training=training_source, held_out=held_out_source, num_outputs=num_outputs)


def _source(part: Any, what: str, reference: str, seed: int) -> Source | Stream:  # noqa: ANN401
    if isinstance(part, Source | Stream):
        return part
    if isinstance(part, TensorDataset):
        part = part.tensors
    if (
        isinstance(part, (tuple, list))
        and len(part) == 2
        and all(isinstance(a, torch.Tensor | np.ndarray) for a in part)
    ):
        inputs, targets = (torch.from_numpy(a.copy()) if isinstance(a, np.ndarray) else a for a in part)
        if len(inputs) != len(targets):
            raise BadFactory(
                f"{_FIELD}: the {what} samples that {reference} returned are {len(inputs)} inputs and {len(targets)} "
                "targets; there is one target to each input."
            )
        return InMemorySource(inputs, targets)
    if isinstance(part, IterableDataset):
        return IterableStream(part, seed=seed)
    if hasattr(part, "__len__") and hasattr(part, "__getitem__"):
        return MapSource(part, seed=seed)
    raise BadFactory(f"{_FIELD}: the {what} samples that {reference} returned are {_describe(part)}; {_RETURNS}.")


def _shuffled(dataset: Dataset, buffer_size: Any, seed: int) -> Dataset:  # noqa: ANN401 - as the job has it
    if not isinstance(dataset.training, Stream):
        raise BadFactory(
            "dataset.args.shuffle_buffer: is for streams; samples with numbers are shuffled without it. Remove it."
        )
    if not isinstance(buffer_size, int) or isinstance(buffer_size, bool) or buffer_size < 1:
        raise BadFactory(f"dataset.args.shuffle_buffer: {buffer_size!r} is not a whole number of at least 1.")
    training = ShuffledStream(dataset.training, buffer_size=buffer_size, seed=seed)
    return Dataset(training=training, held_out=dataset.held_out, num_outputs=dataset.num_outputs)


def _takes(function: Callable[..., Any], name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except ValueError:  # some functions written in C do not tell it
        return False


def _describe(value: Any) -> str:  # noqa: ANN401
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{value!r:.60} ({type(value).__name__})"
