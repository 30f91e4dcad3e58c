"""Streams: shuffled as they are read, and read by number."""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from service.training.data.source import Sample, Stream
from service.training.errors import BadSample
from service.training.sampling import derive_seed

_DRAWS = 4096  # random numbers at a time; part of what an order is made of, as is the rule below


class ShuffledStream(Stream):
    """Another stream through a buffer, from which samples leave at random.

    The order is a function of (seed, epoch): every rank has the same, and so has a resumed job.

    Args:
        stream: to shuffle.
        buffer_size: samples to choose from, at least 1; so many are kept in memory.
        seed: of the job.
    """

    def __init__(self, stream: Stream, *, buffer_size: int, seed: int) -> None:
        self.num_samples = stream.num_samples
        self._stream = stream
        self._buffer_size = buffer_size
        self._seed = seed

    def read(self, epoch: int) -> Iterator[Sample | Callable[[], Sample]]:
        """Begin an epoch, from 0."""
        numbers = _random_numbers(derive_seed(seed=self._seed, purpose="shuffle buffer", index=epoch))
        buffer: list[Sample | Callable[[], Sample]] = []
        for item in self._stream.read(epoch):
            if len(buffer) < self._buffer_size:
                buffer.append(item)
                continue
            place = next(numbers) % len(buffer)
            chosen, buffer[place] = buffer[place], item
            yield chosen
        while buffer:
            place = next(numbers) % len(buffer)
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            yield buffer.pop()


class StreamCursor:
    """Reads samples of a stream by number. Going on is cheap; going back begins the epoch again.

    Args:
        stream: to read.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._epoch: int | None = None
        self._position = 0  # number of the next item
        self._pass = 0  # over the stream; the epoch, but for a stream of unknown length, which begins again
        self._read_in_pass = 0
        self._items: Iterator[Sample | Callable[[], Sample]] = iter(())

    def samples(self, epoch: int, numbers: NDArray[np.int64]) -> list[Sample]:
        """Return samples in the order asked for.

        Args:
            epoch: of all of them.
            numbers: (n,), places in the stream, from 0.

        Raises:
            BadSample: the stream has fewer than it says.
            Exception: whatever reading it raises.
        """
        found: dict[int, Sample] = {}
        for number in sorted({int(number) for number in numbers}):
            if epoch != self._epoch or number < self._position:
                self._begin(epoch)
            while self._position < number:
                self._next()
            item = self._next()
            found[number] = item() if callable(item) else item
        return [found[int(number)] for number in numbers]

    def _begin(self, epoch: int) -> None:
        self._epoch = self._pass = epoch
        self._position = self._read_in_pass = 0
        self._items = self._stream.read(epoch)

    def _next(self) -> Sample | Callable[[], Sample]:
        while True:
            try:
                item = next(self._items)
            except StopIteration:
                self._end_pass()
                continue
            except BaseException:
                self._epoch = None  # what follows after an error would be numbered wrongly
                raise
            self._position += 1
            self._read_in_pass += 1
            return item

    def _end_pass(self) -> None:
        expected, read = self._stream.num_samples, self._read_in_pass
        if expected is not None or not read:
            self._epoch = None
            raise BadSample(
                f"dataset: the stream ended after {read} samples"
                + (f", but its length says {expected}; correct its __len__." if expected is not None else ".")
            )
        self._pass += 1
        self._read_in_pass = 0
        self._items = self._stream.read(self._pass)


def _random_numbers(seed: int) -> Iterator[int]:
    generator = np.random.Philox(key=seed)
    while True:
        yield from generator.random_raw(_DRAWS).tolist()
