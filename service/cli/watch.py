"""Following a job to its end on the terminal."""

import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from service.cli.metric_names import evaluation_metrics, scores, training_metrics
from service.cli.output import one_line, say, steps
from service.client.client import Client
from service.client.errors import WaitTimeout
from service.client.stream import StreamItem
from service.domain.job import Event, Job, MetricPoint

TOLD_EVENTS = (
    "status",
    "stop_requested",
    "resumed",
    "warning",
    "checkpoint_quarantined",
    "cancel_requested",
    "pause_requested",
    "resize_requested",
)
SETTLE_S = 0.05  # the points of one report arrive together; this much silence ends it


def watch_job(client: Client, job: Job, *, timeout_s: float | None, lively: bool) -> Job:
    """Show a job's progress on stderr until it has ended; one that is resumed at its end is watched on.

    Args:
        client: of the service.
        job: which.
        timeout_s: how long to watch at most.
        lively: whether stderr may be drawn on; plain lines otherwise.

    Returns:
        The job as it ended.

    Raises:
        WaitTimeout: the job had not ended in time.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    items, position = _pump(client.stream(job.id)), 0
    with _bar(job) if lively else nullcontext(_Lines()) as display:
        progress = Progress(num_steps=job.num_steps)
        while True:
            left_s = 3600.0 if deadline is None else deadline - time.monotonic()
            if left_s <= 0:
                raise WaitTimeout(
                    f"Job {job.id} had not ended after {timeout_s:g} s; it goes on. `syncbn watch {job.id}` watches on."
                )
            try:
                item = items.get(timeout=min(left_s, SETTLE_S) if progress.report else left_s)
            except queue.Empty:
                display.update(progress, progress.settle())
                continue
            if item is None:
                display.update(progress, progress.settle())
                job = client.get(job.id)
                # One that was resumed since may have ended again, and all of that is still to be told.
                if job.status.is_terminal and not client.events(job.id, after=position, limit=1):
                    return job
                items = _pump(client.stream(job.id, after=position))
                continue
            if isinstance(item, Exception):
                raise item
            position = item.position
            display.update(progress, progress.take(item))


@dataclass(kw_only=True)
class Progress:
    """What is known of a job that is watched; says what is worth a line.

    Attributes:
        report: the values of the step that is being told.
    """

    num_steps: int | None
    status: str = ""
    step: int = 0
    values: dict[str, float | None] = field(default_factory=dict)
    report: dict[str, MetricPoint] = field(default_factory=dict)
    told_tenths: int = 0

    def take(self, item: StreamItem) -> list[str]:
        """Take in what happened; return the lines to print."""
        if isinstance(item, MetricPoint):
            first = next(iter(self.report.values()), None)
            lines = self.settle() if first is not None and first.position != item.position else []
            self.report[item.name] = item
            return lines
        return [*self.settle(), *self._take_event(item)]

    def settle(self) -> list[str]:
        """Take in the report that is complete now; return the lines to print."""
        if not self.report:
            return []
        report, self.report = self.report, {}
        self.step = next(iter(report.values())).step
        self.values.update({name: point.value for name, point in report.items()})
        lines = []
        tenths = 10 * self.step // self.num_steps if self.num_steps else 0
        if "train/loss" in report and tenths > self.told_tenths:
            self.told_tenths = tenths
            lines.append(self._line("", report, training_metrics(report)))
        if any(name.startswith("eval/") for name in report):
            lines.append(self._line("evaluation: ", report, evaluation_metrics(report)))
        return lines

    def _take_event(self, event: Event) -> list[str]:
        if event.kind == "status":
            self.status = str(event.data.get("to", ""))
        elif event.kind == "resumed":
            self.step = int(event.data.get("step", 0))
            self.told_tenths = 10 * self.step // self.num_steps if self.num_steps else 0
        is_told = event.kind in TOLD_EVENTS or (event.kind == "exactness" and event.data.get("exact") is False)
        if not is_told or (event.kind == "resumed" and self.step == 0):
            return []
        what = self.status if event.kind == "status" else event.kind.replace("_", " ")
        return [f"{event.time.astimezone():%H:%M:%S}  {what}: {one_line(event.message)}"]

    def _line(self, prefix: str, report: dict[str, MetricPoint], names: Sequence[str]) -> str:
        share = f" ({100 * self.step // self.num_steps} %)" if self.num_steps else ""
        values = [
            f"{name.partition('/')[2]} {_number(report[name].value, report[name].nonfinite)}"
            for name in names
            if name in report
        ]
        return f"          {prefix}step {steps(self.step, self.num_steps)}{share}  {', '.join(values)}"


class Display(Protocol):
    """Where progress is shown."""

    def update(self, progress: Progress, lines: list[str]) -> None:
        """Show what is new."""
        ...


class _Lines:
    """Plain lines, for files and pipes."""

    def update(self, progress: Progress, lines: list[str]) -> None:
        for line in lines:
            say(line)


@contextmanager
def _bar(job: Job) -> Iterator[Display]:
    """Draw a bar that tells status, steps, loss, accuracy and the time that is left; lines go above it."""
    from rich import progress as rich_progress  # noqa: PLC0415 - only where there is a terminal to draw on
    from rich.console import Console  # noqa: PLC0415

    # No text is read as markup: names and messages are whatever a user wrote.
    bar = rich_progress.Progress(
        rich_progress.TextColumn("{task.fields[status]}", markup=False),
        rich_progress.BarColumn(bar_width=14),  # with the rest, within 80 columns
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[values]}", markup=False),
        rich_progress.TextColumn("left", markup=False),
        rich_progress.TimeRemainingColumn(),
        console=Console(stderr=True, markup=False, highlight=False),
        redirect_stdout=False,
        redirect_stderr=False,
        transient=True,
    )
    task = bar.add_task(one_line(job.spec.name), total=job.num_steps, completed=0, status=str(job.status), values="")

    class Bar:
        def update(self, progress: Progress, lines: list[str]) -> None:
            for line in lines:
                bar.console.print(line, soft_wrap=True)
            shown = [f"{label} {_number(progress.values[name], digits=3)}" for label, name in _shown(progress.values)]
            bar.update(task, completed=progress.step, status=progress.status, values="  ".join(shown))

    with bar:
        yield Bar()


def _shown(values: Mapping[str, float | None]) -> Iterator[tuple[str, str]]:
    """Yield label and name of the few values that fit beside a bar: loss, and first metric of the last evaluation."""
    if "train/loss" in values:
        yield "loss", "train/loss"
    for name in scores(values)[:1]:
        yield f"test {name.removeprefix('eval/')}", name


def _number(value: float | None, nonfinite: str | None = None, digits: int = 4) -> str:
    return (nonfinite or "not finite") if value is None else f"{value:.{digits}g}"


def _pump(stream: Iterator[StreamItem]) -> "queue.Queue[StreamItem | Exception | None]":
    """Read a stream in a thread, so that whoever waits for it can also look at the clock."""
    items: queue.Queue[StreamItem | Exception | None] = queue.Queue(maxsize=10_000)

    def read() -> None:
        try:
            for item in stream:
                items.put(item)
        except Exception as error:  # raised again where it is read
            items.put(error)
        else:
            items.put(None)

    threading.Thread(target=read, name="stream", daemon=True).start()
    return items
