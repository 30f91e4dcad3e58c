"""What becomes of a job when its attempt ends; a pure decision."""

from dataclasses import dataclass

from service.domain.job import JobStatus, Outcome, Reason


@dataclass(frozen=True, kw_only=True)
class NextStep:
    """The status that a job takes when its attempt ended.

    Attributes:
        status: what it becomes.
        reason: why.
        costs_retry: whether a retry is used up.
    """

    status: JobStatus
    reason: Reason
    costs_retry: bool = False


def after_attempt(
    *,
    outcome: Outcome,
    reason: Reason,
    status: JobStatus,
    stop_reason: Reason | None,
    retries_used: int,
    retry_budget: int,
    is_placed: bool = False,
) -> NextStep:
    """Decide what follows an attempt.

    Args:
        outcome: how it ended.
        reason: why.
        status: the job's present status: starting, running or stopping.
        stop_reason: why the attempt was asked to stop, if it was.
        retries_used: retries spent so far.
        retry_budget: retries that the job may spend.
        is_placed: it was stopped to be resized, and the places of the next attempt are held for it.
    """
    if outcome is Outcome.SUCCEEDED:
        return NextStep(status=JobStatus.SUCCEEDED, reason=reason)
    if stop_reason is Reason.TIMEOUT:
        return NextStep(status=JobStatus.FAILED, reason=stop_reason)
    if status is JobStatus.STOPPING and stop_reason is Reason.PAUSE_REQUESTED and outcome is not Outcome.FAILED:
        return NextStep(status=JobStatus.PAUSED, reason=Reason.PAUSED)
    if status is JobStatus.STOPPING and stop_reason is not Reason.PAUSE_REQUESTED:
        # Asked to stop: whatever ended it, it is not run again.
        return NextStep(status=JobStatus.CANCELLED, reason=Reason.CANCELLED)
    if outcome is Outcome.FAILED:
        return NextStep(status=JobStatus.FAILED, reason=reason)
    if reason is Reason.RESIZED and is_placed and status is JobStatus.RUNNING:
        return NextStep(status=JobStatus.STARTING, reason=reason)
    if reason in (Reason.SERVICE_STOPPED, Reason.RESIZED, Reason.PREEMPTED):
        return NextStep(status=JobStatus.QUEUED, reason=reason)
    if retries_used >= retry_budget:
        return NextStep(status=JobStatus.FAILED, reason=Reason.RETRIES_EXHAUSTED)
    return NextStep(status=JobStatus.QUEUED, reason=reason, costs_retry=True)
