"""Ranks that meet from different layers: in shared memory, in debug mode, and on the bare process group.

Each of the ways has to name the layers instead of hanging or, worse, adding up what does not belong together.
"""

import re
import time
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from syncbn.collectives import all_reduce_sum, resolve_group
from syncbn.errors import CollectiveError, DivergenceError
from tests.ranks import run_ranks

FIRST = "forward of backbone.bn1 (64 channels, torch.float32)"
SECOND = "backward of backbone.bn2 (32 channels, torch.float32)"
DEBUG = {"SYNCBN_SHARED_MEMORY": "0", "SYNCBN_DEBUG": "1"}
PLAIN = {"SYNCBN_SHARED_MEMORY": "0", "SYNCBN_DEBUG": "0"}
WAYS = {"shared memory": {"SYNCBN_SHARED_MEMORY": "1", "SYNCBN_DEBUG": "0"}, "debug mode": DEBUG}


@contextmanager
def environment(variables):
    """The ranks stay warm between tests, so what is set is taken back."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


def _meet(rank, variables, meetings):
    with environment(variables):
        group = resolve_group(None)
        for label, num_values in meetings[rank]:
            payload = torch.ones(num_values, dtype=torch.float64)
            try:
                all_reduce_sum(payload, group, label)
            except DivergenceError as error:
                return str(error)
            assert payload.tolist() == [float(len(meetings))] * num_values
        return None


@pytest.mark.parametrize("way", WAYS)
def test_different_labels_are_named_on_every_rank(way):
    same = ("forward of stem", 3)
    texts = run_ranks(4, _meet, WAYS[way], [[same, (FIRST, 129)], [same, (SECOND, 129)]] * 2)
    for text in texts:
        assert f"ranks 0, 2 in the {FIRST} with 129 values; ranks 1, 3 in the {SECOND} with 129 values" in text


@pytest.mark.parametrize("way", WAYS)
def test_different_lengths_are_named_on_every_rank(way):
    # 20000 values are more than one chunk of shared memory, so the ranks would not even take as many rounds.
    texts = run_ranks(3, _meet, WAYS[way], [[(FIRST, 129)], [(FIRST, 129)], [(FIRST, 20000)]])
    for text in texts:
        assert f"ranks 0, 1 in the {FIRST} with 129 values; rank 2 in the {FIRST} with 20000 values" in text


@pytest.mark.parametrize("way", WAYS)
def test_long_labels_of_one_path_are_told_apart(way):
    path = "forward of " + 15 * "block." + "é"  # the character may not be cut in two either
    texts = run_ranks(2, _meet, WAYS[way], [[(path + "bn1", 5)], [(path + "bn2", 5)]])
    for text in texts:
        assert f"rank 0 in the {path}bn1 with 5 values; rank 1 in the {path}bn2" in text


@pytest.mark.parametrize("way", WAYS)
def test_equal_labels_of_any_length_meet(way):
    label = "forward of " + 300 * "é"
    assert run_ranks(2, _meet, WAYS[way], [[(label, 5), ("", 2)]] * 2) == [None, None]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shift", [0, 1])  # a cut may fall between two characters or within one
def test_labels_that_are_too_long_keep_their_ends_and_are_told_apart_in_between(way, shift):
    first, second = (f"forward of {shift * 'x'}{50 * 'é'}{middle}{100 * 'é'}.bn1 (64 channels)" for middle in "ab")
    texts = run_ranks(2, _meet, WAYS[way], [[(first, 5)], [(second, 5)]])
    for text in texts:
        assert (
            len(re.findall(r"rank [01] in the forward of x?é+…é+\.bn1 \(64 channels\) #[0-9a-f]{8} with 5", text)) == 2
        )


def _in_a_subgroup(rank, variables):
    with environment(variables):
        group = dist.new_group([1, 2])
        if rank == 0:
            return None
        with pytest.raises(DivergenceError) as caught:
            all_reduce_sum(torch.ones(2, dtype=torch.float64), group, f"layer {rank}")
        return str(caught.value)


@pytest.mark.parametrize("way", WAYS)
def test_ranks_of_a_subgroup_are_named_by_their_global_ranks(way):
    for text in run_ranks(3, _in_a_subgroup, WAYS[way])[1:]:
        assert "rank 1 in the layer 1 with 2 values; rank 2 in the layer 2 with 2 values" in text


def _count_in_debug_mode(rank, dtype):
    with environment(DEBUG):
        group, payload = resolve_group(None), torch.ones(9, dtype=dtype)
        all_reduce_sum(payload, group, FIRST)
        with torch.autograd.profiler.profile() as profile, pytest.raises(DivergenceError):
            all_reduce_sum(payload, group, f"layer {rank}")
        all_reduce_sum(payload, group, SECOND)  # the group itself has lost nothing
        return [e.name for e in profile.function_events if e.name.startswith("c10d::")], payload.tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_debug_mode_tells_within_one_collective_for_any_payload(dtype):
    assert run_ranks(2, _count_in_debug_mode, dtype) == [(["c10d::allgather_"], [4.0] * 9)] * 2


def _one_does_not_come(rank):
    with environment(PLAIN):
        group = dist.new_group([0, 1], timeout=timedelta(seconds=1))
        all_reduce_sum(torch.ones(2, dtype=torch.float64), group, "forward of stem")
        text = None
        if rank == 0:
            started = time.monotonic()
            with pytest.raises(CollectiveError) as caught:
                all_reduce_sum(torch.ones(2, dtype=torch.float64), group, FIRST)
            assert time.monotonic() - started < 5
            assert isinstance(caught.value.__cause__, RuntimeError)
            text = str(caught.value)
        dist.barrier()
        return text


def test_without_either_the_group_s_timeout_names_the_label():
    text, _ = run_ranks(2, _one_does_not_come)
    assert f"the all-reduce of {FIRST} failed on rank 0 of 2 (gloo, 2 values)" in text
    assert "Timed out" in text
