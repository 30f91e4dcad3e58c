"""What is learned: a loss that adds up over samples, and what is counted beside it."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True, eq=False)
class Loss:
    """The loss of some samples, before any division.

    Attributes:
        sum: over the samples, shape (), differentiable.
        weight: what the sum over all ranks is divided by: samples, boxes or valid pixels.
        num_correct: samples classified rightly.
    """

    sum: torch.Tensor
    weight: float
    num_correct: float


def classification_loss(logits: torch.Tensor, targets: torch.Tensor) -> Loss:
    """Cross-entropy of logits (N, K) and class indices (N,)."""
    scores = logits if logits.dtype == torch.float64 else logits.float()
    return Loss(
        sum=F.cross_entropy(scores, targets, reduction="sum"),
        weight=float(len(targets)),
        num_correct=float((scores.argmax(dim=1) == targets).sum()),
    )
