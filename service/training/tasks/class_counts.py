"""How often each class was right, predicted and there."""

import torch


class ClassCounts:
    """Counts predictions, class by class. Counting waits for no device.

    Args:
        num_classes: K.
        device: of predictions and targets.
    """

    def __init__(self, *, num_classes: int, device: torch.device) -> None:
        self._num_classes = num_classes
        # The last column takes what does not count.
        self._counts = torch.zeros(3, num_classes + 1, dtype=torch.int64, device=device)

    def update(self, predictions: torch.Tensor, targets: torch.Tensor, counts: torch.Tensor | None = None) -> None:
        """Count.

        Args:
            predictions: classes, int64, any shape.
            targets: classes of the same shape.
            counts: which of them count, bool, of the same shape; all by default.
        """
        nowhere = self._num_classes
        if counts is not None:
            predictions = predictions.where(counts, nowhere)
            targets = targets.where(counts, nowhere)
        right = targets.where(predictions == targets, nowhere)
        for row, classes in zip(self._counts, (right, predictions, targets), strict=True):
            flat = classes.reshape(-1)
            row.scatter_add_(0, flat, torch.ones_like(flat))

    @property
    def vector(self) -> torch.Tensor:
        """The counts, float64 (3K,), to be added up over the ranks."""
        return self._counts[:, : self._num_classes].to(torch.float64).reshape(-1)


def class_scores(vector: torch.Tensor) -> dict[str, torch.Tensor]:
    """Score classes.

    Args:
        vector: what ``ClassCounts.vector`` gave, added up over the ranks.

    Returns:
        For the classes that occur, as target or as prediction (C of the K), float64 on the CPU: ``recall``'s numerator
        ``right`` and denominator ``there``; ``dice``, 2·right / (predicted + there), which is F1 too; and ``iou``,
        right / (predicted + there − right); shape (C,) each.
    """
    right, predicted, there = vector.cpu().reshape(3, -1)
    occurs = predicted + there > 0
    right, predicted, there = right[occurs], predicted[occurs], there[occurs]
    return {
        "right": right,
        "there": there,
        "dice": 2 * right / (predicted + there),
        "iou": right / (predicted + there - right),
    }
