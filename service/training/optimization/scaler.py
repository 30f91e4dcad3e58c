"""Loss scaling for float16 gradients, decided by all ranks together."""

from collections.abc import Callable, Sequence

import torch


class LossScaler:
    """Scales the loss up, so that small gradients do not vanish in float16, and finds how far by trial.

    A step in which any rank's gradient has overflowed is skipped on all of them, and the scale halved; after
    ``growth_interval`` steps in a row without one it is doubled (Micikevicius et al. 2018, section 3.2; the numbers are
    those of ``torch.amp.GradScaler``, which decides on each rank for itself).

    Args:
        initial_scale: power of two.
        growth_interval: steps.

    Attributes:
        scale: what the loss has to be multiplied by before ``backward``.
    """

    scale: float

    def __init__(self, *, initial_scale: float = 2.0**16, growth_interval: int = 2000) -> None:
        self._growth_interval = growth_interval
        self.scale = initial_scale
        self._steps_since_overflow = 0

    @property
    def is_exhausted(self) -> bool:
        """Whether the scale has fallen below 1: what overflows now is no longer the scale's doing."""
        return self.scale < 1.0

    @torch.no_grad()
    def unscale_(self, gradients: Sequence[torch.Tensor], *, world_sum: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        """Divide gradients by the scale, in place, and agree on whether to take the step. All ranks call it together.

        Args:
            gradients: of the whole step, on one device.
            world_sum: adds up a float64 vector over the ranks.

        Returns:
            Whether they are finite on every rank; the same on each of them.
        """
        # Powers of two: the division rounds nothing.
        torch._foreach_mul_(list(gradients), 1 / self.scale)
        largest = torch.nn.utils.get_total_norm(gradients, norm_type=float("inf"))
        overflowed = world_sum((~largest.isfinite()).to(torch.float64).reshape(1))
        return float(overflowed) == 0

    def update(self, *, is_finite: bool) -> None:
        """Choose the scale of the next step.

        Args:
            is_finite: what ``unscale_`` returned; if not, the step was skipped.
        """
        if not is_finite:
            self.scale /= 2
            self._steps_since_overflow = 0
            return
        self._steps_since_overflow += 1
        if self._steps_since_overflow == self._growth_interval:
            self.scale *= 2
            self._steps_since_overflow = 0

    def state_dict(self) -> dict[str, float | int]:
        """Return the state for a checkpoint."""
        return {
            "scale": self.scale,
            "steps_since_overflow": self._steps_since_overflow,
        }

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Go to a state that ``state_dict`` returned."""
        self.scale = float(state["scale"])
        self._steps_since_overflow = int(state["steps_since_overflow"])
