"""How much the gradient differs from sample to sample: which batch would be large enough."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from service.training.optimization.gradient_norms import squared_norm


@dataclass(frozen=True, kw_only=True)
class PartGradients:
    """Gradients of parts of a mini-batch, such as what each rank computes in each micro-step: sums, which add up.

    Attributes:
        num_parts: how many.
        squared_norms: sum of the squared L2 norms, each of the gradient of the *mean* loss of the part's samples.
        inverse_sizes: sum of 1 / samples of the part.
    """

    num_parts: int
    squared_norms: float
    inverse_sizes: float


class GradientNoise:
    """Estimates the simple noise scale tr(Σ) / ‖G‖², about the batch beyond which more samples a step help little.

    After McCandlish et al. 2018, equation 2.9: the gradient of the mean loss of b samples has the expected squared norm
    ‖G‖² + tr(Σ)/b, so two sizes of batch give both terms (appendix A.1). As the ratio of noisy numbers is biased, each
    is averaged over the steps first. The theory takes samples for independent. Where batch norm couples them, the
    gradient of a part is that of its samples' losses with all else in the normalization batch as it is.

    Args:
        decay: of the averages over the calls.
    """

    def __init__(self, *, decay: float = 0.95) -> None:
        self._decay = decay
        self._weight = self._signal = self._noise = 0.0

    def observe(self, parts: PartGradients, *, num_samples: int, squared_norm: float) -> None:
        """Fold in a step.

        Args:
            parts: of the mini-batch, over all ranks; not necessarily all of it.
            num_samples: of the whole mini-batch.
            squared_norm: L2, of the gradient of the whole mini-batch's mean loss, before clipping.
        """
        signal, noise = signal_and_noise(parts, num_samples=num_samples, squared_norm=squared_norm)
        self._weight += (1 - self._decay) * (1 - self._weight)
        self._signal += (1 - self._decay) * (signal - self._signal)
        self._noise += (1 - self._decay) * (noise - self._noise)

    @property
    def scale(self) -> float | None:
        """The noise scale, in samples; None while the averages do not tell it: both have to be positive."""
        return self._noise / self._signal if self._noise > 0 and self._signal > 0 else None

    @property
    def metrics(self) -> dict[str, float]:
        """What is known: ``gradient_noise_scale`` in samples, and the averages that it is the ratio of."""
        if not self._weight:
            return {}
        # An average that began at zero is too small by its weight.
        known = {"gradient_signal": self._signal / self._weight, "gradient_noise": self._noise / self._weight}
        return known if self.scale is None else {**known, "gradient_noise_scale": self.scale}

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint."""
        return {"weight": self._weight, "signal": self._signal, "noise": self._noise}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go to a state that ``state_dict`` returned."""
        self._weight, self._signal, self._noise = state["weight"], state["signal"], state["noise"]


def signal_and_noise(parts: PartGradients, *, num_samples: int, squared_norm: float) -> tuple[float, float]:
    """Estimate ‖G‖² and tr(Σ) from one step, without bias (McCandlish et al. 2018, equations A.2 and A.3).

    Parts may differ in size: the mean of their squared norms is expected to be ‖G‖² + tr(Σ) · mean(1/b).

    Args:
        parts: of the mini-batch, smaller than it.
        num_samples: of the whole mini-batch.
        squared_norm: L2, of its gradient.

    Returns:
        (‖G‖², tr(Σ)); either may be negative by chance.
    """
    inverse_size = parts.inverse_sizes / parts.num_parts
    assert inverse_size > 1 / num_samples, "one batch size does not tell two terms apart"
    noise = (parts.squared_norms / parts.num_parts - squared_norm) / (inverse_size - 1 / num_samples)
    return squared_norm - noise / num_samples, noise


@contextmanager
def watched_gradients(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Note the gradients that a backward brings, on this rank alone: before any all-reduce and accumulation.

    It leaves them as they are, and works below DDP.

    Args:
        model: whose parameters to watch, for one backward.

    Returns:
        A context, which gives a list of the squared norms of what arrives, float64 (), on the device.
    """
    squares: list[torch.Tensor] = []

    def note(gradient: torch.Tensor) -> None:
        squares.append(squared_norm([gradient]))

    handles = [
        parameter.register_hook(note)  # type: ignore[no-untyped-call]
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    try:
        yield squares
    finally:
        for handle in handles:
            handle.remove()
