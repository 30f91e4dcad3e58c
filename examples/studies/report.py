"""What a study found: a Markdown table for people, a JSON file for programs."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure over several seeds: mean, lowest and highest."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarize at least one value."""
        return cls(mean=fmean(values), low=min(values), high=max(values))

    def show(self, digits: int) -> str:
        """Write it with so many decimals: ``0.97 (0.96–0.98)``."""
        return f"{self.mean:.{digits}f} ({self.low:.{digits}f}–{self.high:.{digits}f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_json(folder: Path | None, study: str, found: Mapping[str, Any]) -> None:
    """Write what was found beside when and on what it was measured; nothing where there is no folder."""
    if folder is None:
        return
    measured = {
        "study": study,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"processor": _processor(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), "torch": importlib.metadata.version("torch")},
    }
    path = folder / f"{study}.json"
    path.write_text(json.dumps(measured | dict(found), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\nWritten to {path}")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())
