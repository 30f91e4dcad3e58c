"""What the owner of a job asks for: to cancel, pause, resume or resize it."""

from datetime import datetime, timedelta

from sqlalchemy.engine import Connection

from service.domain.errors import InvalidTransition
from service.domain.job import Job, JobStatus, Reason
from service.store import queues
from service.store.jobs import LockedJob

_HAS_ATTEMPT = (JobStatus.STARTING, JobStatus.RUNNING)
_WAITS = (JobStatus.QUEUED, JobStatus.PAUSED)


def request_cancel(locked: LockedJob, time: datetime) -> None:
    """Cancel a job that waits; note for one that is starting or running that it was asked for.

    Raises:
        InvalidTransition: it has already succeeded or failed.
    """
    job = locked.job
    if job.status in (JobStatus.SUCCEEDED, JobStatus.FAILED):
        raise InvalidTransition(f"Job {job.id} has already {job.status}; there is nothing left to cancel.")
    if job.status in _WAITS:
        since = "before it was placed" if job.status is JobStatus.QUEUED else "while it was paused"
        locked.move(JobStatus.CANCELLED, Reason.CANCELLED, f"Cancelled {since}.", time=time)
    elif (job.status in _HAS_ATTEMPT or job.pause_requested) and not job.cancel_requested:
        locked.change(cancel_requested=True)
        locked.add_event("cancel_requested", "Asked to cancel.", time=time, reason=Reason.CANCEL_REQUESTED)


def request_pause(locked: LockedJob, time: datetime) -> None:
    """Pause a queued job; note for one that is starting or running that it was asked for.

    Raises:
        InvalidTransition: it has ended or is about to.
    """
    job = locked.job
    if job.status is JobStatus.QUEUED:
        locked.move(JobStatus.PAUSED, Reason.PAUSED, "Paused before it was placed.", time=time)
    elif job.status.is_terminal:
        raise InvalidTransition(f"Job {job.id} has already {_ended(job)}; there is nothing left to pause.")
    elif job.cancel_requested or (job.status is JobStatus.STOPPING and not job.pause_requested):
        raise InvalidTransition(f"Job {job.id} is about to end ({job.reason}), and is not paused any more.")
    elif job.status is not JobStatus.PAUSED and not job.pause_requested:
        locked.change(pause_requested=True)
        locked.add_event("pause_requested", "Asked to pause.", time=time, reason=Reason.PAUSE_REQUESTED)


def resume(connection: Connection, locked: LockedJob, time: datetime) -> None:
    """Queue a job again that has stopped before it was done; its queue stays to the end of the transaction.

    Raises:
        InvalidTransition: it has succeeded, or has not stopped, or its queue is gone.
    """
    job = locked.job
    if job.status is JobStatus.SUCCEEDED:
        raise InvalidTransition(
            f"Job {job.id} has done all its steps. Fork it with more steps to go on from its last checkpoint."
        )
    if job.status not in (JobStatus.PAUSED, JobStatus.FAILED, JobStatus.CANCELLED):
        wait = " Wait until it has stopped." if job.status is JobStatus.STOPPING or job.pause_requested else ""
        raise InvalidTransition(f"Job {job.id} is {job.status}; there is nothing to resume.{wait}")
    queue = job.spec.queue
    if not queues.existing(connection, {queue}):
        raise InvalidTransition(f"Queue {queue} is gone. Make it again, or fork the job with another queue.")
    if job.reason is Reason.TIMEOUT:
        locked.change(running_s=0.0)  # or its time would be up again at once
    locked.change(retries_used=0, preemptions_used=0, failure=None, ended_at=None)
    if job.spec.start_deadline_s is not None and job.started_at is None:
        locked.start_by(time + timedelta(seconds=job.spec.start_deadline_s))
    locked.move(JobStatus.QUEUED, Reason.RESUMED, "Resumed. Waits to be placed.", time=time)


def request_resize(locked: LockedJob, workers: int, world_size: int | None, time: datetime) -> None:
    """Note how many workers a job is to have from now on.

    Args:
        locked: the job.
        workers: as many, at most.
        world_size: of its present attempt, if it has one.
        time: now.

    Raises:
        InvalidTransition: it has ended or is about to.
    """
    job = locked.job
    if job.status.is_terminal:
        raise InvalidTransition(f"Job {job.id} has already {_ended(job)}; there is nothing left to resize.")
    if job.status is JobStatus.STOPPING or job.cancel_requested:
        raise InvalidTransition(f"Job {job.id} is about to stop ({job.reason}), and is not resized any more.")
    locked.change(workers_wanted=workers, resize_requested=world_size is not None and world_size != workers)
    locked.add_event(
        "resize_requested",
        f"Asked to go on with {workers} worker(s).",
        time=time,
        reason=Reason.RESIZED,
        data={"workers": workers},
    )


def _ended(job: Job) -> str:
    return "been cancelled" if job.status is JobStatus.CANCELLED else str(job.status)
