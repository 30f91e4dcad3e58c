"""The harness that the tests of several ranks stand on: a failure here makes every other result of theirs doubtful."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.ranks import RankError, run_ranks

ROOT = Path(__file__).parents[3]


def _reduce(rank, value):
    import torch
    import torch.distributed as dist

    total = torch.tensor([value * (rank + 1)])
    dist.all_reduce(total)
    listening = [c.laddr.ip for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
    return total.item(), torch.get_num_threads(), listening


@pytest.mark.parametrize("world_size", [1, 3, 2])
def test_ranks_form_a_group_on_loopback(world_size):
    results = run_ranks(world_size, _reduce, 2.0)
    assert [total for total, _, _ in results] == [world_size * (world_size + 1)] * world_size
    assert [threads for _, threads, _ in results] == [1] * world_size
    assert {ip for _, _, listening in results for ip in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def _raise_on_one(rank):
    import torch
    import torch.distributed as dist

    if rank == 1:
        raise KeyError("of rank one")
    dist.all_reduce(torch.zeros(1))


def test_the_first_failure_is_reported_with_its_traceback():
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2: Traceback.*_raise_on_one.*KeyError") as caught:
        run_ranks(2, _raise_on_one)
    assert isinstance(caught.value.__cause__, KeyError)


def _die_on_one(rank):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def test_a_killed_rank_is_reported_at_once():
    with pytest.raises(RankError, match="rank 1 of 2: ended with exit code -9"):
        run_ranks(2, _die_on_one)
    run_ranks(2, _reduce, 1.0)


def _sleep_on_one(rank):
    time.sleep(60 * rank)


def test_a_rank_that_does_not_finish_misses_the_deadline():
    with pytest.raises(RankError, match=r"ranks \[1\] of 2 did not finish"):
        run_ranks(2, _sleep_on_one, timeout_s=1)


def _pid(rank):
    return os.getpid()


def _parent_pid(rank):
    return os.getppid()


def test_nothing_outlives_a_killed_caller():
    caller = subprocess.Popen(
        [sys.executable, __file__], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert caller.stdout is not None
    with caller.stdout:
        pids = [int(pid) for pid in caller.stdout.readline().split()]
        caller.kill()
        caller.wait(timeout=30)
    assert len(pids) == 3
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive


if __name__ == "__main__":
    fork_server, *ranks = run_ranks(1, _parent_pid) + run_ranks(2, _pid)
    print(fork_server, *ranks, flush=True)
    time.sleep(60)
