"""What all ranks know after a step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The same on each rank, but for the times.

    Attributes:
        loss: mean over the mini-batch.
        means: of the task's metrics, by name, likewise.
        learning_rate: of this step.
        gradient_norm: L2, before clipping.
        time_s: on this rank.
        data_wait_s: the part of it in which this rank waited for samples.
        stop: whether any rank wants to stop here.
        cause: where loss or gradient is not finite, in words; empty where they are. The weights are then as before.
        is_hopeless: whether the loss scale has been lowered so far that it is no longer the reason for what overflows.
        details: what the diagnostics found, by name of the metric.
    """

    loss: float
    means: Mapping[str, float]
    learning_rate: float
    gradient_norm: float
    time_s: float
    data_wait_s: float
    stop: bool
    cause: str
    is_hopeless: bool
    details: Mapping[str, float]

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient are numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)

    @property
    def metrics(self) -> dict[str, float]:
        """The values by their names in the training curves."""
        return {
            "train/loss": self.loss,
            **{f"train/{name}": value for name, value in self.means.items()},
            "train/learning_rate": self.learning_rate,
            "train/gradient_norm": self.gradient_norm,
            "train/step_time_s": self.time_s,
            "train/data_wait_s": self.data_wait_s,
            **self.details,
        }
