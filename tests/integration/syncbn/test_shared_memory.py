"""The exchange in shared memory between real processes: what it computes, what it leaves behind, how it ends.

Processes that a test kills or stops are its own; all others are the warm ones of `run_ranks`.
"""

import logging
import multiprocessing
import os
import random
import signal
import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from syncbn import SyncBatchNorm
from syncbn.collectives import all_reduce_sum, resolve_group
from syncbn.errors import CollectiveError
from syncbn.shared_memory import Obstacle, SharedMemoryExchange
from tests.ranks import run_ranks

LABEL = "forward of backbone.bn1 (64 channels, torch.float32)"
SLOT_VALUES = 8192  # what one chunk holds


class Messages(logging.Handler):
    """What the library logs while this is in use."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())

    def __enter__(self):
        self.logger = logging.getLogger("syncbn")
        self.level = self.logger.level
        self.logger.setLevel(logging.DEBUG)
        self.logger.addHandler(self)
        return self.texts

    def __exit__(self, *_):
        self.logger.removeHandler(self)
        self.logger.setLevel(self.level)


def new_exchange(group=None):
    """Meets once in a group; asserts that this was in shared memory."""
    group = resolve_group(group)
    with Messages() as texts:
        all_reduce_sum(torch.ones(1, dtype=torch.float64), group, "the first meeting")
    assert any("reduce in shared memory" in text for text in texts), texts
    return group


def _sums(rank, lengths):
    group = new_exchange()
    results = []
    for length in lengths:
        mine = torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(100 * length + rank))
        total, by_gloo = mine.clone(), mine.clone()
        all_reduce_sum(total, group, LABEL)
        dist.all_reduce(by_gloo)
        results.append((mine, total, by_gloo))
    return results


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_rank_gets_the_sum_in_rank_order(world_size):
    lengths = [0, 1, 129, SLOT_VALUES, SLOT_VALUES + 1, 3 * SLOT_VALUES + 7]
    results = run_ranks(world_size, _sums, lengths)
    for at in range(len(lengths)):
        in_rank_order = sum((of_rank[at][0] for of_rank in results[1:]), start=results[0][at][0].clone())
        for of_rank in results:
            _, total, by_gloo = of_rank[at]
            assert torch.equal(total, in_rank_order)
            # All values are positive, so each of the at most three additions errs by at most 2⁻⁵³ of the sum.
            torch.testing.assert_close(total, by_gloo, rtol=1e-15, atol=0)


def _random_calls(rank, num_calls):
    group = new_exchange()
    world_size, shared, own = group.size(), random.Random(0), random.Random(rank)
    for call in range(num_calls):
        length = shared.choice([1, 33, 129, 1025, SLOT_VALUES + 1])
        payload = torch.full((length,), float((rank + 1) * call), dtype=torch.float64)
        until = time.perf_counter() + own.choice([0, 0, 1e-5, 1e-4, 1e-3])
        while time.perf_counter() < until:  # a rank that is busy with something else
            pass
        all_reduce_sum(payload, group, f"call {call}")
        assert bool((payload == call * world_size * (world_size + 1) / 2).all()), call
    return True


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_thousand_calls_of_random_lengths_at_random_times(world_size):
    assert all(run_ranks(world_size, _random_calls, 1000, timeout_s=60))


def _communication(rank):
    group = new_exchange()
    payload = torch.ones(129, dtype=torch.float64)
    with torch.autograd.profiler.profile() as profile:
        all_reduce_sum(payload, group, LABEL)
        all_reduce_sum(payload.float(), group, LABEL)
    return [event.name for event in profile.function_events if event.name.startswith("c10d::")]


def test_only_other_payloads_go_through_the_process_group():
    assert run_ranks(2, _communication) == [["c10d::allreduce_"]] * 2


def _several_groups(rank):
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    outer, half = new_exchange(), new_exchange(halves[rank // 2])
    sums = []
    for call in range(50):
        inner = torch.tensor([float(rank + call)], dtype=torch.float64)
        all_reduce_sum(inner, half, f"inner {call} of half {rank // 2}")
        everywhere = inner.clone()
        all_reduce_sum(everywhere, outer, f"outer {call}")
        sums.append((inner.item(), everywhere.item()))
    return sums


def test_disjoint_and_nested_groups_each_have_their_own():
    results = run_ranks(4, _several_groups)
    for rank, sums in enumerate(results):
        assert sums == [(2 * call + (1 if rank < 2 else 5), 2 * (4 * call + 6)) for call in range(50)]


class _ReduceBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, call):
        ctx.group, ctx.call = group, call
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone()
        all_reduce_sum(total, ctx.group, f"backward {ctx.call}")
        return total, None, None


def _from_other_threads(rank):
    group = new_exchange()
    x = torch.ones(5, dtype=torch.float64, requires_grad=True)
    y = x
    for call in range(20):
        y = _ReduceBackward.apply(y, group, call)
    thread = threading.Thread(target=(y * (rank + 1)).sum().backward)
    thread.start()
    thread.join()
    assert x.grad is not None
    return x.grad.tolist()


def test_calls_from_a_backward_on_another_thread():
    # The first reduce sums 1 + 2; each of the 19 after it doubles.
    assert run_ranks(2, _from_other_threads) == [[3.0 * 2**19] * 5] * 2


def _threads_at_once(rank):
    group = new_exchange()

    def reduce_often():
        for _ in range(200):
            payload = torch.ones(3, dtype=torch.float64)
            all_reduce_sum(payload, group, LABEL)
            results.append(payload.tolist())

    results = []
    threads = [threading.Thread(target=reduce_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_of_one_process_take_turns():
    assert run_ranks(2, _threads_at_once) == [[[2.0] * 3] * 800] * 2


def _python_runs_while_waiting(rank):
    group = new_exchange()
    store = dist.distributed_c10d._get_default_store()
    if rank == 1:
        store.wait(["the other thread ran"])
    else:
        threading.Thread(target=store.set, args=("the other thread ran", "")).start()
    all_reduce_sum(torch.ones(1, dtype=torch.float64), group, LABEL)


def test_a_wait_holds_no_python_lock():
    # Rank 1 comes only after a thread of rank 0 has run, most often while rank 0 waits.
    run_ranks(2, _python_runs_while_waiting, timeout_s=10)


def _switched_off_on_one(rank):
    with pytest.MonkeyPatch.context() as patch, Messages() as texts:
        if rank == 1:
            patch.setenv("SYNCBN_SHARED_MEMORY", "0")
        return _reduce_and_count(rank), texts


def _without_library_on_one(rank):
    with pytest.MonkeyPatch.context() as patch, Messages() as texts:
        if rank == 1:
            patch.setattr("syncbn.native.available", lambda: False)
        return _reduce_and_count(rank), texts


def _reduce_and_count(rank):
    group, payload = resolve_group(None), torch.full((9,), rank + 1.0, dtype=torch.float64)
    all_reduce_sum(payload, group, LABEL)
    with torch.autograd.profiler.profile() as profile:
        all_reduce_sum(payload, group, LABEL)
    names = [event.name for event in profile.function_events if event.name.startswith("c10d::")]
    return payload.tolist(), names


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (_switched_off_on_one, "rank 1: SYNCBN_SHARED_MEMORY=0"),
        (_without_library_on_one, "rank 1: the native library is not loaded"),
    ],
)
def test_one_rank_that_cannot_sends_all_to_the_process_group(function, reason):
    for (payload, names), texts in run_ranks(3, function):
        assert payload == [18.0] * 9
        assert names == ["c10d::allreduce_"]
        (text,) = [text for text in texts if text.startswith("group ")]
        assert reason in text


def _as_from_another_host(rank, wrong_fd):
    def gather(values):
        mine, rows = torch.tensor(values), [torch.empty(len(values), dtype=torch.int64) for _ in range(2)]
        dist.all_gather(rows, mine)
        rows = [row.tolist() for row in rows]
        if rank == 1 and len(values) > 1:  # the process and the file of these numbers are others there
            rows[0][1] = os.getpid()
            rows[0][3] = decoy
        return rows

    decoy = os.memfd_create("syncbn-decoy") if wrong_fd == "memory" else os.open("/dev/null", os.O_RDWR)
    try:
        return SharedMemoryExchange.set_up(rank, 2, 10.0, gather)
    finally:
        os.close(decoy)


@pytest.mark.parametrize("wrong_fd", ["memory", "file"])
def test_numbers_that_mean_other_memory_are_not_believed(wrong_fd):
    assert run_ranks(2, _as_from_another_host, wrong_fd) == [[Obstacle.NONE, Obstacle.NOT_SHARED]] * 2


def _left_behind(rank):
    dist.all_reduce(torch.ones(1))  # gloo opens its connections at first use
    dist.barrier()
    files, mappings, names = _open_files(), _mappings(), set(os.listdir("/dev/shm"))
    group = new_exchange()
    in_use = _open_files() - files, _mappings() - mappings, set(os.listdir("/dev/shm")) - names
    dist.barrier()
    del group
    dist.destroy_process_group()
    return in_use, (_open_files() - files, _mappings() - mappings)


def _open_files():
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add((fd, os.readlink(f"/proc/self/fd/{fd}")))
        except FileNotFoundError:  # the descriptor that lists the folder
            continue
    return found


def _mappings():
    return {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "memfd" in line}


def test_nothing_has_a_name_and_nothing_stays_open():
    for (files, mappings, names), after in run_ranks(3, _left_behind):
        assert [target for _, target in files] == ["anon_inode:[pidfd]"] * 2
        assert ["/memfd:syncbn-" in mapping for mapping in mappings] == [True]
        assert not names
        assert after == (set(), set())


def _twice(rank, folder):
    totals = []
    for turn in range(2):
        if turn:
            dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/again", 2), rank=rank, world_size=2)
        group, payload = new_exchange(), torch.tensor([rank + 1.0], dtype=torch.float64)
        all_reduce_sum(payload, group, LABEL)
        totals.append(payload.item())
        dist.barrier()
        dist.destroy_process_group()
    return totals


def test_a_new_group_in_the_same_processes_works_again(tmp_path):
    assert run_ranks(2, _twice, str(tmp_path)) == [[3.0, 3.0]] * 2


def _in_a_forked_child(rank, in_backward):
    group = new_exchange()
    output = SyncBatchNorm(3)(torch.randn(2, 3, requires_grad=True))
    pid = os.fork()
    if pid == 0:
        try:
            if in_backward:
                output.sum().backward()
            all_reduce_sum(torch.ones(1, dtype=torch.float64), group, LABEL)
        except CollectiveError as error:
            os._exit(42 if "forked child" in str(error) else 1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    payload = torch.ones(1, dtype=torch.float64)
    all_reduce_sum(payload, group, LABEL)
    return os.waitstatus_to_exitcode(status), payload.item()


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_forked_child_is_refused_and_leaves_its_parent_alone(in_backward):
    assert run_ranks(2, _in_a_forked_child, in_backward) == [(42, 2.0)] * 2


def _one_leaves(rank):
    world, pair = resolve_group(None), dist.new_group([0, 1])
    new_exchange(pair)
    if rank == 0:
        started = time.monotonic()
        with pytest.raises(CollectiveError, match="rank 1 ended or left the group") as caught:
            all_reduce_sum(torch.ones(1, dtype=torch.float64), pair, LABEL)
        elapsed_s = time.monotonic() - started
    else:
        dist.destroy_process_group(pair)
        del pair
    dist.barrier(world)
    return (str(caught.value), elapsed_s) if rank == 0 else None


def test_a_rank_that_leaves_the_group_is_noticed():
    text, elapsed_s = run_ranks(2, _one_leaves)[0]
    assert LABEL in text
    assert elapsed_s < 5  # not the group's 24 s


def _one_does_not_come(rank):
    pair = dist.new_group([0, 1, 2], timeout=timedelta(seconds=1))
    new_exchange(pair)
    outcomes = []
    if rank != 1:
        for _ in range(2):
            started = time.monotonic()
            with pytest.raises(CollectiveError) as caught:
                all_reduce_sum(torch.ones(7, dtype=torch.float64), pair, LABEL)
            outcomes.append((str(caught.value), time.monotonic() - started))
    dist.barrier()
    if rank == 1:
        with pytest.raises(CollectiveError) as caught:
            all_reduce_sum(torch.ones(7, dtype=torch.float64), pair, "a layer further on")
        outcomes.append((str(caught.value), 0.0))
    return outcomes


def test_who_does_not_come_in_the_group_s_time_is_named_and_later_refused():
    results = run_ranks(3, _one_does_not_come)
    for rank in (0, 2):
        (text, elapsed_s), (again, again_s) = results[rank]
        assert f"the all-reduce of {LABEL} failed on rank {rank} of 3 (shared memory, 7 values)" in text
        assert "rank 1 did not come in time" in text
        assert 0.9 < elapsed_s < 5
        assert "an earlier exchange failed" in again
        assert "rank 1 did not come" in again
        assert again_s < 0.5
    ((late, _),) = results[1]
    assert "the all-reduce of a layer further on failed on rank 1" in late
    assert "an earlier exchange failed" in late
    assert LABEL in late


class OwnRank:
    """A rank in a process that the test may kill; it does what it is told over a connection."""

    def __init__(self, rank, world_size, store, timeout_s, function):
        context = multiprocessing.get_context("forkserver")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_own_rank, args=(theirs, rank, world_size, store, timeout_s, function), daemon=True
        )
        self.process.start()
        theirs.close()

    def receive(self, timeout_s=30):
        assert self.connection.poll(timeout_s), "the rank did not answer"
        return self.connection.recv()

    def wait_until_asleep(self):
        """Until it waits for its peers: slices of its wait show as context switches, and running Python as none."""
        process, deadline = psutil.Process(self.process.pid), time.monotonic() + 20
        first = process.num_ctx_switches().voluntary
        while process.num_ctx_switches().voluntary < first + 5:
            assert time.monotonic() < deadline
            os.sched_yield()


def _own_rank(connection, rank, world_size, store, timeout_s, function):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    connection.send(function(rank, connection))
    os._exit(0)  # as a rank that ends without leaving its group


@contextmanager
def own_ranks(folder, world_size, function, timeout_s=20.0):
    ranks = [OwnRank(rank, world_size, str(folder / "store"), timeout_s, function) for rank in range(world_size)]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.join(10)
            rank.process.close()
            rank.connection.close()


def _meet_when_told(rank, connection):
    group = new_exchange()
    connection.send("met")
    connection.recv()
    payload, started = torch.ones(129, dtype=torch.float64), time.monotonic()
    try:
        all_reduce_sum(payload, group, LABEL)
    except CollectiveError as error:
        return str(error), time.monotonic() - started, time.monotonic()
    return "", time.monotonic() - started, time.monotonic()


def _tell(ranks):
    for rank in ranks:
        rank.connection.send("go")


def test_a_killed_rank_ends_the_wait_of_the_others_within_a_second(tmp_path):
    names = set(os.listdir("/dev/shm"))
    with own_ranks(tmp_path, 3, _meet_when_told) as ranks:
        for rank in ranks:
            assert rank.receive() == "met"
        _tell([ranks[0], ranks[2]])
        ranks[0].wait_until_asleep()
        ranks[2].wait_until_asleep()
        killed_at = time.monotonic()
        ranks[1].process.kill()
        for at in (0, 2):
            text, _, ended_at = ranks[at].receive()
            assert "rank 1 ended or left the group" in text
            assert f"ranks 0, 2 in the {LABEL} with 129 values" in text
            assert ended_at - killed_at < 1
    assert {name for name in set(os.listdir("/dev/shm")) - names if "syncbn" in name} == set()


def _backward_when_told(rank, connection):
    layer = SyncBatchNorm(6)
    layer.name = "stem"
    loss = layer(torch.randn(2, 6, requires_grad=True)).sum()
    connection.send("forward is done")
    connection.recv()
    try:
        loss.backward()
    except CollectiveError as error:
        return str(error), time.monotonic()
    return "", time.monotonic()


def test_a_killed_rank_ends_the_backward_of_the_others_within_a_second(tmp_path):
    with own_ranks(tmp_path, 2, _backward_when_told) as ranks:
        for rank in ranks:
            assert rank.receive() == "forward is done"
        _tell([ranks[0]])
        ranks[0].wait_until_asleep()
        killed_at = time.monotonic()
        ranks[1].process.kill()
        text, ended_at = ranks[0].receive()
        assert "rank 1 ended or left the group" in text
        assert "the all-reduce of backward of stem (6 channels, torch.float32) failed on rank 0 of 2" in text
        assert ended_at - killed_at < 1


def test_a_stopped_rank_ends_the_wait_at_the_group_s_timeout(tmp_path):
    with own_ranks(tmp_path, 2, _meet_when_told, timeout_s=2.0) as ranks:
        for rank in ranks:
            assert rank.receive() == "met"
        os.kill(ranks[1].process.pid, signal.SIGSTOP)
        _tell(ranks)
        text, elapsed_s, _ = ranks[0].receive()
        assert "rank 1 did not come in time" in text
        assert LABEL in text
        assert 1.9 < elapsed_s < 5
        os.kill(ranks[1].process.pid, signal.SIGCONT)
        text, elapsed_s, _ = ranks[1].receive()
        assert "an earlier exchange failed" in text
        assert elapsed_s < 1


def _end_after_arriving(rank, connection):
    group = new_exchange()
    connection.send("met")
    connection.recv()
    payload = torch.full((129,), rank + 1.0, dtype=torch.float64)
    all_reduce_sum(payload, group, LABEL)
    return payload.tolist()


def test_who_arrived_and_then_ended_does_not_fail_the_others(tmp_path):
    with own_ranks(tmp_path, 3, _end_after_arriving) as ranks:
        for rank in ranks:
            assert rank.receive() == "met"
        _tell(ranks[:2])
        ranks[0].wait_until_asleep()
        ranks[1].wait_until_asleep()
        ranks[0].process.kill()  # it has arrived: its payload is there
        ranks[0].process.join(10)
        ranks[1].wait_until_asleep()  # again, so it has looked who is gone
        ranks[2].connection.send("go")
        for rank in ranks[1:]:
            assert rank.receive() == [6.0] * 129


def _meet_until_it_fails(rank, connection):
    group = new_exchange()
    connection.send("met")
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        payload = torch.ones(9, dtype=torch.float64)
        try:
            all_reduce_sum(payload, group, LABEL)
        except CollectiveError as error:
            return str(error), time.monotonic()
        assert payload.tolist() == [3.0] * 9
    return "never failed", time.monotonic()


@pytest.mark.parametrize("delay_s", [0.0, 0.0003, 0.001, 0.01])
def test_a_rank_killed_at_any_point_of_a_call_hangs_no_one(tmp_path, delay_s):
    with own_ranks(tmp_path, 3, _meet_until_it_fails) as ranks:
        for rank in ranks:
            assert rank.receive() == "met"
        until = time.monotonic() + delay_s
        while time.monotonic() < until:
            pass
        killed_at = time.monotonic()
        ranks[1].process.kill()
        for at in (0, 2):
            text, ended_at = ranks[at].receive()
            assert "rank 1 ended or left the group" in text
            assert ended_at - killed_at < 1
