"""What has to hold at every step of a simulation, whatever happens."""

from collections import Counter
from dataclasses import dataclass, field

from benchmarks.scheduling.simulation import STOP_S, Simulation, Step


class Broken(AssertionError):
    """A promise of the policy was broken."""


@dataclass(kw_only=True)
class Invariants:
    """Checks each step; keeps what it has to remember of earlier ones.

    Attributes:
        is_exact: estimates are exact and nothing else interferes: a reserved start is never late.
        late_s: by how much jobs started later than they were promised.
    """

    is_exact: bool = False
    late_s: list[float] = field(default_factory=list)
    _deadlines_s: dict[str, float] = field(default_factory=dict)

    def __call__(self, simulation: Simulation, step: Step) -> None:
        """Check one step, before it is carried out. Raises ``Broken``."""
        self._check_starts(step)
        self._check_room(step)
        self._check_quotas(step)
        self._check_preemptions(step)
        self._check_reservations(simulation, step)

    def _check_starts(self, step: Step) -> None:
        pending = {job.id: job for job in step.pending}
        active = {job.id for job in step.active}
        alive = {node.id for node in step.nodes}
        told = [start.job_id for start in step.decision.starts] + [wait.job_id for wait in step.decision.waits]
        _expect(sorted(told) == sorted(pending), "every waiting job either starts or is told why not, once")
        for start in step.decision.starts:
            _expect(start.job_id not in active, f"{start.job_id} is in one place")
            _expect(len(start.node_ids) in pending[start.job_id].worlds, f"{start.job_id} starts whole")
            _expect(alive.issuperset(start.node_ids), f"{start.job_id} starts on nodes that are there")

    def _check_room(self, step: Step) -> None:
        pending = {job.id: job for job in step.pending}
        targets = {resize.job_id: resize.node_ids for resize in step.decision.resizes}
        held: Counter[tuple[str, str]] = Counter()
        for job in step.active:
            places = Counter(job.node_ids) | Counter(targets.get(job.id, job.next_node_ids))
            _add(held, places, job.per_rank)
        for start in step.decision.starts:
            _add(held, Counter(start.node_ids), pending[start.job_id].per_rank)
        for node in step.nodes:
            for name in ("cpus", "gpus", "memory_bytes"):
                _expect(held[node.id, name] <= getattr(node.total, name), f"{node.id} is not over-committed")

    def _check_quotas(self, step: Step) -> None:
        pending = {job.id: job for job in step.pending}
        targets = {resize.job_id: resize.node_ids for resize in step.decision.resizes}
        gpus: Counter[tuple[str, str]] = Counter()
        jobs: Counter[tuple[str, str]] = Counter()
        for job in step.active:
            gpus[job.queue, job.owner] += max(job.num_held, len(targets.get(job.id, ()))) * job.per_rank.gpus
            jobs[job.queue, job.owner] += 1
        for start in step.decision.starts:
            job = pending[start.job_id]
            gpus[job.queue, job.owner] += len(start.node_ids) * job.per_rank.gpus
            jobs[job.queue, job.owner] += 1
        for queue in step.queues:
            quota = queue.quota_per_owner
            for (name, owner), count in gpus.items():
                if name == queue.name:
                    _expect(quota.gpus is None or count <= quota.gpus, f"{owner} keeps to the GPUs of the quota")
                    _expect(
                        quota.jobs is None or jobs[name, owner] <= quota.jobs, f"{owner} keeps to the jobs of the quota"
                    )

    def _check_preemptions(self, step: Step) -> None:
        active = {job.id: job for job in step.active}
        pending = {job.id: job for job in step.pending}
        targets = {resize.job_id for resize in step.decision.resizes}
        for preemption in step.decision.preemptions:
            victim = active[preemption.job_id]
            _expect(victim.priority < pending[preemption.for_job_id].priority, "only priority preempts")
            _expect(victim.preemptions_left > 0, "nobody is stopped more often than it may be")
            _expect(not victim.is_stopping and victim.id not in targets, "nobody is asked twice")

    def _check_reservations(self, simulation: Simulation, step: Step) -> None:
        """A job that room is held for starts by the promised time, or, where that was wrong, at the end of all else."""
        for reservation in step.reservations:
            if reservation.promised_at_s is None:
                continue
            job_id = reservation.job_id
            if any(start.job_id == job_id for start in step.decision.starts):
                self.late_s.append(step.now_s - reservation.promised_at_s)
                if self.is_exact:
                    # Decisions are an interval apart.
                    late_s = step.now_s - reservation.promised_at_s
                    _expect(late_s <= simulation.interval_s + 1e-6, f"{job_id} starts by the time it was promised")
        held = {reservation.job_id: reservation for reservation in step.decision.reservations}
        for job_id in list(self._deadlines_s):
            if job_id not in held:
                del self._deadlines_s[job_id]  # it has started, or one of a higher priority has come before it
        for job_id, reservation in held.items():
            if reservation.promised_at_s is None or job_id in self._deadlines_s:
                continue
            promise_s = reservation.promised_at_s - reservation.made_at_s
            trusted_until_s = reservation.promised_at_s + 0.5 * promise_s + 60.0
            if step.now_s > trusted_until_s:
                longest_s = max((run.ends_s() for run in simulation.running.values()), default=step.now_s)
                self._deadlines_s[job_id] = longest_s + 4 * STOP_S[1] + 4 * simulation.interval_s + _RESTARTS_S
        for job_id, deadline_s in self._deadlines_s.items():
            _expect(step.now_s <= deadline_s, f"{job_id} is not starved")


# Nodes fail and are away, attempts begin again at a checkpoint: what ran may end later than it would have.
_RESTARTS_S = 6 * 3600.0


def _add(held: Counter[tuple[str, str]], places: Counter[str], per_rank: object) -> None:
    for node_id, count in places.items():
        for name in ("cpus", "gpus", "memory_bytes"):
            held[node_id, name] += count * getattr(per_rank, name)


def _expect(is_kept: bool, promise: str) -> None:
    if not is_kept:
        raise Broken(f"Broken: {promise}.")
