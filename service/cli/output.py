"""What commands print: data on stdout, all else on stderr; never a control character that came with the data."""

import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from enum import StrEnum

_ESCAPES = re.compile(
    r"""
    \x1b \[ [0-?]* [ -/]* [@-~]              # CSI: colours, cursor movement
  | \x1b [\]PX^_] [^\x07\x1b]* (?: \x07 | \x1b\\ )?   # OSC and other strings: titles, links, clipboard
  | \x1b .?                                  # the rest
  | [\x00-\x08\x0b-\x1f\x7f-\x9f]            # controls, but tab and new line
  | [\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]    # marks that reorder the text around them
    """,
    re.VERBOSE | re.DOTALL,
)


class Format(StrEnum):
    """How data is printed."""

    TABLE = "table"
    JSON = "json"


def inert(text: str) -> str:
    """Return text without anything that a terminal would obey; of controls, only tab and new line are left."""
    return _ESCAPES.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def one_line(text: str) -> str:
    """Return inert text on one line."""
    return " ".join(inert(text).split())


def say(text: str) -> None:
    """Print inert text to stderr: progress, hints, errors."""
    sys.stderr.write(inert(text) + "\n")
    sys.stderr.flush()


def show(text: str, *, end: str = "\n") -> None:
    """Print inert text to stdout: what was asked for."""
    sys.stdout.write(inert(text) + end)
    sys.stdout.flush()


def show_json(data: object) -> None:
    """Print a JSON document to stdout."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")  # escapes controls and all beyond ASCII
    sys.stdout.flush()


def show_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows in columns, never cut short, so that other programs can read them."""
    lines = [tuple(header), *(tuple(_cell(value) for value in row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        show("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def show_pairs(pairs: Iterable[tuple[str, object]]) -> None:
    """Print names and values, one pair a line; pairs without a value are left out."""
    kept = [(name, _cell(value)) for name, value in pairs if value is not None]
    width = max((len(name) for name, _ in kept), default=0)
    for name, value in kept:
        show(f"{name.ljust(width)}  {value}")


def age(time: datetime) -> str:
    """Say how long ago something was."""
    seconds = max(0, int((datetime.now(UTC) - time).total_seconds()))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"


def steps(step: int, num_steps: int | None) -> str:
    """Say how far a job is."""
    return f"{step}/{'?' if num_steps is None else num_steps}"


def is_lively() -> bool:
    """Say whether stderr is a terminal that may be drawn on."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return one_line(f"{value:.4g}" if isinstance(value, float) else str(value))
