"""What becomes of a job when its attempt ends; a pure decision."""

from collections.abc import Sequence
from dataclasses import dataclass

from service.domain.job import JobStatus, Outcome, Reason
from service.domain.spec import RetrySpec

MAX_BACKOFF_S = 300.0
# So many attempts running that fail in the same way at the same step: a further one would too.
NUM_REPEATS = 3
# What the cluster or the service did, and no failure of the job's own, has other reasons, or this type.
_OF_ITS_OWN = (Reason.RANK_LOST, Reason.COLLECTIVE_FAILED, Reason.OUT_OF_MEMORY)
_ACTOR_DIED = "ActorDied"


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How an attempt ended.

    Attributes:
        reason: why.
        error_type: class of its first error, or the signal; None where there was none.
        step: the last step that it reported; None before the first.
    """

    reason: Reason
    error_type: str | None
    step: int | None

    @property
    def is_of_its_own(self) -> bool:
        """Whether the job itself may have caused it."""
        return self.reason in _OF_ITS_OWN and self.error_type != _ACTOR_DIED


@dataclass(frozen=True, kw_only=True)
class NextStep:
    """The status that a job takes when its attempt ended.

    Attributes:
        status: what it becomes.
        reason: why.
        costs_retry: whether a retry is used up.
        pause_s: how long it waits before it may be placed again.
    """

    status: JobStatus
    reason: Reason
    costs_retry: bool = False
    pause_s: float = 0.0


def after_attempt(
    *,
    outcome: Outcome,
    reason: Reason,
    status: JobStatus,
    stop_reason: Reason | None,
    retries_used: int,
    retry: RetrySpec,
    endings: Sequence[Ending] = (),
    is_placed: bool = False,
) -> NextStep:
    """Decide what follows an attempt.

    Args:
        outcome: how it ended.
        reason: why.
        status: the job's present status: starting, running or stopping.
        stop_reason: why the attempt was asked to stop, if it was.
        retries_used: retries spent so far.
        retry: what the job says of them.
        endings: how its attempts ended since it was last resumed, in order; this one is the last.
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
    if _is_repeated(endings):
        return NextStep(status=JobStatus.FAILED, reason=Reason.REPEATED_FAILURE)
    if retries_used >= retry.budget:
        return NextStep(status=JobStatus.FAILED, reason=Reason.RETRIES_EXHAUSTED)
    pause_s = pause_before(retries_used + 1, retry.backoff_s)
    return NextStep(status=JobStatus.QUEUED, reason=reason, costs_retry=True, pause_s=pause_s)


def pause_before(retry_number: int, backoff_s: float) -> float:
    """Return how long a retry waits, in seconds: the first not at all, then ever longer, up to a bound.

    Args:
        retry_number: from 1.
        backoff_s: pause before the second one.
    """
    if retry_number <= 1:
        return 0.0
    doublings = min(retry_number - 2, 32)
    return float(min(backoff_s * 2**doublings, max(MAX_BACKOFF_S, backoff_s)))


def describe_retry(*, attempt: int, reason: Reason, retry_number: int, budget: int, pause_s: float) -> str:
    """Say that a job is tried again, and when.

    Args:
        attempt: number of the attempt that ended.
        reason: why it did.
        retry_number: of the one that follows, from 1.
        budget: most retries.
        pause_s: how long it waits first.
    """
    if pause_s:
        return f"Waits {pause_s:g} s before retry {retry_number} of {budget} ({reason})."
    return f"Attempt {attempt} ended ({reason}). Waits to be placed for retry {retry_number} of {budget}."


def describe_end(following: NextStep, *, job_id: str, attempt: int, ending: Ending, budget: int, said: str) -> str:
    """Say why a job is not tried again after a failure, and what to look at.

    Args:
        following: what was decided.
        job_id: of the job.
        attempt: number of the attempt that ended.
        ending: how it did.
        budget: most retries.
        said: what the attempt met, as a sentence.
    """
    if following.reason is Reason.REPEATED_FAILURE:
        where = "before its first step" if not ending.step else f"after step {ending.step}"
        return (
            f"Failed {NUM_REPEATS} times running in the same way {where} ({ending.reason}); a further try would too. "
            f"Look at `syncbn logs {job_id} --attempt {attempt} --rank all`, mend it and resume or fork the job. {said}"
        )
    if following.reason is Reason.RETRIES_EXHAUSTED:
        none_left = f"none of {budget} retries left" if budget else "no retry allowed"
        return f"Lost attempt {attempt} ({ending.reason}), with {none_left}. {said}"
    return said


def _is_repeated(endings: Sequence[Ending]) -> bool:
    """Whether the last attempts failed in one way, leaving out those that were none of the job's doing."""
    own = [ending for ending in endings if ending.is_of_its_own]
    return (
        len(own) >= NUM_REPEATS and endings[-1] is own[-1] and all(ending == own[-1] for ending in own[-NUM_REPEATS:])
    )
