"""How long the all-reduce of a layer's statistics takes between processes of this host.

    python -m benchmarks.exchange

gloo's all_reduce, gloo's all_gather (what torch.nn.SyncBatchNorm's forward uses) and the exchange in shared memory
take turns in the same processes, over 2C + 1 float64 values: one call each, which is what a call costs between other
work (gloo's threads are still busy then, and the caches cold), and ten calls each, which is what it costs undisturbed.
Before every timed call the ranks meet, so that none is charged for another's delay in the call before. First checks
that shared memory is in use, and that its sums are equal on all ranks and to gloo's. Medians and 90th percentiles over
the calls of all ranks. Prints a table and writes JSON.
"""

import argparse
import logging
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import results
from syncbn.collectives import all_reduce_sum, resolve_group
from tests.ranks import run_ranks

WORLD_SIZES = (2, 4)
CHANNELS = (16, 64, 256, 512, 2048)
CALLS_IN_TURN = (1, 10)
WAYS = ("gloo all_reduce", "gloo all_gather", "shared memory")
NUM_WARM_UPS = 10
TARGET_RATIO = 10.0
TARGET_CHANNELS = range(64, 513)


class _Decisions(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def measure(rank: int, num_channels: int, num_calls: int, calls_in_turn: int) -> dict[str, list[float]]:
    """Seconds of each call on this rank, by way."""
    group, label = resolve_group(None), f"forward of backbone.bn1 ({num_channels} channels, torch.float32)"
    assert group is not None
    payload = torch.rand(2 * num_channels + 1, dtype=torch.float64)
    gathered = [torch.empty_like(payload) for _ in range(group.size())]
    meeting = torch.zeros(1, dtype=torch.float64)
    _check(payload, group, label)
    ways = {
        "gloo all_reduce": lambda values: dist.all_reduce(values, group=group),
        "gloo all_gather": lambda values: dist.all_gather(gathered, values, group=group),
        "shared memory": lambda values: all_reduce_sum(values, group, label),
    }
    times_s: dict[str, list[float]] = {way: [] for way in WAYS}
    for first_call in range(-NUM_WARM_UPS, num_calls, calls_in_turn):
        for way in WAYS:
            for _ in range(calls_in_turn):
                values = payload.clone()
                all_reduce_sum(meeting, group, "before the call")
                started = time.perf_counter()
                ways[way](values)
                elapsed_s = time.perf_counter() - started
                if first_call >= 0:
                    times_s[way].append(elapsed_s)
    return times_s


def _check(payload: torch.Tensor, group: dist.ProcessGroup, label: str) -> None:
    logger, decisions = logging.getLogger("syncbn"), _Decisions()
    logger.setLevel(logging.DEBUG)
    logger.addHandler(decisions)
    total, by_gloo = payload.clone(), payload.clone()
    all_reduce_sum(total, group, label)
    logger.removeHandler(decisions)
    assert any("reduce in shared memory" in text for text in decisions.texts), decisions.texts
    dist.all_reduce(by_gloo, group=group)
    torch.testing.assert_close(total, by_gloo, rtol=1e-15, atol=0)  # positive values, at most three additions
    everyone = [torch.empty_like(total) for _ in range(group.size())]
    dist.all_gather(everyone, total, group=group)
    assert all(torch.equal(other, total) for other in everyone), "the ranks' sums differ"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200, help="of each way on each rank")
    arguments = parser.parse_args()
    rows = [
        _row(world_size, num_channels, arguments.calls, calls_in_turn)
        for calls_in_turn in CALLS_IN_TURN
        for world_size in WORLD_SIZES
        for num_channels in CHANNELS
    ]
    worst = min(row["ratio_to_gloo_all_reduce"] for row in rows if row["channels"] in TARGET_CHANNELS)
    header = ["in turn", "ranks", "C", *(f"{way}, µs (p90)" for way in WAYS), "all_reduce / shared"]
    report = (
        f"Medians; least ratio to gloo's all_reduce at C = 64…512: {worst:.0f}× (target ≥ {TARGET_RATIO:g}×).\n\n"
        + results.table(header, [_cells(row) for row in rows])
    )
    configuration = {"calls_per_rank": arguments.calls, "dtype": "float64", "values": "2C + 1", "threads_per_rank": 1}
    results.record("exchange", {"configuration": configuration, "rows": rows}, report)


def _row(world_size: int, num_channels: int, num_calls: int, calls_in_turn: int) -> dict[str, Any]:
    of_ranks = run_ranks(world_size, measure, num_channels, num_calls, calls_in_turn, timeout_s=300)
    times_us = {way: [second * 1e6 for of_rank in of_ranks for second in of_rank[way]] for way in WAYS}
    median_us = {way: statistics.median(times) for way, times in times_us.items()}
    return {
        "calls_in_turn": calls_in_turn,
        "ranks": world_size,
        "channels": num_channels,
        "median_us": median_us,
        "p90_us": {way: statistics.quantiles(times, n=10, method="inclusive")[8] for way, times in times_us.items()},
        "ratio_to_gloo_all_reduce": median_us["gloo all_reduce"] / median_us["shared memory"],
        "ratio_to_gloo_all_gather": median_us["gloo all_gather"] / median_us["shared memory"],
    }


def _cells(row: dict[str, Any]) -> list[str]:
    times = [f"{row['median_us'][way]:.0f} ({row['p90_us'][way]:.0f})" for way in WAYS]
    where = [str(row[name]) for name in ("calls_in_turn", "ranks", "channels")]
    return [*where, *times, f"{row['ratio_to_gloo_all_reduce']:.0f}×"]


if __name__ == "__main__":
    main()
