"""The samples of each micro-step, read ahead while the model computes."""

import os
import pickle
import queue
import signal
import threading
import traceback
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from service.linux import die_with_parent, set_process_name
from service.training.data.augmentation import Transform
from service.training.data.source import Batch, Source, Stream, collate
from service.training.data.stream import StreamCursor
from service.training.errors import BadSample, DatasetError
from service.training.wording import first_of


class Loader:
    """Reads a rank's part of every micro-step.

    What a batch holds is a function of (step, micro-step) alone: neither the number of worker processes nor what was
    read before changes it.

    Args:
        source: the samples.
        rows: of (step, micro-step): the numbers of this rank's samples, in order.
        num_micro_steps: of a step.
        epoch_of: of a step.
        transform: applied to every sample; None where there is nothing to do.
        num_workers: processes that read; 0 for none. A stream is read by one at most. They are forked when the first
            iteration begins, and die with this process.
        prefetch: micro-steps that each worker reads ahead. Without workers a thread reads ahead where that pays, see
            ``Source.reads_ahead``, and the transform allows it; 0 turns it off.
        pin_memory: whether batches of an iteration lie in page-locked memory; needs a GPU.
    """

    def __init__(
        self,
        source: Source | Stream,
        *,
        rows: Callable[[int, int], NDArray[np.int64]],
        num_micro_steps: Callable[[int], int],
        epoch_of: Callable[[int], int],
        transform: Transform | None,
        num_workers: int,
        prefetch: int,
        pin_memory: bool,
    ) -> None:
        self._rows = rows
        self._num_micro_steps = num_micro_steps
        self._epoch_of = epoch_of
        self._prefetch = prefetch
        self._pin_memory = pin_memory
        self._source = source
        self._transform = transform
        self._ahead = _Reader(source, transform)
        self._reads_in_thread = (
            prefetch > 0
            and isinstance(source, Source)
            and source.reads_ahead
            and (transform is None or transform.reads_ahead)
        )
        self._running: _Iteration | None = None
        self._sampler = _Sampler()
        self._workers: DataLoader[Batch] | None = None
        if num_workers:
            self._workers = DataLoader(
                _ReadRequests(self._ahead),  # type: ignore[arg-type]  # indexed by requests
                sampler=self._sampler,
                batch_size=None,  # a request is a batch
                collate_fn=_as_it_is,
                num_workers=1 if isinstance(source, Stream) else num_workers,
                prefetch_factor=max(prefetch, 1),
                persistent_workers=True,
                pin_memory=pin_memory,
                worker_init_fn=partial(_start_worker, os.getpid()),
                generator=torch.Generator(),  # it would else draw from the one that the model draws from
            )

    def read(self, step: int, micro_step: int) -> Batch:
        """Read the batch of one micro-step at once, in this process; an iteration is left as it is.

        Raises:
            BadSample, DatasetError, Exception: what reading a sample raised.
        """
        return next(self.read_several([(step, micro_step)]))

    def read_several(self, micro_steps: Iterable[tuple[int, int]]) -> Iterator[Batch]:
        """Read as ``read`` does, one after another; a stream is gone through once, where they are in order.

        Args:
            micro_steps: pairs of a step and a micro-step of it.
        """
        # Not kept: a stream's buffer may take much memory, and this is seldom called.
        reader = _Reader(self._source, self._transform)
        return (reader.read(self._request(step, micro_step)) for step, micro_step in micro_steps)

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Read every micro-step of every step in order; reading ahead begins now.

        A new iteration ends an earlier one. Call it in the main thread: workers die with the thread that forked them.

        Args:
            first_step: to be read: optimizer steps done before it.
            last_step: to be read, likewise.

        Raises:
            BadSample, DatasetError, Exception: what reading a sample raised, in whichever process; it is raised where
                that sample's batch would have come.
        """
        self._end_iteration()
        requests = self._requests(range(first_step, last_step + 1))
        if self._workers is not None:
            self._sampler.requests = requests
            self._running = _InWorkers(self._workers)
        elif self._reads_in_thread:
            self._running = _InThread(self._read_ahead, requests, self._prefetch)
        else:
            self._running = _WhenAsked(self._read_ahead, requests)
        return self._running

    def close(self) -> None:
        """End worker processes and threads; calling it again does nothing."""
        self._end_iteration()
        self._workers = None  # the last reference: its workers are told to end, and joined

    def _end_iteration(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None

    def _read_ahead(self, request: "_Request") -> Batch:
        batch = self._ahead.read(request)
        return batch.pin_memory() if self._pin_memory else batch

    def _requests(self, steps: range) -> Iterator["_Request"]:
        for step in steps:
            for micro_step in range(self._num_micro_steps(step)):
                yield self._request(step, micro_step)

    def _request(self, step: int, micro_step: int) -> "_Request":
        return _Request(self._epoch_of(step), self._rows(step, micro_step))


class _Request(NamedTuple):
    """What a batch is made of."""

    epoch: int
    rows: NDArray[np.int64]


class _Reader:
    """Reads batches in this process."""

    def __init__(self, source: Source | Stream, transform: Transform | None) -> None:
        self._source = source
        self._transform = transform
        self._cursor = StreamCursor(source) if isinstance(source, Stream) else None
        self._empty: Batch | None = None

    def read(self, request: _Request) -> Batch:
        """Raise what reading a sample raises."""
        try:
            return self._read(request)
        except StopIteration as error:  # which would end the batches, as if there were no more of them
            rows = first_of([str(row) for row in request.rows])
            raise BadSample(
                f"dataset: reading samples {rows} raised StopIteration, which only an iterator may raise. Correct the "
                "dataset: next() of an iterator that was empty?"
            ) from error

    def _read(self, request: _Request) -> Batch:
        epoch, rows = request
        if not len(rows):
            return self._empty_batch(epoch)
        if self._cursor is not None:
            samples = self._cursor.samples(epoch, rows)
        else:
            assert isinstance(self._source, Source)
            source = self._source.of_epoch(epoch)
            if self._transform is None:
                return source.batch(rows)
            samples = source.samples(rows)
        if self._transform is not None:
            samples = [
                self._transform(sample, epoch=epoch, index=int(row)) for sample, row in zip(samples, rows, strict=True)
            ]
        return collate(samples, rows)

    def _empty_batch(self, epoch: int) -> Batch:
        # Only a sample tells shapes and types. Another reader's cursor leaves this one's where it is.
        if self._empty is None:
            one = _Reader(self._source, self._transform).read(_Request(epoch, np.zeros(1, np.int64)))
            self._empty = Batch(inputs=one.inputs[:0], targets=one.targets[:0])
        return self._empty


class _Iteration(Iterator[Batch]):
    """Batches in order."""

    @abstractmethod
    def close(self) -> None:
        """Read no more of them."""


class _WhenAsked(_Iteration):
    def __init__(self, read: Callable[[_Request], Batch], requests: Iterator[_Request]) -> None:
        self._read = read
        self._requests = requests

    def __next__(self) -> Batch:
        return self._read(next(self._requests))

    def close(self) -> None:
        self._requests = iter(())


class _InThread(_Iteration):
    def __init__(self, read: Callable[[_Request], Batch], requests: Iterator[_Request], depth: int) -> None:
        self._read = read
        self._requests = requests
        self._free = threading.Semaphore(depth)  # batches that may be read before one is taken
        self._done: queue.SimpleQueue[Batch | BaseException] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self._thread.start()

    def __next__(self) -> Batch:
        if self._closed:
            raise StopIteration
        batch = self._done.get()
        self._free.release()
        if isinstance(batch, BaseException):
            self.close()
            raise batch
        return batch

    def close(self) -> None:
        self._closed = True
        self._free.release()
        self._thread.join()

    def _run(self) -> None:
        try:
            for request in self._requests:
                self._free.acquire()
                if self._closed:
                    return
                self._done.put(self._read(request))
        except BaseException as error:
            self._done.put(error)
        else:
            self._done.put(StopIteration())


class _InWorkers(_Iteration):
    def __init__(self, workers: "DataLoader[Any]") -> None:
        handler = signal.getsignal(signal.SIGCHLD)
        self._batches: Iterator[Batch | _Failure] = iter(workers)
        if signal.getsignal(signal.SIGCHLD) is not handler:
            # DataLoader's would raise wherever the main thread happens to be when a worker dies, in a collective, say.
            # Without it the loss is found when that worker's batch does not come.
            signal.signal(signal.SIGCHLD, handler)

    def __next__(self) -> Batch:
        try:
            batch = next(self._batches)
        except (RuntimeError, OSError, EOFError) as error:
            # No sample's: those arrive as failures. A worker may have gone away in the middle of handing over a batch.
            raise DatasetError(
                f"a process that reads samples ended or could not hand them over: {error}. If it ran out of memory, "
                "lower loading.workers or loading.prefetch, or raise resources.memory_bytes_per_rank."
            ) from error
        if isinstance(batch, _Failure):
            batch.throw()
        return batch

    def close(self) -> None:
        self._batches = iter(())


class _Sampler:
    """What DataLoader takes its requests from, anew in each iteration."""

    requests: Iterator[_Request] = iter(())

    def __iter__(self) -> Iterator[_Request]:
        return self.requests


class _ReadRequests:
    """What a worker process does with a request."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader

    def __getitem__(self, request: _Request) -> "Batch | _Failure":
        try:
            return self._reader.read(request)
        except Exception as error:
            # DataLoader would raise another error of the same type, with a text of its own.
            return _Failure.of(error)


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """An error on its way from a worker process.

    Attributes:
        pickled: the error.
        traceback: as text, which is all of it that can travel.
    """

    pickled: bytes
    traceback: str

    @classmethod
    def of(cls, error: Exception) -> "_Failure":
        try:
            pickled = pickle.dumps(error)
            pickle.loads(pickled)  # noqa: S301 - this process made it
        except Exception:
            # Whatever an error of a user's class does when it is pickled.
            pickled = pickle.dumps(DatasetError(f"reading a sample raised {type(error).__name__}: {error}"))
        return cls(pickled=pickled, traceback="".join(traceback.format_exception(error)))

    def throw(self) -> NoReturn:
        error: Exception = pickle.loads(self.pickled)  # noqa: S301 - a process that this one forked made it
        error.add_note(f"raised in a process that reads samples:\n{self.traceback}")
        raise error


def _start_worker(parent_pid: int, worker: int) -> None:
    die_with_parent(parent_pid)
    set_process_name(f"syncbn-load-{worker}")


def _as_it_is(batch: Any) -> Any:  # noqa: ANN401 - DataLoader's type
    return batch
