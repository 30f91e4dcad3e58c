"""How long a job will still run, from what is known of it."""

from dataclasses import dataclass

# An estimate that has run out is put off by this part of the time that the job has run for: the longer it has gone on,
# the longer it is likely to.
OVERTIME = 0.1
# Progress tells nothing before so long: the first steps are slow.
MEASURED_AFTER_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Steps that were done in a time.

    Attributes:
        num_steps: how many.
        in_s: in which time.
        num_left: how many are left.
    """

    num_steps: int
    in_s: float
    num_left: int

    @property
    def left_s(self) -> float | None:
        """How long the rest takes at this rate; None if too little is known."""
        if self.num_steps <= 0 or self.in_s < MEASURED_AFTER_S:
            return None
        return self.num_left * self.in_s / self.num_steps


def remaining_s(
    *, ran_for_s: float, expected_s: float | None, timeout_s: float | None, progress: Progress | None = None
) -> float | None:
    """Return how long a job will still run, in s; None if nothing is known.

    Its progress tells it best; else what its owner expects, which is taken to be too little once it has passed. No job
    runs for longer than its time limit.

    Args:
        ran_for_s: how long it has run, in all its attempts.
        expected_s: how long it will run in all, as its owner says.
        timeout_s: after so long it is stopped.
        progress: what it has done and has left to do.
    """
    left_s = None if progress is None else progress.left_s
    if left_s is None and expected_s is not None:
        left_s = max(expected_s - ran_for_s, OVERTIME * ran_for_s)
    if timeout_s is not None:
        limit_s = max(timeout_s - ran_for_s, 0.0)
        left_s = limit_s if left_s is None else min(left_s, limit_s)
    return left_s
