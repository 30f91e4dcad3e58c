"""Where a benchmark's result goes: JSON with everything that was measured, and a section of the day's note."""

import importlib.metadata
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
PACKAGES = ("torch", "ray", "httpx")


def record(benchmark: str, result: Mapping[str, Any], report: str) -> None:
    """Prints the report, writes the JSON file, and puts the report into the day's note in place of an earlier one.

    Args:
        benchmark: Names the files and the section.
        result: Configuration and figures; when and on what they were measured is added.
        report: Markdown without headings, for the note.
    """
    now = datetime.now(UTC)
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{benchmark}_{now:%Y-%m-%d}.json"
    where = {"time": now.isoformat(timespec="seconds"), "machine": machine(), "versions": versions()}
    path.write_text(json.dumps({"benchmark": benchmark, **where, **result}, indent=1) + "\n")
    note = FOLDER / f"{now:%Y-%m-%d}.md"
    text = note.read_text() if note.exists() else f"# {now:%Y-%m-%d}\n"
    command = shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    measured_on = f"`{command}`, {now:%H:%M} UTC, {describe_machine()}."
    note.write_text(with_section(text, benchmark, f"{measured_on}\n\n{report.strip()}\n"))
    print(f"{report.strip()}\n\nWritten to {path} and {note}")


def with_section(note: str, title: str, body: str) -> str:
    """The note with its section of this title replaced, or with a new one at its end."""
    section = f"## {title}\n\n{body}"
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    if pattern.search(note):
        return pattern.sub(lambda found: section if found.end() == len(note) else section + "\n", note)
    return f"{note.rstrip()}\n\n{section}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that also reads well as plain text."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def machine() -> dict[str, Any]:
    """Processor, cores and the load of the last minute: on a shared machine times mean little without it."""
    cpu = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "processor": cpu[1] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "load_1_min": round(os.getloadavg()[0], 2),
    }


def describe_machine() -> str:
    """One line for people."""
    facts = machine()
    return f"{facts['cores']} cores of {facts['processor']}, load {facts['load_1_min']:.1f}"


def versions() -> dict[str, str]:
    """Of Python and of what the benchmarks measure, as far as it is installed, without importing it."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
