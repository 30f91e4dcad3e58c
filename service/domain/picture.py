"""What the policy is shown of the rows: jobs that wait and run as small values, with estimates of their ends."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from service.domain.elasticity import worlds_of
from service.domain.job import AttemptStatus, Job, JobStatus, Outcome, Reason
from service.domain.ports import HeldBack, LiveAttempt
from service.domain.scheduling import Active, Pending
from service.domain.scheduling.estimate import Progress, remaining_s

_GOES_ON = (Reason.RESIZED, Reason.PREEMPTED, Reason.SERVICE_STOPPED)


@dataclass(kw_only=True)
class _Seen:
    """What this process saw of an attempt, by its own clock: another leader counts anew.

    Attributes:
        live_s: when it was first seen.
        running_s: when it was first seen to run.
        step: of the job, then.
    """

    live_s: float
    running_s: float | None = None
    step: int = 0


class Picture:
    """Turns rows into values; keeps what does not change, and when it saw what.

    Args:
        resize_interval_s: how long an elastic job runs before it is interrupted to give it more workers.
        stop_grace_s: how long an attempt that was asked to stop may take.
    """

    def __init__(self, *, resize_interval_s: float, stop_grace_s: float) -> None:
        self._resize_interval_s = resize_interval_s
        self._stop_grace_s = stop_grace_s
        self._seen: dict[tuple[str, int], _Seen] = {}
        self._pending: dict[str, tuple[tuple[object, ...], Pending]] = {}

    def recall(self, live: Iterable[LiveAttempt], until: datetime, now_s: float) -> None:
        """Take for seen what runs already, by times of the store's clock alone.

        Args:
            live: attempts that are not sealed.
            until: now, by the clock that the rows of attempts were dated by.
            now_s: now, by the clock of this process.
        """
        for entry in live:
            since_s = now_s - max(0.0, (until - entry.attempt.created_at).total_seconds())
            runs = entry.attempt.status is AttemptStatus.RUNNING
            self._seen[entry.job.id, entry.attempt.number] = _Seen(
                live_s=since_s,
                running_s=since_s if runs else None,
                step=entry.attempt.resumed_from_step or _first_step(entry.job),
            )

    def active(self, live: Iterable[LiveAttempt], now_s: float) -> list[Active]:
        """Return what holds resources.

        Args:
            live: attempts that are not sealed.
            now_s: by the clock of this process.
        """
        seen, active = {}, []
        for sequence, entry in enumerate(live):
            key = (entry.job.id, entry.attempt.number)
            sight = seen[key] = self._seen.get(key) or _Seen(live_s=now_s)
            if sight.running_s is None and entry.attempt.status is AttemptStatus.RUNNING:
                sight.running_s, sight.step = now_s, _step(entry)
            active.append(self._active(entry, sequence, sight, now_s))
        self._seen = seen
        return active

    def going_on(self, live: Iterable[LiveAttempt], now_s: float) -> list[Pending]:
        """Return those that were asked to stop and are not done then, as they will wait; ``active`` has seen them.

        Args:
            live: attempts that are not sealed.
            now_s: by the clock of this process.
        """
        going_on = []
        for entry in live:
            job, attempt = entry.job, entry.attempt
            if attempt.stop_reason not in _GOES_ON or attempt.outcome not in (None, Outcome.STOPPED):
                continue
            if job.cancel_requested or job.pause_requested:
                continue
            left_s = _remaining_s(entry, self._seen[job.id, attempt.number], now_s)
            if left_s is not None:
                left_s *= attempt.world_size / worlds_of(job)[0]
            going_on.append(replace(_pending(job, None), duration_s=left_s))
        return going_on

    def pending(self, queued: Sequence[Job], held_back: Mapping[str, HeldBack]) -> list[Pending]:
        """Return what waits.

        Args:
            queued: in the order of submission, within each priority.
            held_back: those that may not start yet.
        """
        kept = {}
        for job in queued:
            why = held_back.get(job.id)
            obstacle = None if why is None else _obstacle(job, why)
            # All that its value is made of and that may change while it waits, or between two times that it does.
            state = (obstacle, job.workers_wanted, job.step, job.running_s, job.owner)
            earlier = self._pending.get(job.id)
            kept[job.id] = earlier if earlier is not None and earlier[0] == state else (state, _pending(job, obstacle))
        self._pending = kept
        return [pending for _, pending in kept.values()]

    def _active(self, entry: LiveAttempt, sequence: int, sight: _Seen, now_s: float) -> Active:
        job, attempt = entry.job, entry.attempt
        is_stopping = (
            job.cancel_requested
            or job.pause_requested
            or attempt.stop_reason is not None
            or attempt.status is AttemptStatus.ENDED
        )
        runs_since_s = now_s if sight.running_s is None else sight.running_s
        return Active(
            id=job.id,
            queue=job.spec.queue,
            owner=job.owner,
            priority=job.spec.priority,
            sequence=sequence,
            worlds=worlds_of(job),
            per_rank=job.spec.resources_per_rank,
            layout=job.spec.placement,
            node_ids=attempt.node_ids,
            next_node_ids=(attempt.target_node_ids or ()) if attempt.stop_reason is Reason.RESIZED else (),
            remaining_s=self._stop_grace_s if is_stopping else _remaining_s(entry, sight, now_s),
            ran_for_s=now_s - sight.live_s,
            preemptions_left=job.spec.retry.preemptions - job.preemptions_used,
            is_stopping=is_stopping,
            is_movable=(
                job.spec.workers.is_elastic
                and job.status is JobStatus.RUNNING
                and attempt.status is AttemptStatus.RUNNING
                and not is_stopping
            ),
            is_settled=sight.running_s is not None and now_s - runs_since_s >= self._resize_interval_s,
            is_resize_requested=job.resize_requested,
        )


def waits_for(job_ids: Sequence[str]) -> str:
    """Say that a job comes after others that have not succeeded yet."""
    shown = ", ".join(job_ids[:3]) + (", …" if len(job_ids) > 3 else "")
    return f"Waits for the success of {len(job_ids)} job(s): {shown}."


def _pending(job: Job, obstacle: str | None) -> Pending:
    return Pending(
        id=job.id,
        queue=job.spec.queue,
        owner=job.owner,
        priority=job.spec.priority,
        # Of two that were submitted at once, the one that is listed first stays first.
        sequence=int(job.created_at.timestamp() * 1e6),
        worlds=worlds_of(job),
        per_rank=job.spec.resources_per_rank,
        layout=job.spec.placement,
        duration_s=remaining_s(
            ran_for_s=job.running_s,
            expected_s=job.spec.expected_s,
            timeout_s=job.spec.timeout_s,
            progress=_progress(job, _first_step(job), job.step, job.running_s),
        ),
        obstacle=obstacle,
    )


def _remaining_s(entry: LiveAttempt, sight: _Seen, now_s: float) -> float | None:
    job = entry.job
    runs_for_s = 0.0 if sight.running_s is None else now_s - sight.running_s
    return remaining_s(
        ran_for_s=job.running_s + runs_for_s,
        expected_s=job.spec.expected_s,
        timeout_s=job.spec.timeout_s,
        progress=_progress(job, sight.step, _step(entry), runs_for_s),
    )


def _progress(job: Job, first_step: int, step: int, in_s: float) -> Progress | None:
    if job.num_steps is None:
        return None
    return Progress(num_steps=step - first_step, in_s=in_s, num_left=max(0, job.num_steps - step))


def _step(entry: LiveAttempt) -> int:
    """Return the step that an attempt has reached; where it began, before it said so."""
    if entry.attempt.step is not None:
        return entry.attempt.step
    resumed_from = entry.attempt.resumed_from_step
    return entry.job.step if resumed_from is None else resumed_from


def _first_step(job: Job) -> int:
    return 0 if job.forked_from is None else job.forked_from.step


def _obstacle(job: Job, why: HeldBack) -> str:
    if not why.waits_for:
        return job.message  # it pauses before a retry, and says so already
    return waits_for(why.waits_for)
