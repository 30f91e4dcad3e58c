"""Discrete events: jobs arrive and end, nodes fail and return, and between them the policy decides."""

import heapq
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.scheduling.workload import (
    CPUS_PER_NODE,
    GPUS_PER_NODE,
    MEMORY_PER_NODE_BYTES,
    Load,
    SimulatedJob,
    make_jobs,
    make_queues,
)
from service.domain.placement import Node, Resources
from service.domain.queue import Queue
from service.domain.scheduling import Active, Decision, Pending, Reservation, accrued, decide

# Until the ranks of an attempt compute.
START_S = 20.0
# Between two checkpoints: what is lost with a node.
CHECKPOINT_INTERVAL_S = 600.0
# Asked to stop, an attempt takes a checkpoint.
STOP_S = (5.0, 60.0)
# An attempt runs for so long before it is interrupted to give it more workers.
RESIZE_INTERVAL_S = 300.0
# Its progress tells how long it will still run.
MEASURED_AFTER_S = 300.0
# An owner's estimate that has run out is put off by a part of what the job has run for.
OVERTIME = 0.1


@dataclass(kw_only=True)
class Running:
    """A job that holds resources."""

    job: SimulatedJob
    node_ids: tuple[str, ...]
    started_s: float
    done_s: float
    token: int
    next_node_ids: tuple[str, ...] = ()
    stops_s: float | None = None

    def computed_s(self, now_s: float) -> float:
        """Return how much of its work is done, as time on its largest world."""
        speed = len(self.node_ids) / self.job.worlds[0]
        return min(self.job.work_s, self.done_s + max(0.0, now_s - self.started_s - START_S) * speed)

    def ends_s(self) -> float:
        """Return when it is done if nothing happens."""
        speed = len(self.node_ids) / self.job.worlds[0]
        return self.started_s + START_S + (self.job.work_s - self.done_s) / speed


@dataclass(kw_only=True)
class Step:
    """One decision and what it was made of."""

    now_s: float
    pending: list[Pending]
    active: list[Active]
    nodes: list[Node]
    queues: tuple[Queue, ...]
    reservations: tuple[Reservation, ...]
    decision: Decision
    took_s: float


@dataclass(kw_only=True)
class Outcome:
    """What came of a simulation.

    Attributes:
        waits_s: of every job, from its submission to its first start.
        decisions_s: how long each decision took.
        sizes: jobs that waited and ran at each of them.
        gpu_s: GPU time held by each queue while all queues had work that waited.
        available_gpu_s: GPU time that the nodes had meanwhile.
        samples: time, GPUs held by queue, GPUs there, jobs that wait.
        num_preempted: how often a job was stopped for another.
        num_resized: how often one went on with other workers.
        num_lost: how often one lost a node.
        num_finished: jobs that came to their end.
        ended_s: when the last one did, or the time was over.
    """

    waits_s: dict[str, float] = field(default_factory=dict)
    decisions_s: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    gpu_s: Counter[str] = field(default_factory=Counter)
    available_gpu_s: float = 0.0
    samples: list[tuple[float, dict[str, int], int, int]] = field(default_factory=list)
    num_preempted: int = 0
    num_resized: int = 0
    num_lost: int = 0
    num_finished: int = 0
    ended_s: float = 0.0


class Simulation:
    """A cluster under load.

    Args:
        load: what comes.
        failures_per_node_week: how often a node fails in a week, on average.
        interval_s: decisions are at least so far apart, as those of a scheduler that is busy otherwise, too.
        watch: called with every step; raises where a promise is broken.
    """

    def __init__(
        self,
        load: Load,
        *,
        failures_per_node_week: float = 0.2,
        interval_s: float = 10.0,
        watch: Callable[["Simulation", Step], None] | None = None,
    ) -> None:
        self.load = load
        self.queues = make_queues()
        self.now_s = 0.0
        self.running: dict[str, Running] = {}
        self.outcome = Outcome()
        self.nodes = {
            name: Node(
                id=name,
                address="",
                total=Resources(cpus=CPUS_PER_NODE, gpus=GPUS_PER_NODE, memory_bytes=MEMORY_PER_NODE_BYTES),
            )
            for name in (f"node-{number:03d}" for number in range(load.num_gpus // GPUS_PER_NODE))
        }
        self.waiting: dict[str, Pending] = {}
        self._jobs = {job.id: job for job in make_jobs(load, self.queues)}
        self._done_s: Counter[str] = Counter()
        self._preempted: Counter[str] = Counter()
        self._rng = random.Random(load.seed + 1)
        self.interval_s = interval_s
        self._watch = watch
        self._usage_s: dict[str, float] = {}
        self._reservations: tuple[Reservation, ...] = ()
        self._tokens = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        for job in self._jobs.values():
            self._at(job.arrives_s, lambda job=job: self._submit(job.id))
        for node in self.nodes.values():
            self._plan_failure(node, failures_per_node_week)

    def run(self, until_s: float | None = None) -> Outcome:
        """Run until every job has ended, or for so long."""
        while self._events and (until_s is None or self._events[0][0] <= until_s):
            self._advance(self._events[0][0])
            # What happens until the next decision happens before it.
            horizon_s = self.now_s + self.interval_s
            while (
                self._events and self._events[0][0] <= horizon_s and (until_s is None or self._events[0][0] <= until_s)
            ):
                at_s, _, happen = heapq.heappop(self._events)
                self._advance(at_s)
                happen()
            if until_s is None and self.outcome.num_finished == len(self._jobs):
                break
            self._decide()
        self.outcome.ended_s = self.now_s
        return self.outcome

    def _at(self, at_s: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._tokens), happen))

    def _advance(self, to_s: float) -> None:
        elapsed_s = to_s - self.now_s
        if elapsed_s <= 0:
            return
        held: Counter[str] = Counter()
        for running in self.running.values():
            held[running.job.queue] += len(running.node_ids)
        num_gpus = GPUS_PER_NODE * len(self.nodes)
        backlogged = {job.queue for job in self.waiting.values()}
        if len(backlogged) == len(self.queues):
            for queue, gpus in held.items():
                self.outcome.gpu_s[queue] += gpus * elapsed_s
            self.outcome.available_gpu_s += num_gpus * elapsed_s
        self.outcome.samples.append((self.now_s, dict(held), num_gpus, len(self.waiting)))
        active = [self._active(running) for running in self.running.values()]
        self._usage_s = accrued(self._usage_s, active, list(self.nodes.values()), elapsed_s=elapsed_s)
        self.now_s = to_s

    def _submit(self, job_id: str) -> None:
        job = self._jobs[job_id]
        left = 1.0 - self._done_s[job_id] / job.work_s
        expected_s = None if job.expected_s is None else job.expected_s * left + START_S
        self.waiting[job_id] = Pending(
            id=job.id,
            queue=job.queue,
            owner=job.owner,
            priority=job.priority,
            sequence=job.sequence,
            worlds=job.worlds,
            per_rank=job.per_rank,
            layout=job.layout,
            duration_s=expected_s,
        )

    def _decide(self) -> None:
        pending, nodes = list(self.waiting.values()), list(self.nodes.values())
        active = [self._active(running) for running in self.running.values()]
        before = time.process_time()  # it computes and nothing else: other processes do not count
        decision = decide(
            pending,
            active,
            nodes,
            queues=self.queues,
            usage_s=self._usage_s,
            reservations=self._reservations,
            now_s=self.now_s,
        )
        took_s = time.process_time() - before
        self.outcome.decisions_s.append(took_s)
        self.outcome.sizes.append(len(pending) + len(active))
        if self._watch is not None:
            step = Step(
                now_s=self.now_s,
                pending=pending,
                active=active,
                nodes=nodes,
                queues=self.queues,
                reservations=self._reservations,
                decision=decision,
                took_s=took_s,
            )
            self._watch(self, step)
        self._reservations = decision.reservations
        for start in decision.starts:
            del self.waiting[start.job_id]
            self.outcome.waits_s.setdefault(start.job_id, self.now_s - self._jobs[start.job_id].arrives_s)
            self._start(start.job_id, start.node_ids)
        for preemption in decision.preemptions:
            self.outcome.num_preempted += 1
            self._preempted[preemption.job_id] += 1
            self._stop(preemption.job_id, ())
        for resize in decision.resizes:
            self.outcome.num_resized += 1
            self._stop(resize.job_id, resize.node_ids)

    def _start(self, job_id: str, node_ids: tuple[str, ...]) -> None:
        running = self.running[job_id] = Running(
            job=self._jobs[job_id],
            node_ids=node_ids,
            started_s=self.now_s,
            done_s=self._done_s[job_id],
            token=next(self._tokens),
        )
        self._at(running.ends_s(), lambda: self._end(job_id, running.token))

    def _end(self, job_id: str, token: int) -> None:
        if self._is_current(job_id, token):
            del self.running[job_id]
            self.outcome.num_finished += 1

    def _stop(self, job_id: str, next_node_ids: tuple[str, ...]) -> None:
        running = self.running[job_id]
        running.stops_s = self.now_s + self._rng.uniform(*STOP_S)
        running.next_node_ids = next_node_ids
        self._at(running.stops_s, lambda: self._stopped(job_id, running.token))

    def _stopped(self, job_id: str, token: int) -> None:
        if not self._is_current(job_id, token):
            return
        running = self.running.pop(job_id)
        self._done_s[job_id] = running.computed_s(self.now_s)
        if running.next_node_ids and all(node_id in self.nodes for node_id in running.next_node_ids):
            self._start(job_id, running.next_node_ids)
        else:
            self._submit(job_id)

    def _is_current(self, job_id: str, token: int) -> bool:
        return job_id in self.running and self.running[job_id].token == token

    def _plan_failure(self, node: Node, per_week: float) -> None:
        if per_week > 0:
            in_s = self._rng.expovariate(per_week / (7 * 86400.0))
            self._at(self.now_s + in_s, lambda: self._fail(node, per_week))

    def _fail(self, node: Node, per_week: float) -> None:
        del self.nodes[node.id]
        for job_id, running in list(self.running.items()):
            if node.id in running.node_ids:
                del self.running[job_id]
                self.outcome.num_lost += 1
                computed_s = running.computed_s(self.now_s)
                saved_s = computed_s // CHECKPOINT_INTERVAL_S * CHECKPOINT_INTERVAL_S
                self._done_s[job_id] = max(running.done_s, saved_s)
                self._submit(job_id)
        self._at(self.now_s + self._rng.uniform(600.0, 7200.0), lambda: self._return(node, per_week))

    def _return(self, node: Node, per_week: float) -> None:
        self.nodes[node.id] = node
        self._plan_failure(node, per_week)

    def _active(self, running: Running) -> Active:
        job, ran_for_s = running.job, self.now_s - running.started_s
        is_stopping = running.stops_s is not None
        is_elastic = len(job.worlds) > 1
        return Active(
            id=job.id,
            queue=job.queue,
            owner=job.owner,
            priority=job.priority,
            sequence=job.sequence,
            worlds=job.worlds,
            per_rank=job.per_rank,
            layout=job.layout,
            node_ids=running.node_ids,
            next_node_ids=running.next_node_ids,
            remaining_s=self._remaining_s(running),
            ran_for_s=ran_for_s,
            preemptions_left=job.max_preemptions - self._preempted[job.id],
            is_stopping=is_stopping,
            is_movable=is_elastic and not is_stopping and ran_for_s >= START_S,
            is_settled=ran_for_s >= RESIZE_INTERVAL_S,
        )

    def _remaining_s(self, running: Running) -> float | None:
        job, ran_for_s = running.job, self.now_s - running.started_s
        remaining_s = running.ends_s() - self.now_s
        if running.stops_s is not None:
            return STOP_S[1]
        if self.load.estimates == "exact" or (job.is_measured and ran_for_s >= MEASURED_AFTER_S):
            return remaining_s
        if job.expected_s is None:
            return None
        speed = len(running.node_ids) / job.worlds[0]
        expected_s = (job.expected_s * (1.0 - running.done_s / job.work_s)) / speed + START_S
        return max(expected_s - ran_for_s, OVERTIME * ran_for_s)
