"""How an attempt ended, judged from how its ranks ended; a pure decision."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from signal import Signals

from service.cluster.rank_end import RankEnd
from service.domain.job import Failure, Outcome, Reason
from service.domain.journal import Ended

# As proc_pid_stat(5) has them.
SUSPENDED = frozenset("Tt")
_STATES = {
    "T": "is stopped, by SIGSTOP or a terminal",
    "t": "is stopped by a debugger",
    "D": "waits for a disk or a driver",
    "R": "computes",
    "S": "sleeps",
}


@dataclass(frozen=True, kw_only=True)
class RankFailure:
    """One rank's failure.

    Attributes:
        outcome: what it means for the attempt, if it is the cause.
        reason: why.
        failure: what the rank met.
        is_effect: it only saw a peer go away.
        is_silent: it said nothing and was killed by the service, after others had waited for it in vain.
        is_suspended: so it was, since its process was stopped.
    """

    outcome: Outcome
    reason: Reason
    failure: Failure
    is_effect: bool = False
    is_silent: bool = False
    is_suspended: bool = False

    @classmethod
    def of_process(cls, rank: int, end: RankEnd) -> "RankFailure":
        """Judge a process that did not end clean."""
        error = end.error
        if end.out_of_memory:
            failure = Failure(rank=rank, error_type="OutOfMemory", message=f"Rank {rank} {end.out_of_memory}")
            return cls(outcome=Outcome.LOST, reason=Reason.OUT_OF_MEMORY, failure=failure)
        if error is not None:
            outcome, reason = {
                "user": (Outcome.FAILED, Reason.USER_ERROR),
                "checkpoint": (Outcome.LOST, Reason.CHECKPOINT_FAILED),
                "collective": (Outcome.LOST, Reason.COLLECTIVE_FAILED),
                "memory": (Outcome.LOST, Reason.OUT_OF_MEMORY),
            }[error.cause]
            message = error.message
            if error.cause == "memory":
                message = f"Rank {rank} ran out of memory: lower batch.max_per_rank or use more workers. {message}"
            failure = Failure(
                rank=rank, error_type=error.error_type, message=message, traceback=error.traceback or None
            )
            return cls(outcome=outcome, reason=reason, failure=failure, is_effect=error.cause == "collective")
        if end.killed_in_state is not None:
            return cls._of_silent_process(rank, end.killed_in_state)
        if end.exit_status < 0:
            name = _signal_name(-end.exit_status)
            message = f"Rank {rank} was killed by {name}."
            if name == "SIGKILL":
                message += " If nobody killed it, it ran out of memory: lower batch.max_per_rank or use more workers."
        else:
            name = "SystemExit"
            message = f"Rank {rank} exited with status {end.exit_status} without saying why; its log may tell."
        failure = Failure(rank=rank, error_type=name, message=message)
        return cls(outcome=Outcome.LOST, reason=Reason.RANK_LOST, failure=failure)

    @classmethod
    def _of_silent_process(cls, rank: int, state: str) -> "RankFailure":
        message = f"Rank {rank} stopped answering: its process {_STATES.get(state, 'was alive')} (state {state})."
        failure = Failure(rank=rank, error_type="RankSilent", message=message)
        return cls(
            outcome=Outcome.LOST,
            reason=Reason.RANK_LOST,
            failure=failure,
            is_silent=True,
            is_suspended=state in SUSPENDED,
        )

    @classmethod
    def of_unreachable(cls, rank: int, node_id: str) -> "RankFailure":
        """Judge a rank whose actor does not answer, on a node that has not been declared dead."""
        message = f"Node {node_id} of rank {rank} cannot be reached."
        failure = Failure(rank=rank, error_type="NodeUnreachable", message=message)
        return cls(outcome=Outcome.LOST, reason=Reason.NODE_LOST, failure=failure)

    @classmethod
    def of_actor(cls, rank: int, node_id: str, alive_node_ids: Set[str]) -> "RankFailure":
        """Judge an actor that died, and its process with it."""
        if node_id in alive_node_ids:
            failure = Failure(rank=rank, error_type="ActorDied", message=f"The actor of rank {rank} died.")
            return cls(outcome=Outcome.LOST, reason=Reason.RANK_LOST, failure=failure)
        failure = Failure(rank=rank, error_type="NodeDied", message=f"Node {node_id} of rank {rank} is gone.")
        return cls(outcome=Outcome.LOST, reason=Reason.NODE_LOST, failure=failure)

    @classmethod
    def of_service(cls, rank: int, error: BaseException) -> "RankFailure":
        """Judge an error of the service's own code around the process."""
        failure = Failure(rank=rank, error_type=type(error).__name__, message=str(error))
        return cls(outcome=Outcome.LOST, reason=Reason.RANK_LOST, failure=failure)


def judge(
    *, ends: Mapping[int, RankEnd], failures: Sequence[RankFailure], stop_reason: Reason | None, step: int
) -> Ended:
    """Say how the attempt ended.

    Args:
        ends: how the processes ended, by rank.
        failures: of those that did not end clean, in the order in which they were noticed.
        stop_reason: why the attempt was asked to stop, if it was.
        step: the last step reported.
    """
    if not failures:
        step = max([step, *(end.step for end in ends.values() if end.step is not None)])
        if any(end.stopped for end in ends.values()):
            assert stop_reason is not None
            return Ended(outcome=Outcome.STOPPED, reason=stop_reason, message=f"Stopped after step {step}.", step=step)
        notes = [end.note for end in ends.values() if end.note]
        message = notes[0] if notes else f"All {step} steps are done."
        return Ended(outcome=Outcome.SUCCEEDED, reason=Reason.COMPLETED, message=message, step=step)
    if stop_reason is not None and not any(failure.outcome is Outcome.FAILED for failure in failures):
        return Ended(
            outcome=Outcome.STOPPED,
            reason=stop_reason,
            message="Stopped; the grace ended before every rank had finished.",
            step=step,
        )
    # A rank that failed by itself before one that kept its peers waiting, and that before one that only lost a peer.
    # Then an error that would come again before the rest, and a stopped process before one that may have waited for it.
    cause = min(
        failures,
        key=lambda failure: (
            failure.is_effect,
            failure.is_silent,
            failure.outcome is not Outcome.FAILED,
            not failure.is_suspended,
        ),
    )
    return Ended(
        outcome=cause.outcome,
        reason=cause.reason,
        message=cause.failure.message,
        step=step,
        failure=cause.failure,
    )


def _signal_name(number: int) -> str:
    try:
        return Signals(number).name
    except ValueError:  # most real-time signals have no name
        return f"signal {number}"
