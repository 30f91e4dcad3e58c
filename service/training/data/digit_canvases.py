"""Canvases that show several real digits: for segmentation, and for detection."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from service.domain.catalog.datasets import (
    DigitCanvasesArguments,
    DigitsDetectionArguments,
    DigitsSegmentationArguments,
)
from service.training.data.context import DataContext
from service.training.data.digits import read_digits
from service.training.data.source import Dataset, InMemorySource
from service.training.data.splits import split_rows
from service.training.sampling import derive_seed

_INK = 0.25  # of a pixel of 0 to 1; what is less belongs to the background
_ATTEMPTS = 16  # at a free place for a digit, before it is left out


def build_digits_segmentation(arguments: Mapping[str, object], context: DataContext) -> Dataset:
    """Return canvases (1, H, W) with targets (H, W), int64: 0 is background, 1 to 10 are the digits 0 to 9."""
    del context

    def source(canvases: "_Canvases", inputs: torch.Tensor) -> InMemorySource:
        return InMemorySource(inputs, torch.from_numpy(canvases.labels.astype(np.int64)))

    return _build(DigitsSegmentationArguments.model_validate(dict(arguments)), source, num_outputs=11)


def build_digits_detection(arguments: Mapping[str, object], context: DataContext) -> Dataset:
    """Return canvases (1, H, W) with targets ``boxes`` (M, 4), float64, and ``labels`` (M,), int64.

    A box is x1, y1, x2, y2 in pixels around a digit's ink, its right and lower edge beyond the last pixel.
    """
    del context

    def source(canvases: "_Canvases", inputs: torch.Tensor) -> InMemorySource:
        targets = [
            {"boxes": torch.from_numpy(boxes[shown]), "labels": torch.from_numpy(digits[shown])}
            for boxes, digits, shown in zip(canvases.boxes, canvases.digits, canvases.shown, strict=True)
        ]
        return InMemorySource(inputs, targets)

    return _build(DigitsDetectionArguments.model_validate(dict(arguments)), source, num_outputs=10)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Canvases:
    """Canvases of one split, with up to K digits each.

    Attributes:
        pixels: (N, H, W), float32, 0 to 1 before noise.
        labels: (N, H, W), uint8.
        boxes: (N, K, 4), float64.
        digits: (N, K), int64.
        shown: (N, K), whether there is such a digit.
    """

    pixels: NDArray[np.float32]
    labels: NDArray[np.uint8]
    boxes: NDArray[np.float64]
    digits: NDArray[np.int64]
    shown: NDArray[np.bool_]


def _build(
    options: DigitCanvasesArguments,
    source: Callable[["_Canvases", torch.Tensor], InMemorySource],
    *,
    num_outputs: int,
) -> Dataset:
    images, digits = read_digits()
    rows = split_rows(len(images), test_fraction=options.test_fraction, seed=options.split_seed)
    training, held_out = (
        _draw(images[chosen] / 16, digits[chosen], options, num_canvases=count, purpose=purpose)
        for chosen, count, purpose in zip(
            rows,
            (options.num_training, options.num_held_out),
            ("training canvases", "held-out canvases"),
            strict=True,
        )
    )
    mean, std = float(training.pixels.mean(dtype=np.float64)), float(training.pixels.std(dtype=np.float64))

    def standardized(canvases: _Canvases) -> InMemorySource:
        inputs = (canvases.pixels - np.float32(mean)) / np.float32(std)
        return source(canvases, torch.from_numpy(inputs).unsqueeze(1))

    return Dataset(training=standardized(training), held_out=standardized(held_out), num_outputs=num_outputs)


def _draw(
    images: NDArray[np.float64],
    digits: NDArray[np.int64],
    options: DigitCanvasesArguments,
    *,
    num_canvases: int,
    purpose: str,
) -> _Canvases:
    """Draw a split's canvases, all of them at once.

    Canvas i is a function of (split seed, i): its random numbers are the i-th rows of streams of their own.

    Args:
        images: (n, 8, 8), 0 to 1, the originals to choose from.
        digits: (n,).
        options: of the dataset.
        num_canvases: to draw.
        purpose: of the seed, so that splits differ.
    """
    most, scale, height, width = options.max_digits, options.scale, options.height, options.width
    side = 8 * scale

    def draw(what: str, *shape: int) -> NDArray[np.float64]:
        return _uniform(derive_seed(seed=options.split_seed, purpose=f"{purpose}/{what}"), num_canvases, *shape)

    chosen = (draw("originals", most) * len(images)).astype(np.int64)
    wanted = np.arange(most) <= (draw("numbers", 1) * most).astype(np.int64)
    candidates = draw("places", most, _ATTEMPTS, 2) * [height - side + 1, width - side + 1]
    places, shown = _without_overlap(candidates.astype(np.int64), wanted, side=side)

    enlarged = images.astype(np.float32).repeat(scale, axis=1).repeat(scale, axis=2)
    marks = np.where(enlarged >= _INK, digits[:, None, None] + 1, 0).astype(np.uint8)
    pixels = np.zeros((num_canvases, height, width), np.float32)
    labels = np.zeros((num_canvases, height, width), np.uint8)
    for which in range(most):
        (canvas,) = np.nonzero(shown[:, which])
        top, left = places[canvas, which].T[..., None, None]  # each (n, 1, 1)
        area = (canvas[:, None, None], top + np.arange(side)[:, None], left + np.arange(side))  # (n, side, side)
        pixels[area] = enlarged[chosen[canvas, which]]
        labels[area] = marks[chosen[canvas, which]]
    if options.noise > 0:
        # Uniform: of all distributions with this standard deviation the quickest to draw.
        seed = derive_seed(seed=options.split_seed, purpose=f"{purpose}/noise")
        pixels += (_uniform_float32(seed, *pixels.shape) - np.float32(0.5)) * np.float32(options.noise * 12**0.5)
    return _Canvases(
        pixels=pixels, labels=labels, boxes=_boxes(images[chosen], places, scale), digits=digits[chosen], shown=shown
    )


def _without_overlap(
    candidates: NDArray[np.int64], wanted: NDArray[np.bool_], *, side: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Give each digit in turn the first of its candidate places that no earlier one covers.

    Args:
        candidates: (N, K, attempts, 2), upper left corners: row, column.
        wanted: (N, K).
        side: length of a digit's square.

    Returns:
        Places (N, K, 2), and whether the digit has one (N, K).
    """
    num_canvases, most = wanted.shape
    places = candidates[:, :, 0].copy()
    shown = wanted.copy()
    canvas = np.arange(num_canvases)
    for which in range(1, most):
        apart = np.abs(candidates[:, which, :, None] - places[:, None, :which]).max(axis=-1) >= side
        free = (apart | ~shown[:, None, :which]).all(axis=-1)  # (N, attempts)
        places[:, which] = candidates[canvas, which, free.argmax(axis=-1)]
        shown[:, which] &= free.any(axis=-1)
    return places, shown


def _boxes(images: NDArray[np.float64], places: NDArray[np.int64], scale: int) -> NDArray[np.float64]:
    """Return boxes (N, K, 4) around the ink of images (N, K, 8, 8) that are enlarged and put into places (N, K, 2)."""
    ink = images >= _INK
    edges = []
    for axis, place in ((-2, places[..., 1]), (-1, places[..., 0])):  # which columns, then which rows have ink
        has_ink = np.asarray(ink.any(axis=axis))  # (N, K, 8)
        first, last = has_ink.argmax(axis=-1), 8 - has_ink[..., ::-1].argmax(axis=-1)
        edges.append((place + scale * first, place + scale * last))
    (left, right), (top, bottom) = edges
    return np.stack([left, top, right, bottom], axis=-1).astype(np.float64)


def _uniform(seed: int, *shape: int) -> NDArray[np.float64]:
    """Return numbers of [0, 1): from the raw stream, which stays the same from release to release."""
    raw = np.random.Philox(key=seed).random_raw(int(np.prod(shape))).astype(np.uint64, copy=False)
    numbers: NDArray[np.float64] = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers.reshape(shape)


def _uniform_float32(seed: int, *shape: int) -> NDArray[np.float32]:
    """Return multiples of 2⁻¹⁶ of [0, 1), four to a number of the raw stream."""
    length = int(np.prod(shape))
    raw = np.random.Philox(key=seed).random_raw(-(-length // 4)).astype("<u8", copy=False).view("<u2")[:length]
    return (raw.astype(np.float32) * np.float32(2.0**-16)).reshape(shape)
