"""Streams by number. A failure here shows as ranks that train on overlapping samples, or a resume on other ones."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.training.data.source import Sample, Stream
from service.training.data.stream import ShuffledStream, StreamCursor
from service.training.errors import BadSample


class Counting(Stream):
    """Yields (epoch, number), and notes how often it began and what it made."""

    def __init__(self, lengths, num_samples):
        self.lengths = lengths
        self.num_samples = num_samples
        self.begun = []
        self.made = []

    def read(self, epoch):
        self.begun.append(epoch)
        for number in range(self.lengths[epoch % len(self.lengths)]):
            yield lambda number=number: self.made.append(number) or Sample(torch.tensor([epoch, number]), None)


def numbers(samples):
    return [tuple(sample.input.tolist()) for sample in samples]


def order(stream, epoch):
    return numbers(item() for item in stream.read(epoch))


@given(length=st.integers(0, 60), buffer_size=st.integers(1, 70), seed=st.integers(0, 2**63 - 1))
def test_a_shuffled_stream_has_every_sample_once_in_an_order_of_its_own(length, buffer_size, seed):
    def shuffled(epoch):
        return order(ShuffledStream(Counting([length], length), buffer_size=buffer_size, seed=seed), epoch)

    assert sorted(shuffled(1)) == [(1, number) for number in range(length)]
    assert shuffled(1) == shuffled(1)
    if buffer_size == 1:
        assert shuffled(1) == sorted(shuffled(1))
    # A sample comes out at most as many places early as the buffer holds.
    assert all(number - place <= buffer_size - 1 for place, (_, number) in enumerate(shuffled(1)))


def test_every_epoch_and_seed_has_another_order():
    def shuffled(seed, epoch):
        stream = ShuffledStream(Counting([50], 50), buffer_size=10, seed=seed)
        return [number for _, number in order(stream, epoch)]

    orders = [shuffled(0, 0), shuffled(0, 1), shuffled(1, 0), list(range(50))]
    assert all(first != second for place, first in enumerate(orders) for second in orders[:place])


def test_a_long_buffer_mixes_well():
    """The places of a permutation's samples are spread: every pair of halves exchanges about half of its samples."""
    stream = ShuffledStream(Counting([2000], 2000), buffer_size=2000, seed=3)
    first_half = {number for _, number in order(stream, 0)[:1000]}
    # Hypergeometric: 500 ± 11.
    assert abs(len(first_half & set(range(1000))) - 500) < 60


def test_only_samples_that_are_asked_for_are_made():
    stream = Counting([100], 100)
    cursor = StreamCursor(stream)
    assert numbers(cursor.samples(0, np.array([5, 3, 5]))) == [(0, 5), (0, 3), (0, 5)]
    assert numbers(cursor.samples(0, np.array([6, 90]))) == [(0, 6), (0, 90)]
    assert sorted(stream.made) == [3, 5, 6, 90]
    assert stream.begun == [0]


def test_going_back_begins_the_epoch_again():
    stream = Counting([100], 100)
    cursor = StreamCursor(stream)
    for epoch, number in ((2, 50), (2, 49), (3, 60), (2, 70)):
        assert numbers(cursor.samples(epoch, np.array([number]))) == [(epoch, number)]
    assert stream.begun == [2, 2, 3, 2]


@given(world_size=st.integers(1, 4), first_batch=st.integers(0, 9))
def test_ranks_share_a_stream_without_overlap_whether_resumed_or_not(world_size, first_batch):
    stream = ShuffledStream(Counting([60], 60), buffer_size=7, seed=5)
    everything = order(stream, 1)
    cursors = [StreamCursor(stream) for _ in range(world_size)]
    for batch in range(first_batch, 10):
        rows = np.array_split(np.arange(6 * batch, 6 * batch + 6), world_size)
        found = [pair for cursor, part in zip(cursors, rows, strict=True) for pair in numbers(cursor.samples(1, part))]
        assert found == everything[6 * batch : 6 * batch + 6]


def test_a_stream_of_unknown_length_begins_again_where_it_ends():
    stream = Counting([3, 2], None)
    expected = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    assert numbers(StreamCursor(stream).samples(0, np.arange(8))) == expected
    assert numbers(StreamCursor(stream).samples(0, np.array([7, 4]))) == [expected[7], expected[4]]


@pytest.mark.parametrize(
    ("lengths", "num_samples", "message"),
    [([4], 5, "ended after 4 samples, but its length says 5"), ([0], None, "ended after 0 samples")],
)
def test_a_stream_that_ends_too_early_is_told(lengths, num_samples, message):
    with pytest.raises(BadSample, match=message):
        StreamCursor(Counting(lengths, num_samples)).samples(0, np.array([4]))


def test_after_an_error_the_numbers_are_right():
    class Flaky(Counting):
        broken = True

        def read(self, epoch):
            for place, item in enumerate(super().read(epoch)):
                if place == 2 and self.broken:
                    self.broken = False
                    raise ConnectionError("gone")
                yield item

    cursor = StreamCursor(Flaky([5], 5))
    with pytest.raises(ConnectionError):
        cursor.samples(0, np.array([4]))
    assert numbers(cursor.samples(0, np.array([4]))) == [(0, 4)]
