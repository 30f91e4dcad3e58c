"""How the training process of a rank ended."""

from dataclasses import dataclass

from service.domain.rank_protocol import Errored


@dataclass(frozen=True, kw_only=True)
class RankEnd:
    """How a rank's process ended.

    Attributes:
        exit_status: its exit code; negative is the signal that ended it.
        step: optimizer steps done, where it said so.
        stopped: it was asked to stop and did.
        error: what it reported, if it did.
        note: why it ended before the last step by itself; empty where it did not.
        killed_in_state: the kernel's letter for the state of its process when the service killed it; None where it
            ended by itself.
        out_of_memory: how it is known to have run out of memory, as what the rank did; empty where it is not.
        is_clear: nothing of it is left in its actor, which may serve another attempt.
    """

    exit_status: int
    step: int | None
    stopped: bool
    error: Errored | None
    note: str = ""
    killed_in_state: str | None = None
    out_of_memory: str = ""
    is_clear: bool = True

    @property
    def is_clean(self) -> bool:
        """Whether the rank did all it was asked to."""
        return self.exit_status == 0 and self.error is None and self.step is not None
