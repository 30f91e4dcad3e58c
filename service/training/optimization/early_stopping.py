"""When a metric has stopped getting better."""

import math
from dataclasses import asdict, dataclass
from typing import Self

from service.domain.spec import EarlyStoppingSpec


@dataclass(frozen=True, kw_only=True)
class Patience:
    """What the evaluations so far have shown.

    Attributes:
        best: value of the metric; None before the first evaluation that gave a number.
        evaluations_since_best: how many followed it.
    """

    best: float | None = None
    evaluations_since_best: int = 0

    def after(self, value: float, spec: EarlyStoppingSpec) -> Self:
        """Return what is known after another evaluation.

        Args:
            value: of the metric that the specification names. What is not a number is no improvement.
            spec: what counts as one: a value better than the best by more than ``min_delta``.
        """
        if math.isfinite(value) and (self.best is None or self._gain(value, spec) > spec.min_delta):
            return type(self)(best=value)
        return type(self)(best=self.best, evaluations_since_best=self.evaluations_since_best + 1)

    def is_over(self, spec: EarlyStoppingSpec) -> bool:
        """Tell whether the job should end: ``patience`` evaluations in a row brought no improvement."""
        return self.evaluations_since_best >= spec.patience

    def state_dict(self) -> dict[str, float | int | None]:
        """Return the state for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, float | int | None]) -> Self:
        """Return what ``state_dict`` was made of."""
        since = state["evaluations_since_best"]
        assert isinstance(since, int)
        return cls(best=state["best"], evaluations_since_best=since)

    def _gain(self, value: float, spec: EarlyStoppingSpec) -> float:
        assert self.best is not None
        return self.best - value if spec.mode == "min" else value - self.best
