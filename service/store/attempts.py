"""Attempts: created, stopped, sealed; and the guard that refuses all but the current one."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from service.domain.errors import StaleWrite
from service.domain.job import Attempt, AttemptStatus, Failure, Job, JobStatus, Outcome, Reason
from service.domain.ports import LiveAttempt
from service.domain.retry import Ending, NextStep, after_attempt, describe_end, describe_retry
from service.store.jobs import LockedJob, failure_of, failure_row, job_of
from service.store.tables import attempts, events, jobs

# Attempts that are looked at to tell whether a failure repeats itself; most that a job has between two of its own.
_MAX_ENDINGS = 100


def create_attempt(
    connection: Connection, locked: LockedJob, node_ids: Sequence[str], time: datetime
) -> Attempt | None:
    """Move a queued job to starting with a new attempt; None if it is not queued."""
    if locked.job.status is not JobStatus.QUEUED:
        return None
    message = f"Placed on {len(node_ids)} worker(s); starting."
    return _begin_attempt(connection, locked, node_ids, Reason.ADMITTED, message, time)


def _begin_attempt(
    connection: Connection, locked: LockedJob, node_ids: Sequence[str], reason: Reason, message: str, time: datetime
) -> Attempt:
    number = locked.job.attempt + 1
    connection.execute(
        sa.insert(attempts),
        {
            "job_number": locked.number,
            "number": number,
            "status": AttemptStatus.CREATED,
            "world_size": len(node_ids),
            "node_ids": list(node_ids),
            "last_sequence": 0,
            "created_at": time,
        },
    )
    locked.change(attempt=number)
    if len(node_ids) == locked.job.workers_wanted:
        locked.change(resize_requested=False)
    locked.move(JobStatus.STARTING, reason, message, time=time)
    locked.add_event(
        "attempt_created",
        f"Attempt {number} created.",
        time=time,
        data={"world_size": len(node_ids), "node_ids": list(node_ids)},
    )
    return attempt_of(locked.job.id, _attempt_row(connection, locked, number))


def current_attempt(connection: Connection, locked: LockedJob, number: int) -> Attempt:
    """Return an attempt that may write, the job being locked.

    Raises:
        StaleWrite: it is not the job's current one, or sealed.
    """
    if number != locked.job.attempt or number == 0:
        raise StaleWrite(
            f"Attempt {number} of job {locked.job.id} is not its current one, which is {locked.job.attempt}."
        )
    attempt = attempt_of(locked.job.id, _attempt_row(connection, locked, number))
    if attempt.status is AttemptStatus.SEALED:
        raise StaleWrite(f"Attempt {number} of job {locked.job.id} is sealed: nothing more is taken from it.")
    return attempt


def update_attempt(connection: Connection, locked: LockedJob, number: int, **values: object) -> None:
    """Write columns of an attempt whose job is locked."""
    connection.execute(sa.update(attempts).where(*_is(locked, number)), values)


def is_timed(connection: Connection, locked: LockedJob, number: int) -> bool:
    """Return whether it is known when an attempt began to run by its supervisor's own clock."""
    query = sa.select(attempts.c.running_elapsed_s).where(*_is(locked, number))
    return connection.execute(query).scalar_one() is not None


def list_attempts(connection: Connection, job_id: str, number: int) -> tuple[Attempt, ...]:
    """Return the attempts of a job, in order."""
    rows = connection.execute(sa.select(attempts).where(attempts.c.job_number == number).order_by(attempts.c.number))
    return tuple(attempt_of(job_id, row) for row in rows)


def list_live(connection: Connection) -> tuple[LiveAttempt, ...]:
    """Return the attempts that are not sealed, with their jobs, oldest job first."""
    live = attempts.c.status != sa.literal_column("'sealed'")  # written out, as the partial index has it
    rows = connection.execute(sa.select(attempts).where(live).order_by(attempts.c.job_number, attempts.c.number)).all()
    owners = {
        row.number: job_of(row)
        for row in connection.execute(
            sa.select(jobs).where(jobs.c.number.in_(sa.select(attempts.c.job_number).where(live)))
        )
    }
    return tuple(
        LiveAttempt(job=owners[row.job_number], attempt=attempt_of(owners[row.job_number].id, row)) for row in rows
    )


def mark_stopping(connection: Connection, locked: LockedJob, attempt: Attempt, reason: Reason, time: datetime) -> None:
    """Note that an attempt was asked to stop; its job becomes stopping unless the service stops.

    A job that is stopping keeps the first reason for it.
    """
    if locked.job.status is JobStatus.STOPPING or attempt.stop_reason is reason:
        return
    update_attempt(connection, locked, attempt.number, stop_reason=reason)
    if reason is Reason.SERVICE_STOPPED:
        locked.add_event("stop_requested", "Asked to stop: the service stops.", time=time, reason=reason)
    else:
        locked.move(JobStatus.STOPPING, reason, f"Asked to stop: {_words(reason)}.", time=time)


def mark_resizing(
    connection: Connection,
    locked: LockedJob,
    attempt: Attempt,
    *,
    node_ids: Sequence[str],
    message: str,
    time: datetime,
) -> None:
    """Note that a running attempt was asked to stop to go on on other nodes; nothing if something else was asked."""
    job = locked.job
    if job.status is not JobStatus.RUNNING or attempt.status is AttemptStatus.ENDED or attempt.stop_reason is not None:
        return
    if job.cancel_requested or job.pause_requested:
        return
    update_attempt(connection, locked, attempt.number, stop_reason=Reason.RESIZED, target_node_ids=list(node_ids))
    locked.add_event("stop_requested", message, time=time, reason=Reason.RESIZED, data={"world_size": len(node_ids)})


def mark_preempting(
    connection: Connection, locked: LockedJob, attempt: Attempt, *, message: str, time: datetime
) -> None:
    """Note that an attempt was asked to stop for another job; nothing if something else was asked."""
    job = locked.job
    if attempt.status is AttemptStatus.ENDED or attempt.stop_reason is not None or wish_of(job) is not None:
        return
    update_attempt(connection, locked, attempt.number, stop_reason=Reason.PREEMPTED)
    locked.add_event("stop_requested", message, time=time, reason=Reason.PREEMPTED)


def seal_attempt(
    connection: Connection,
    locked: LockedJob,
    number: int,
    *,
    outcome: Outcome,
    reason: Reason,
    failure: Failure | None,
    next_node_ids: Sequence[str] | None,
    time: datetime,
) -> None:
    """End and seal an attempt and move its job on; nothing if it is sealed already.

    A job whose attempt was stopped to be resized goes on with its next attempt where places are given.

    Raises:
        StaleWrite: the job has no such attempt.
    """
    row = connection.execute(sa.select(attempts).where(*_is(locked, number))).one_or_none()
    if row is None:
        raise StaleWrite(f"Job {locked.job.id} has no attempt {number}; its last one is {locked.job.attempt}.")
    if row.status == AttemptStatus.SEALED:
        return
    failure = failure or failure_of(row.failure)
    update_attempt(
        connection,
        locked,
        number,
        status=AttemptStatus.SEALED,
        outcome=outcome,
        reason=reason,
        failure=failure_row(failure),
        ended_at=row.ended_at or time,
    )
    if row.ended_at is None:
        locked.add_event(
            "ended", f"Attempt {number} ended: {_words(reason)}.", time=time, reason=reason, data={"outcome": outcome}
        )
    # Where it did not say that it ended, its last report is the last proof that it ran: what followed may have been an
    # outage, which is not charged to the job's time.
    locked.change(running_s=locked.job.running_s + _ran_s(row))
    stop_reason = None if row.stop_reason is None else Reason(row.stop_reason)
    # Asked for, perhaps not yet told to the attempt: the wish counts, whatever ended it.
    wish = wish_of(locked.job)
    following = after_attempt(
        outcome=outcome,
        reason=reason,
        status=locked.job.status if wish is None else JobStatus.STOPPING,
        stop_reason=stop_reason if wish is None or stop_reason is Reason.TIMEOUT else wish,
        retries_used=locked.job.retries_used,
        retry=locked.job.spec.retry,
        endings=_endings(connection, locked, number) if outcome is Outcome.LOST else (),
        is_placed=next_node_ids is not None,
    )
    if following.status is JobStatus.STARTING:
        assert next_node_ids is not None
        message = f"Goes on with {len(next_node_ids)} worker(s) instead of {row.world_size}; starting."
        _begin_attempt(connection, locked, next_node_ids, following.reason, message, time)
    else:
        ending = Ending(reason=reason, error_type=None if failure is None else failure.error_type, step=row.step)
        _move_on(locked, following, ending=ending, failure=failure, said=row.message, time=time)


def live_world_size(connection: Connection, locked: LockedJob) -> int | None:
    """Return how many ranks the job's present attempt has; None if it has none that is not sealed."""
    row = connection.execute(
        sa.select(attempts.c.world_size).where(
            *_is(locked, locked.job.attempt), attempts.c.status != AttemptStatus.SEALED
        )
    ).one_or_none()
    return None if row is None else int(row.world_size)


def wish_of(job: Job) -> Reason | None:
    """Return what the owner of a job asked for that outranks whatever else would become of it."""
    if job.cancel_requested:
        return Reason.CANCEL_REQUESTED
    return Reason.PAUSE_REQUESTED if job.pause_requested else None


def _move_on(
    locked: LockedJob,
    following: NextStep,
    *,
    ending: Ending,
    failure: Failure | None,
    said: str | None,
    time: datetime,
) -> None:
    job, retry = locked.job, locked.job.spec.retry
    if following.costs_retry:
        locked.change(retries_used=job.retries_used + 1)
    if following.reason is Reason.PREEMPTED:
        locked.change(preemptions_used=job.preemptions_used + 1)
    if following.status is JobStatus.FAILED:
        locked.change(failure=failure)
        said = _describe(failure) if failure else said or f"Attempt {job.attempt} ended: {_words(ending.reason)}."
        message = describe_end(
            following, job_id=job.id, attempt=job.attempt, ending=ending, budget=retry.budget, said=said
        )
    elif following.costs_retry:
        if following.pause_s:
            locked.change(not_before=time + timedelta(seconds=following.pause_s))
        message = describe_retry(
            attempt=job.attempt,
            reason=ending.reason,
            retry_number=job.retries_used + 1,
            budget=retry.budget,
            pause_s=following.pause_s,
        )
        data = {"retry": job.retries_used + 1, "budget": retry.budget, "pause_s": following.pause_s}
        locked.add_event("retry", message, time=time, reason=ending.reason, data=data)
    elif following.status is JobStatus.QUEUED:
        message = f"Attempt {job.attempt} ended: {_words(ending.reason)}. Waits to be placed again."
    elif following.status in (JobStatus.CANCELLED, JobStatus.PAUSED):
        message = "Cancelled." if following.status is JobStatus.CANCELLED else f"Paused at step {job.step}."
        wish = wish_of(job)
        if job.status is not JobStatus.STOPPING and wish is not None:
            locked.move(JobStatus.STOPPING, wish, f"Asked to stop: {_words(wish)}.", time=time)
    else:
        message = said or "Completed."
    locked.move(following.status, following.reason, message, time=time)


def _endings(connection: Connection, locked: LockedJob, number: int) -> list[Ending]:
    """Return how the last attempts up to a sealed one ended, in order, as far back as the job was last resumed."""
    resumed_after = (
        sa.select(sa.func.max(events.c.attempt))
        .where(events.c.job_number == locked.number, events.c.kind == "status", events.c.reason == Reason.RESUMED)
        .scalar_subquery()
    )
    rows = connection.execute(
        sa.select(attempts.c.reason, attempts.c.failure, attempts.c.step)
        .where(
            attempts.c.job_number == locked.number,
            attempts.c.number <= number,
            attempts.c.number > sa.func.coalesce(resumed_after, 0),
            attempts.c.reason.is_not(None),
        )
        .order_by(attempts.c.number.desc())
        .limit(_MAX_ENDINGS)
    ).all()
    return [
        Ending(
            reason=Reason(row.reason),
            error_type=None if row.failure is None else row.failure["error_type"],
            step=row.step,
        )
        for row in reversed(rows)
    ]


def _describe(failure: Failure) -> str:
    where = "" if failure.rank is None else f"Rank {failure.rank}: "
    return f"{where}{failure.error_type}: {failure.message}"


def _words(reason: Reason) -> str:
    return reason.value.replace("_", " ")


def attempt_of(job_id: str, row: Row[Any]) -> Attempt:
    """Return the attempt that a row holds."""
    return Attempt(
        job_id=job_id,
        number=row.number,
        status=AttemptStatus(row.status),
        world_size=row.world_size,
        node_ids=row.node_ids,
        last_sequence=row.last_sequence,
        resumed_from_step=row.resumed_from_step,
        step=row.step,
        stop_reason=None if row.stop_reason is None else Reason(row.stop_reason),
        target_node_ids=row.target_node_ids,
        outcome=None if row.outcome is None else Outcome(row.outcome),
        reason=None if row.reason is None else Reason(row.reason),
        failure=failure_of(row.failure),
        created_at=row.created_at,
        running_at=row.running_at,
        ran_s=_ran_s(row),
        ended_at=row.ended_at,
    )


def _ran_s(row: Row[Any]) -> float:
    if row.running_elapsed_s is None:
        return 0.0
    return float(row.reported_elapsed_s - row.running_elapsed_s)


def _attempt_row(connection: Connection, locked: LockedJob, number: int) -> Row[Any]:
    return connection.execute(sa.select(attempts).where(*_is(locked, number))).one()


def _is(locked: LockedJob, number: int) -> tuple[sa.ColumnElement[bool], ...]:
    return attempts.c.job_number == locked.number, attempts.c.number == number
