"""The benchmarks of the library run, on inputs too small for their times to mean anything.

A failure of `numerics` is a loss of accuracy, of the others a wrong result or a script that no longer runs.
"""

import subprocess
import sys

import pytest

from benchmarks.results import table, with_section
from benchmarks.run_all import QUICK


@pytest.mark.parametrize("benchmark", QUICK)
def test_a_quick_run_succeeds_and_compares_ours_with_others(benchmark: str) -> None:
    run = subprocess.run([sys.executable, "-m", f"benchmarks.{benchmark}", "--quick"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    header = next(line for line in run.stdout.splitlines() if line.startswith("|"))
    assert "ours" in header
    assert "detectron2 Naive" in header


def test_a_note_takes_a_section_once_and_keeps_the_others() -> None:
    note = "# Day\n\nBy hand.\n"
    note = with_section(note, "first", "1\n")
    note = with_section(note, "second", "2\n")
    assert with_section(note, "first", "1 again\n") == "# Day\n\nBy hand.\n\n## first\n\n1 again\n\n## second\n\n2\n"
    assert with_section(note, "second", "2 again\n") == "# Day\n\nBy hand.\n\n## first\n\n1\n\n## second\n\n2 again\n"


def test_a_table_is_aligned() -> None:
    assert (
        table(["a", "long"], [["wide cell", "1"]]) == "| a         | long |\n| --------- | ---- |\n| wide cell | 1    |"
    )
