"""The plots of the studies: dark on white, colours that the colour-blind tell apart, labels beside the lines."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib as mpl

mpl.use("Agg")  # files, no window

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe & Ito 2008, without their yellow, which is too light on white.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#222222",
)
LABEL_POINTS = 11.5
"""Height of a label and its distance to the next, in points."""
_DPI = 110

plt.rcParams.update(
    {
        "font.size": 10,
        "axes.edgecolor": BLACK,
        "axes.labelcolor": BLACK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 10.5,
        "axes.grid": True,
        "grid.color": "#E4E4E4",
        "grid.linewidth": 0.7,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "lines.markersize": 5,
        "text.color": BLACK,
        "xtick.color": BLACK,
        "ytick.color": BLACK,
    }
)


def panels(rows: int = 1, columns: int = 1, *, height: float) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure as wide as a page of text, and its panels by row; those of a row share their vertical axis."""
    figure, axes = plt.subplots(
        rows, columns, figsize=(7.6, height), sharex="col", sharey="row", squeeze=False, layout="constrained"
    )
    return figure, [list(row) for row in axes]


def label_ends(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write labels to the right of the panel, each at the height of the end of its line, none over another.

    Args:
        axes: the panel, with all that it shows.
        labels: value, text and colour of each.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # only then is it known where values lie
    pixels = figure.dpi / 72  # of a point
    heights = [float(axes.transData.transform((1, value))[1]) / pixels for value, _, _ in labels]
    for index, place in _apart(heights).items():
        value, text, color = labels[index]
        axes.annotate(
            text,
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(7, place - heights[index]),
            textcoords="offset points",
            color=color,
            fontsize=9,
            va="center",
            annotation_clip=False,
        )


def _apart(heights: Sequence[float]) -> dict[int, float]:
    """Return where each label goes: where it belongs, or, where several belong, around the middle of them."""
    groups: list[list[int]] = []
    for index in sorted(range(len(heights)), key=heights.__getitem__):
        groups.append([index])
        while len(groups) > 1 and _lowest(groups[-1], heights) < _highest(groups[-2], heights) + LABEL_POINTS:
            last = groups.pop()
            groups[-1] += last
    return {
        index: _lowest(group, heights) + place * LABEL_POINTS for group in groups for place, index in enumerate(group)
    }


def _lowest(group: Sequence[int], heights: Sequence[float]) -> float:
    return fmean(heights[index] for index in group) - (len(group) - 1) / 2 * LABEL_POINTS


def _highest(group: Sequence[int], heights: Sequence[float]) -> float:
    return fmean(heights[index] for index in group) + (len(group) - 1) / 2 * LABEL_POINTS


def save(figure: Figure, folder: Path | None, study: str) -> None:
    """Write ``STUDY.png``; nothing where there is no folder."""
    if folder is not None:
        figure.savefig(folder / f"{study}.png", dpi=_DPI)
        print(f"Drawn to {folder / study}.png")
    plt.close(figure)
