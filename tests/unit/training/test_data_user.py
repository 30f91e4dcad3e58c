"""Datasets from a job's own code. A failure here shows as a user's mistake told badly, or as samples that depend on who
read them.
"""

import random
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset, TensorDataset

from service.domain.spec import DatasetSpec
from service.training.data import Batch, Dataset, InMemorySource, Source, Stream, build_dataset
from service.training.data.randomness import RandomState
from service.training.data.source import collate
from service.training.data.user_dataset import IterableStream, MapSource, to_sample
from service.training.errors import BadFactory, BadSample, DatasetError


@pytest.fixture
def call(monkeypatch):
    """Builds the dataset that a function returns."""

    def build(function, *, seed=3, uploads=None, **args):
        module = ModuleType("my_data")
        module.load = function
        monkeypatch.setitem(sys.modules, "my_data", module)
        return build_dataset(DatasetSpec(factory="my_data:load", args=args), seed=seed, uploads=uploads)

    return build


class Pairs(TorchDataset):
    """Draws from all three generators, as augmenting datasets do."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        noise = [random.random(), float(np.random.rand()), torch.rand(()).item()]
        return torch.tensor([index, *noise], dtype=torch.float64), index % 2


class Endless(IterableDataset):
    def __iter__(self):
        number = 0
        while True:
            yield torch.tensor([number + random.random() + float(torch.rand(()))]), number
            number += 1


class OfEpoch(IterableDataset):
    epoch = None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 3

    def __iter__(self):
        for number in range(3):
            yield lambda number=number: (torch.tensor([self.epoch + float(torch.rand(()))]), number)


X, Y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])


class TestWhatAFunctionMayReturn:
    def test_a_dataset(self, call):
        dataset = Dataset(training=InMemorySource(X, Y), held_out=InMemorySource(X, Y), num_outputs=2)
        assert call(lambda: dataset) is dataset

    @pytest.mark.parametrize("pair", [(X, Y), (X.numpy(), Y.numpy()), [X, Y], TensorDataset(X, Y)], ids=type)
    def test_pairs_of_arrays(self, call, pair):
        dataset = call(lambda: (pair, None, 2))
        assert isinstance(dataset.training, InMemorySource)
        assert torch.equal(dataset.training.batch(np.array([2, 0])).inputs, X[[2, 0]])
        assert len(dataset.held_out) == 0

    def test_map_style_datasets(self, call):
        dataset = call(lambda: (Pairs(), Pairs(), 2))
        assert isinstance(dataset.training, MapSource)
        batch = dataset.held_out.batch(np.array([3, 1]))
        assert batch.inputs[:, 0].tolist() == [3, 1]
        assert batch.targets.tolist() == [1, 1]

    def test_iterable_datasets(self, call):
        dataset = call(lambda: (Endless(), [(X[0], 0)], 2))
        assert isinstance(dataset.training, IterableStream)
        assert dataset.training.num_samples is None
        assert len(dataset.held_out) == 1

    def test_it_is_given_the_arguments_the_seed_and_the_paths_of_uploads(self, call, tmp_path):
        given = {}

        def load(path, seed, *, size=1):
            given.update(path=path, seed=seed, size=size)
            return (X, Y), None, 2

        call(load, seed=17, path="upload:" + "a" * 64, size=5, uploads={"a" * 64: tmp_path / "data"})
        assert given == {"path": str(tmp_path / "data"), "seed": 17, "size": 5}

    def test_a_shuffle_buffer_is_for_streams(self, call):
        stream = call(lambda: (OfEpoch(), None, 1), shuffle_buffer=2).training
        assert isinstance(stream, Stream)
        assert sorted(int(item().target) for item in stream.read(0)) == [0, 1, 2]
        taken = []
        call(lambda shuffle_buffer: taken.append(shuffle_buffer) or (OfEpoch(), None, 1), shuffle_buffer=2)
        assert taken == [2]
        with pytest.raises(BadFactory, match=r"dataset\.args\.shuffle_buffer: is for streams"):
            call(lambda: ((X, Y), None, 2), shuffle_buffer=2)
        with pytest.raises(BadFactory, match=r"dataset\.args\.shuffle_buffer: 0 is not a whole number of at least 1"):
            call(lambda: (OfEpoch(), None, 1), shuffle_buffer=0)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, r"my_data:load returned None \(NoneType\); return a Dataset, or"),
        (((X, Y), None), "returned a tuple of 2; return a Dataset"),
        (((X, Y), None, 0), r"the number of outputs, is 0 \(int\); it is a whole number of at least 1"),
        (((X, Y), None, "ten"), "the number of outputs, is 'ten'"),
        (((X, Y[:2]), None, 2), "training samples .* are 4 inputs and 2 targets"),
        ((5, None, 2), r"the training samples that .* returned are 5 \(int\)"),
        (([], None, 2), "returned no samples to train on"),
        (((X, Y), Endless(), 2), "held-out samples .* are a stream"),
    ],
    ids=range(8),
)
def test_anything_else_is_refused(call, returned, message):
    with pytest.raises(BadFactory, match=r"^dataset\.factory: .*" + message):
        call(lambda: returned)


def test_what_the_function_raises_is_the_cause(call):
    def load():
        raise KeyError("path")

    with pytest.raises(BadFactory, match=r"dataset\.factory: my_data:load raised KeyError") as error:
        call(load)
    assert isinstance(error.value.__cause__, KeyError)


def test_an_upload_that_is_not_there_is_named(call):
    with pytest.raises(DatasetError, match=r"dataset\.args\.path: nothing was uploaded as upload:b"):
        call(lambda path: None, path="upload:" + "b" * 64)


class TestRandomness:
    """What a sample draws is its own, and takes nothing from the model's draws."""

    def test_a_sample_is_a_function_of_seed_epoch_and_number(self):
        source = MapSource(Pairs(), seed=1)
        together = source.batch(np.arange(5)).inputs
        random.seed(99)
        torch.manual_seed(99)
        apart = torch.stack([source.sample(index).input for index in reversed(range(5))]).flip(0)
        assert torch.equal(together, apart)
        assert torch.equal(source.of_epoch(0).batch(np.arange(5)).inputs, together)
        assert not torch.equal(source.of_epoch(1).batch(np.arange(5)).inputs, together)
        assert not torch.equal(MapSource(Pairs(), seed=2).batch(np.arange(5)).inputs, together)
        assert len(together[:, 1:].unique()) == 15

    def test_a_stream_is_a_function_of_seed_and_epoch(self):
        stream = IterableStream(Endless(), seed=1)

        def first_three(epoch):
            items = stream.read(epoch)
            values = []
            for _ in range(3):
                values.append(next(items).input.item())
                random.random()
                torch.rand(5)
            return values

        assert first_three(0) == first_three(0)
        assert first_three(0) != first_three(1)

    def test_an_item_that_is_made_later_is_its_own(self):
        stream = IterableStream(OfEpoch(), seed=1)
        assert stream.num_samples == 3
        values = [item().input.item() for item in stream.read(2)]
        last = list(stream.read(2))[2]
        assert last().input.item() == values[2]
        assert all(2 <= value < 3 for value in values)
        assert len(set(values)) == 3

    @pytest.mark.parametrize(
        "read", [lambda: MapSource(Pairs(), seed=1).sample(2), lambda: next(IterableStream(Endless(), seed=1).read(0))]
    )
    def test_the_generators_are_left_as_they_were(self, read):
        before = RandomState.capture()
        read()
        after = RandomState.capture()
        assert before.python == after.python
        assert np.array_equal(before.numpy[1], after.numpy[1])
        assert torch.equal(before.torch, after.torch)


class TestSamples:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (3, torch.tensor(3)),
            (True, torch.tensor(True)),
            (0.5, torch.tensor(0.5)),
            ([1.0, 2.0], torch.tensor([1.0, 2.0], dtype=torch.float64)),
            (np.arange(3)[::-1], torch.tensor([2, 1, 0])),
            (np.float32(2), torch.tensor(2.0)),
        ],
        ids=repr,
    )
    def test_targets_become_tensors(self, value, expected):
        target = to_sample((X, value), 0).target
        assert target.dtype == expected.dtype
        assert torch.equal(target, expected)
        assert torch.equal(to_sample((X, {"boxes": value}), 0).target["boxes"], expected)

    def test_images_become_channels_first(self):
        pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
        assert torch.equal(to_sample((Image.fromarray(pixels), 0), 0).input, torch.from_numpy(pixels).permute(2, 0, 1))
        assert to_sample((Image.fromarray(pixels[:, :, 0]), 0), 0).input.shape == (1, 2, 4)

    @pytest.mark.parametrize(
        ("item", "message"),
        [
            (X, r"sample 7 is tensor.*\(Tensor\); a sample is a pair"),
            ((X, 1, 2), "sample 7 is a tuple of 3"),
            ((X, object()), r"the target of sample 7 is .*\(object\); make it a tensor"),
            (("text", 1), r"the input of sample 7 is 'text'"),
            ((X, {"boxes": None}), "the boxes of sample 7 is None"),
        ],
        ids=range(5),
    )
    def test_anything_else_is_refused(self, item, message):
        with pytest.raises(BadSample, match=message.replace("tensor.*", r"tensor[\s\S]*")):
            to_sample(item, 7)

    def test_samples_of_different_shape_cannot_be_stacked(self):
        source = MapSource([(torch.zeros(2), 0), (torch.zeros(3), 0)], seed=0)
        with pytest.raises(BadSample, match="the input of sample 1 is float32 3, that of sample 0 float32 2"):
            source.batch(np.array([0, 1]))

    def test_dictionaries_stay_apart_and_move_together(self):
        source = InMemorySource(X, [{"boxes": torch.rand(n, 4, dtype=torch.float64)} for n in range(4)])
        batch = source.batch(np.array([3, 0]))
        assert [len(target["boxes"]) for target in batch.targets] == [3, 0]
        moved = batch.to(torch.device("cpu"), torch.float16)
        assert moved.inputs.dtype == moved.targets[0]["boxes"].dtype == torch.float16

    def test_whole_number_targets_keep_their_type(self):
        moved = Batch(inputs=torch.zeros(2, 1, dtype=torch.uint8), targets=Y[:2]).to(torch.device("cpu"), torch.float32)
        assert (moved.inputs.dtype, moved.targets.dtype) == (torch.float32, torch.int64)

    def test_a_source_is_stacked_sample_by_sample(self):
        class Squares(Source):
            def __len__(self):
                return 9

            def sample(self, index):
                return to_sample((torch.tensor([index**2]), index), index)

        assert Squares().batch(np.array([3, 8])).inputs.tolist() == [[9], [64]]
        assert collate([Squares().sample(2)], np.array([2])).targets.tolist() == [2]
