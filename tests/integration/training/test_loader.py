"""Batches as the training loop gets them: the same from any number of workers, on any number of ranks.

A failure of equality shows as curves that depend on `loading` or on the world; of an ending, as processes that are left
behind.
"""

import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset

from service.domain.spec import AugmentationSpec, DatasetSpec
from service.training.data import InMemorySource, Loader, Source, build_augmentations, build_dataset
from service.training.data.source import Batch, Sample
from service.training.data.stream import ShuffledStream
from service.training.data.user_dataset import IterableStream, MapSource
from service.training.errors import BadSample, DatasetError
from service.training.sampling import SampleOrder

SIZE, MICRO_STEPS = 12, 2


class Noisy(TorchDataset):
    """Draws from the generators of the process, as datasets that augment do."""

    def __len__(self):
        return 30

    def __getitem__(self, index):
        return torch.tensor([float(index), random.random(), float(torch.rand(()))]), index


class Numbers(IterableDataset):
    def __len__(self):
        return 30

    def __iter__(self):
        for number in range(30):
            yield torch.tensor([float(number), random.random()]), number


class Broken(Source):
    """Its sample 7 cannot be read."""

    def __init__(self, error, *, reads_ahead=False):
        self.error = error
        self.reads_ahead = reads_ahead

    def __len__(self):
        return 100

    def sample(self, index):
        if index == 7:
            raise self.error
        return Sample(torch.tensor([index]), torch.tensor(index))


class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(one)


class Opened:
    """Closes loaders when the test ends."""

    def __init__(self):
        self.loaders = []
        self._before = set(psutil.Process().children())  # other tests' servers

    def workers(self):
        return [child for child in psutil.Process().children() if child not in self._before]

    def __call__(self, source, *, rank=0, world_size=1, transform=None, num_workers=0, prefetch=2, in_order=False):
        length = source.num_samples if not isinstance(source, Source) else len(source)
        order = SampleOrder(num_samples=length, batch_size=SIZE, seed=1)

        def rows(step, micro_step):
            place = step % order.steps_per_epoch * SIZE
            minibatch = np.arange(place, place + SIZE) if in_order else order.minibatch(step)
            return np.array_split(np.split(minibatch, MICRO_STEPS)[micro_step], world_size)[rank]

        loader = Loader(
            source,
            rows=rows,
            num_micro_steps=lambda step: MICRO_STEPS,
            epoch_of=lambda step: step // order.steps_per_epoch,
            transform=transform,
            num_workers=num_workers,
            prefetch=prefetch,
            pin_memory=False,
        )
        self.loaders.append(loader)
        return loader


@pytest.fixture
def open_loader():
    opened = Opened()
    yield opened
    for loader in opened.loaders:
        loader.close()
    assert not opened.workers()
    assert "loader" not in {thread.name for thread in threading.enumerate()}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number in range(30):
        path = folder / f"class{number % 3}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(path)
    args = {"path": str(folder), "size": [8, 8], "test_fraction": 0}
    return build_dataset(DatasetSpec(factory="builtin:image-folder", args=args), seed=0).training


def digits():
    return build_dataset(DatasetSpec(factory="builtin:digits"), seed=0).training


def augmentations():
    return build_augmentations([AugmentationSpec(name=name) for name in ("horizontal-flip", "translate", "noise")], 4)


def assert_equal(batches: list[Batch], others: list[Batch]):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch.inputs, other.inputs)
        assert torch.equal(batch.targets, other.targets)


def joined(per_rank: list[list[Batch]]) -> list[Batch]:
    """Micro-steps of the whole world from those of its ranks."""
    return [
        Batch(inputs=torch.cat([b.inputs for b in parts]), targets=torch.cat([b.targets for b in parts]))
        for parts in zip(*per_rank, strict=True)
    ]


@pytest.mark.parametrize("kind", ["images", "noisy", "stream"])
def test_batches_are_the_same_from_any_number_of_workers_on_any_world(open_loader, images, kind):
    source = {
        "images": images,
        "noisy": MapSource(Noisy(), seed=3),
        "stream": ShuffledStream(IterableStream(Numbers(), seed=3), buffer_size=5, seed=3),
    }[kind]
    options = {"in_order": kind == "stream", "transform": augmentations() if kind == "images" else None}
    steps = range(4)  # of two epochs
    expected = list(open_loader(source, **options).batches(0, 3))
    assert len(expected) == len(steps) * MICRO_STEPS
    assert len({batch.inputs.numpy().tobytes() for batch in expected}) == len(expected)
    for num_workers, world_size in ((0, 2), (0, 3), (1, 1), (2, 1), (2, 3)):
        ranks = [
            open_loader(source, num_workers=num_workers, rank=rank, world_size=world_size, **options)
            for rank in range(world_size)
        ]
        assert_equal(joined([list(loader.batches(0, 3)) for loader in ranks]), expected)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_iteration_may_begin_anywhere_and_again(open_loader, images, num_workers):
    loader = open_loader(images, num_workers=num_workers, transform=augmentations())
    everything = list(loader.batches(0, 5))
    unfinished = loader.batches(1, 5)
    next(unfinished)
    assert_equal(list(loader.batches(3, 4)), everything[3 * MICRO_STEPS : 5 * MICRO_STEPS])
    assert list(unfinished) == []  # a new iteration ends it
    assert list(loader.batches(3, 2)) == []


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("kind", ["images", "stream"])
def test_reading_one_batch_leaves_an_iteration_as_it_is(open_loader, images, kind, num_workers):
    source = images if kind == "images" else IterableStream(Numbers(), seed=3)
    loader = open_loader(source, num_workers=num_workers, in_order=kind == "stream")
    expected = list(loader.batches(0, 2))
    iteration = loader.batches(0, 2)
    found = [next(iteration), next(iteration)]
    assert_equal([loader.read(2, 1), loader.read(0, 0)], [expected[5], expected[0]])
    assert_equal([*found, *iteration], expected)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_models_draws_are_left_alone(open_loader, num_workers):
    loader = open_loader(MapSource(Noisy(), seed=3), num_workers=num_workers)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    found = []
    for _, batch in zip(range(3), loader.batches(0, 1), strict=False):
        found.append(torch.rand(()))
        assert len(batch) == SIZE // MICRO_STEPS
    assert torch.equal(torch.stack(found), expected)


def test_a_rank_without_samples_gets_an_empty_batch(open_loader, images):
    for source in (images, digits(), IterableStream(Numbers(), seed=0)):
        loader = open_loader(source)
        loader._rows = lambda step, micro_step: np.arange(0) if step % 2 else np.arange(3)
        batch, full = loader.read(1, 0), loader.read(0, 0)
        assert (len(batch), len(full)) == (0, 3)
        assert batch.inputs.shape[1:] == full.inputs.shape[1:]
        assert batch.inputs.dtype == full.inputs.dtype
        assert len(batch.targets) == 0


@pytest.mark.parametrize(("num_workers", "reads_ahead"), [(0, False), (0, True), (1, False), (2, False)])
class TestErrors:
    def _read(self, open_loader, error, num_workers, reads_ahead):
        loader = open_loader(Broken(error, reads_ahead=reads_ahead), num_workers=num_workers, in_order=True)
        iteration = loader.batches(0, 3)
        first = next(iteration)  # 0 to 5; 7 is in the second
        assert first.targets.tolist() == [0, 1, 2, 3, 4, 5]
        next(iteration)

    def test_the_original_error_comes_where_its_batch_would_have(self, open_loader, num_workers, reads_ahead):
        with pytest.raises(BadSample) as raised:
            self._read(open_loader, BadSample("dataset: cat.png is broken."), num_workers, reads_ahead)
        assert str(raised.value) == "dataset: cat.png is broken."
        if num_workers:
            assert "in sample" in raised.value.__notes__[0]  # where it was raised, in the worker

    def test_an_error_that_cannot_travel_is_described(self, open_loader, num_workers, reads_ahead):
        expected = DatasetError if num_workers else Unpicklable
        with pytest.raises(expected, match="no such row"):
            self._read(open_loader, Unpicklable("no such row", 2), num_workers, reads_ahead)

    def test_a_dataset_does_not_end_the_batches(self, open_loader, num_workers, reads_ahead):
        with pytest.raises(BadSample, match=r"^dataset: reading samples 6, 7, 8 and 3 more raised StopIteration"):
            self._read(open_loader, StopIteration(), num_workers, reads_ahead)


class SharedDraws:
    """Draws as torchvision's transforms do, which a thread beside the model must not."""

    reads_ahead = False

    def __call__(self, sample, *, epoch, index):
        assert threading.current_thread() is threading.main_thread()
        return sample


def test_a_transform_that_shares_generators_is_not_applied_by_a_thread(open_loader, images):
    loader = open_loader(images, transform=SharedDraws())
    assert images.reads_ahead
    assert len(list(loader.batches(0, 0))) == MICRO_STEPS


class CountedStream(IterableDataset):
    """Knows how often it was begun, and which of its samples are alive."""

    def __init__(self):
        self.begun = 0
        self.alive = weakref.WeakSet()

    def __len__(self):
        return 30

    def __iter__(self):
        self.begun += 1
        for number in range(30):
            image = torch.tensor([float(number)])
            self.alive.add(image)
            yield image, number


def test_reading_at_once_keeps_nothing_of_a_stream(open_loader):
    stream = CountedStream()
    source = ShuffledStream(IterableStream(stream, seed=3), buffer_size=20, seed=3)
    loader = open_loader(source, in_order=True)
    at_once = [loader.read(0, 0), loader.read(0, 1)]
    gc.collect()
    assert not stream.alive
    stream.begun = 0
    assert_equal(list(loader.read_several([(0, 0), (0, 1)])), at_once)
    assert stream.begun == 1


def test_a_worker_that_is_killed_is_told_with_what_to_do(open_loader, images):
    loader = open_loader(images, num_workers=1, prefetch=1)
    iteration = loader.batches(0, 50)
    next(iteration)
    (worker,) = open_loader.workers()
    worker.kill()
    with pytest.raises(DatasetError, match=r"a process that reads samples ended or .*lower loading\.workers"):
        list(iteration)


def test_workers_stay_from_one_iteration_to_the_next_and_end_when_closed(open_loader, images):
    loader = open_loader(images, num_workers=2)
    list(loader.batches(0, 1))
    first = {child.pid for child in open_loader.workers()}
    list(loader.batches(0, 1))
    assert {child.pid for child in open_loader.workers()} == first
    assert len(first) == 2
    loader.close()
    loader.close()
    assert not open_loader.workers()


def test_a_stream_has_one_worker_at_most(open_loader):
    loader = open_loader(IterableStream(Numbers(), seed=0), num_workers=3, in_order=True)
    next(loader.batches(0, 1))
    assert len(open_loader.workers()) == 1


def test_a_thread_reads_ahead_no_further_than_it_may(open_loader):
    class Counting(Broken):
        reads = 0

        def sample(self, index):
            type(self).reads += 1
            return super().sample(0)

    loader = open_loader(Counting(BadSample(""), reads_ahead=True), prefetch=2)
    iteration = loader.batches(0, 7)
    per_batch = SIZE // MICRO_STEPS
    for taken in range(5):
        deadline = time.monotonic() + 20
        while Counting.reads < (taken + 2) * per_batch and time.monotonic() < deadline:
            time.sleep(0.001)
        assert Counting.reads == (taken + 2) * per_batch
        next(iteration)


def test_workers_die_with_the_training_process(tmp_path):
    script = textwrap.dedent(
        """
        import os, sys, time
        import numpy as np, torch, psutil
        from service.training.data import InMemorySource, Loader
        loader = Loader(
            InMemorySource(torch.zeros(4, 1), torch.zeros(4)), rows=lambda step, micro: np.arange(4),
            num_micro_steps=lambda step: 1, epoch_of=lambda step: 0, transform=None, num_workers=2, prefetch=1,
            pin_memory=False,
        )
        next(loader.batches(0, 9))
        print(*(child.pid for child in psutil.Process().children()), flush=True)
        time.sleep(60)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
    )
    with process:
        workers = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        assert {os.getpgid(worker.pid) for worker in workers} == {os.getpgid(process.pid)}
        process.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


@pytest.mark.benchmark
def test_samples_in_memory_cost_next_to_nothing(open_loader):
    source = digits()
    assert isinstance(source, InMemorySource)
    loader = open_loader(source)
    times_s = []
    for _ in range(5):
        started = time.perf_counter()
        count = sum(1 for _ in loader.batches(0, 500))
        times_s.append((time.perf_counter() - started) / count)
    assert min(times_s) < 50e-6
