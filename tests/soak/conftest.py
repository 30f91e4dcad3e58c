"""What a soak tells: one row of the day's report for each of its tests, those of other runs of that day beside them.

A test says what it owes and what it saw with ``record_property("owed", …)`` and ``record_property("seen", …)``.
"""

import json
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from benchmarks.results import FOLDER, describe_machine, table, with_section

HEADER = ("fault", "owed", "seen", "result", "time")


@pytest.hookimpl(hookwrapper=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Write down what the tests of this folder told, whether or not they passed."""
    yield
    rows = {
        report.nodeid.removeprefix("tests/soak/"): {
            "owed": properties.get("owed", ""),
            "seen": properties.get("seen", ""),
            "result": report.outcome,
            "time": f"{report.duration:.0f} s",
        }
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        if report.when == "call" and report.nodeid.startswith("tests/soak/")
        for properties in [dict(report.user_properties)]
    }
    if rows:
        path = _write(rows)
        terminalreporter.write_line(f"The soak's report is in {path}")


def _write(rows: dict[str, dict[str, str]]) -> str:
    now = datetime.now(UTC)
    path = FOLDER / f"soak_{now:%Y-%m-%d}.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    merged = dict(sorted((earlier | rows).items()))
    path.write_text(json.dumps(merged, indent=1) + "\n")
    note = FOLDER / f"{now:%Y-%m-%d}.md"
    text = note.read_text() if note.exists() else f"# {now:%Y-%m-%d}\n"
    shown = table(HEADER, [(name, *(row[column] for column in HEADER[1:])) for name, row in merged.items()])
    note.write_text(with_section(text, "soak", f"`make soak`, {now:%H:%M} UTC, {describe_machine()}.\n\n{shown}\n"))
    return str(note)
