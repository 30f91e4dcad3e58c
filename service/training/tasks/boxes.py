"""Arithmetic of axis-aligned boxes: corners (x1, y1, x2, y2), or distances (left, top, right, bottom) from a point."""

import torch


def cell_centres(height: int, width: int, *, stride: int, like: torch.Tensor) -> torch.Tensor:
    """Return the points (x, y) that the cells of a map stand for, (height · width, 2), in pixels, row by row.

    Args:
        height: of the map, in cells.
        width: of the map, in cells.
        stride: pixels per cell.
        like: whose dtype and device to use.
    """
    y = (torch.arange(height, dtype=like.dtype, device=like.device) + 0.5) * stride
    x = (torch.arange(width, dtype=like.dtype, device=like.device) + 0.5) * stride
    return torch.stack([x.repeat(height), y.repeat_interleave(width)], dim=1)


def corners(points: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
    """Return the boxes that lie around points.

    Args:
        points: (n, 2).
        distances: from them, (n, 4).

    Returns:
        (n, 4).
    """
    return torch.cat([points - distances[:, :2], points + distances[:, 2:]], dim=1)


def areas(boxes: torch.Tensor) -> torch.Tensor:
    """Return the areas of boxes (n, 4) given by corners, (n,)."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def pairwise_iou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return intersection over union of boxes (n, 4) and (m, 4) given by corners, (n, m); 0 where both are empty."""
    sides = torch.minimum(first[:, None, 2:], second[None, :, 2:]) - torch.maximum(first[:, None, :2], second[:, :2])
    intersection = sides.clamp(min=0).prod(dim=2)
    union = areas(first)[:, None] + areas(second)[None] - intersection
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def generalized_iou(predicted: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the generalized IoU (Rezatofighi et al. 2019, algorithm 1) of boxes around the same points.

    Args:
        predicted: distances ≥ 0, (*, 4).
        wanted: distances > 0, (*, 4).

    Returns:
        In [−1, 1], shape (*).
    """
    inner, outer = torch.minimum(predicted, wanted), torch.maximum(predicted, wanted)
    intersection, enclosing = _area(inner), _area(outer)
    union = _area(predicted) + _area(wanted) - intersection
    return intersection / union - (enclosing - union) / enclosing


def suppress_overlaps(
    boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, *, iou_threshold: float
) -> torch.Tensor:
    """Keep the best of the boxes that overlap: greedy non-maximum suppression within each class.

    In rounds over all boxes at once: one falls if a better one that stands in this round overlaps it. What stands after
    n rounds is right for the n best boxes, and so in the end for all (Zheng et al. 2021, "Cluster-NMS"); few rounds are
    needed, as many as overlaps form a chain.

    Args:
        boxes: corners, (n, 4).
        scores: (n,).
        labels: classes, (n,).
        iou_threshold: those that overlap by more are one object's.

    Returns:
        Indices of what is kept, best first, int64.
    """
    order = scores.argsort(descending=True, stable=True)
    overlaps = pairwise_iou(boxes[order], boxes[order]) > iou_threshold
    overlaps &= labels[order][:, None] == labels[order]
    beats = overlaps.triu(diagonal=1)  # (better, worse)
    stands = torch.ones(len(order), dtype=torch.bool, device=boxes.device)
    while True:
        still = ~(beats & stands[:, None]).any(dim=0)
        if torch.equal(still, stands):
            return order[stands]
        stands = still


def _area(distances: torch.Tensor) -> torch.Tensor:
    left, top, right, bottom = distances.unbind(dim=-1)
    return (left + right) * (top + bottom)
