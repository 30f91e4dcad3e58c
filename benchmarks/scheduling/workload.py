"""Jobs as clusters see them: most are small and short, a few hold a large part of the cluster for days."""

import math
import random
from dataclasses import dataclass

from service.domain.placement import Layout, Resources
from service.domain.queue import Queue, Quota

GPUS_PER_NODE = 8
CPUS_PER_NODE = 64.0
MEMORY_PER_NODE_BYTES = 512 * 2**30

# Sizes in GPUs and how often they occur; in traces of training clusters most jobs use one GPU or one machine.
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_FREQUENCIES = (0.38, 0.12, 0.14, 0.20, 0.08, 0.05, 0.02, 0.008, 0.002)
# Of the logarithm of the duration: the mean is 4 times the median.
_SIGMA = 1.7
_LONGEST_S = 3 * 86400.0
_SHORTEST_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Load:
    """What comes to a cluster.

    Attributes:
        num_jobs: how many jobs.
        num_gpus: of the cluster, in nodes of 8.
        duration_s: until when jobs arrive.
        load: GPU time asked for over what the cluster has in that time; above 1 there is a backlog.
        backlog: part of the jobs that is there at the beginning.
        estimates: ``exact``, ``rough`` or ``none``: what is known of how long jobs run.
        elastic: part of the jobs that may run on fewer workers.
        urgent: part of the jobs that has a higher priority.
        seed: of all that is drawn.
    """

    num_jobs: int = 10_000
    num_gpus: int = 1000
    duration_s: float = 7 * 86400.0
    load: float = 1.3
    backlog: float = 0.3
    estimates: str = "rough"
    elastic: float = 0.1
    urgent: float = 0.03
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class SimulatedJob:
    """A job and what only time will tell of it.

    Attributes:
        arrives_s: when it is submitted.
        work_s: how long it computes on its largest world.
        expected_s: what its owner says of that; None: nothing.
        is_measured: while it runs, how long it still will is known from its progress.
        max_preemptions: how often it may be stopped for others.
    """

    id: str
    queue: str
    owner: str
    priority: int
    sequence: int
    worlds: tuple[int, ...]
    per_rank: Resources
    layout: Layout
    arrives_s: float
    work_s: float
    expected_s: float | None
    is_measured: bool
    max_preemptions: int


def make_queues() -> tuple[Queue, ...]:
    """Return queues of unequal weights; one owner may not have all of the last one."""
    return (
        Queue(name="research", weight=4.0),
        Queue(name="product", weight=3.0),
        Queue(name="default", weight=2.0),
        Queue(name="students", weight=1.0, quota_per_owner=Quota(gpus=128, jobs=100)),
    )


def make_jobs(load: Load, queues: tuple[Queue, ...]) -> list[SimulatedJob]:
    """Return jobs in the order in which they arrive; every queue gets work in proportion to its weight."""
    rng = random.Random(load.seed)
    largest = max(1, load.num_gpus // 4)
    sizes = [size for size in _SIZES if size <= largest]
    drawn = [
        (rng.choices(sizes, _FREQUENCIES[: len(sizes)])[0], rng.lognormvariate(0.0, _SIGMA))
        for _ in range(load.num_jobs)
    ]
    goal_s = load.load * load.num_gpus * load.duration_s
    unit_s = _unit(drawn, goal_s)
    owed = {queue.name: 0.0 for queue in queues}
    jobs = []
    for sequence, (size, length) in enumerate(drawn):
        work_s = _clipped(length * unit_s)
        # To the queue that has the least work for its weight, so that all have a backlog as long as any has.
        queue = min(queues, key=lambda queue: owed[queue.name] / queue.weight)
        owed[queue.name] += size * work_s
        has_backlog = rng.random() < load.backlog
        arrives_s = 0.0 if has_backlog else rng.random() * load.duration_s
        is_elastic = size > 1 and rng.random() < load.elastic
        jobs.append(
            SimulatedJob(
                id=f"job-{sequence}",
                queue=queue.name,
                owner=f"{queue.name}-{rng.randrange(5)}",
                priority=rng.choice((5, 10)) if rng.random() < load.urgent else 0,
                sequence=sequence,
                worlds=tuple(size // 2**halved for halved in range(int(math.log2(size)) + 1))
                if is_elastic
                else (size,),
                per_rank=Resources(
                    cpus=rng.choice((2.0, 4.0, 8.0)), gpus=1, memory_bytes=rng.choice((16, 32, 64)) * 2**30
                ),
                layout="spread" if rng.random() < 0.05 else "pack",
                arrives_s=arrives_s,
                work_s=work_s,
                expected_s=_expected(work_s, load.estimates, rng),
                is_measured=load.estimates == "exact" or (load.estimates == "rough" and rng.random() < 0.7),
                max_preemptions=rng.choice((0, 3, 10)),
            )
        )
    jobs.sort(key=lambda job: (job.arrives_s, job.sequence))
    return jobs


def _expected(work_s: float, estimates: str, rng: random.Random) -> float | None:
    if estimates == "exact":
        return work_s
    if estimates == "none" or rng.random() < 0.15:
        return None
    # Most people ask for more than they need; some for less.
    return work_s * rng.choice((0.7, 1.0, 1.0, 1.2, 1.5, 2.0, 3.0))


def _clipped(work_s: float) -> float:
    return min(max(work_s, _SHORTEST_S), _LONGEST_S)


def _unit(drawn: list[tuple[int, float]], goal_s: float) -> float:
    """Return the unit of length in which all jobs together come to so much GPU time; by bisection."""
    low, high = 1e-3, 1e7
    for _ in range(60):
        middle = math.sqrt(low * high)
        total_s = sum(size * _clipped(length * middle) for size, length in drawn)
        low, high = (middle, high) if total_s < goal_s else (low, middle)
    return low
