"""Measuring schemes on a workload: first that they are right, then their times, kernels, host syncs and memory.

`Meter` is all that is asked of a device, so that in tests the rest of it runs on a machine without a GPU.
"""

import gc
import importlib
import json
import math
import statistics
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_schemes import FUSED, Call, Data, Scheme, Workload, calls, counted_collectives, errors, tolerance

_CACHES = 3  # how often the batches of a turn exceed the cache
_LEAST_CALLS = 8  # of a turn
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 60
_PROFILED_CALLS = 3
_PEER_TOLERANCE = 1e-2  # of others: tells a wrong way to call them
_L2_BYTES = 64 << 20  # where the driver does not say
_COPY_VALUES = 1 << 28  # float32: 1 GiB
_COPIES = 30
_MARKER = "spin_kernel"  # what torch.cuda._sleep launches, and nothing else does
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of the profiler's trace

Run = Callable[[], object]


class Elapsed(NamedTuple):
    """How long a run took.

    Attributes:
        device_s: From its first to its last work on the device, whatever it waited for in between.
        issue_s: Until the host had launched all of it.
    """

    device_s: float
    issue_s: float


class Kernel(NamedTuple):
    """Work of the device that the profiler saw: a kernel, a copy or a fill."""

    name: str
    duration_s: float


class Meter(Protocol):
    """Measures on one device."""

    device: torch.device
    l2_bytes: int

    def describe(self) -> dict[str, Any]:
        """The device and the versions of what drives it, in plain types."""
        ...

    def synchronize(self) -> None:
        """Waits until the device has done everything; raises what went wrong there."""
        ...

    def time(self, warm_up: Run, run: Run) -> Elapsed:
        """Times `run`, right behind `warm_up`."""
        ...

    def captured(self, run: Run) -> Run:
        """What does the same again without the host's part in it."""
        ...

    def kernels(self, runs: Sequence[Run]) -> list[list[Kernel]]:
        """The work of each run on the device, in its order."""
        ...

    def host_syncs(self, run: Run) -> int:
        """How often a run makes the host wait for the device."""
        ...

    def obstacle_without_syncs(self, run: Run) -> str | None:
        """What a run says where waiting for the device is an error; None where it has nothing to say."""
        ...

    def peak_bytes(self, run: Run) -> int:
        """The most memory that a run takes, beside what is there already."""
        ...

    def copy_bandwidth(self) -> float:
        """Bytes per second, read and written together, of a large copy on the device."""
        ...


class GpuMeter:
    """Measures on the current GPU, by its events, torch's profiler and torch's memory statistics."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._properties = torch.cuda.get_device_properties(self.device)
        self.l2_bytes: int = getattr(self._properties, "L2_cache_size", 0) or _L2_BYTES
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._has_profiled = False

    def describe(self) -> dict[str, Any]:
        """As `Meter.describe`."""
        return {
            "name": self._properties.name,
            "processors": self._properties.multi_processor_count,
            "memory_bytes": self._properties.total_memory,
            "l2_bytes": self.l2_bytes,
            "capability": f"{self._properties.major}.{self._properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "triton": importlib.import_module("triton").__version__,
        }

    def synchronize(self) -> None:
        """As `Meter.synchronize`."""
        torch.cuda.synchronize()

    def time(self, warm_up: Run, run: Run) -> Elapsed:
        """As `Meter.time`: the warm-up is not waited for, so the first launch of the run is no part of its time."""
        torch.cuda.synchronize()
        warm_up()
        self._start.record()
        started = time.perf_counter()
        run()
        issue_s = time.perf_counter() - started
        self._end.record()
        self._end.synchronize()
        return Elapsed(self._start.elapsed_time(self._end) / 1e3, issue_s)

    def captured(self, run: Run) -> Run:
        """As `Meter.captured`: a CUDA graph; the run is warmed up on the stream that it is captured on."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # NCCL has a thread that asks for events, which "global" would forbid meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            run()
        return graph.replay

    def kernels(self, runs: Sequence[Run]) -> list[list[Kernel]]:
        """As `Meter.kernels`: all in one session, which is slow to start, told apart by a kernel between them."""
        if not self._has_profiled:  # the first session loads the profiler, and may miss what comes meanwhile
            with profile(activities=[ProfilerActivity.CUDA]):
                torch.cuda._sleep(1)  # type: ignore[no-untyped-call]
                torch.cuda.synchronize()
            self._has_profiled = True
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for run in runs:
                torch.cuda.synchronize()
                torch.cuda._sleep(1)  # type: ignore[no-untyped-call]
                run()
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory(prefix="trace-") as folder:
            path = Path(folder, "trace.json")
            profiler.export_chrome_trace(str(path))
            trace = json.loads(path.read_text(errors="replace"), strict=False)
        return kernels_of_runs(trace["traceEvents"], len(runs))

    def host_syncs(self, run: Run) -> int:
        """As `Meter.host_syncs`, as far as torch warns of it: collectives are not covered."""
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)

    def obstacle_without_syncs(self, run: Run) -> str | None:
        """As `Meter.obstacle_without_syncs`."""
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        except RuntimeError as error:
            return str(error)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return None

    def peak_bytes(self, run: Run) -> int:
        """As `Meter.peak_bytes`."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def copy_bandwidth(self) -> float:
        """As `Meter.copy_bandwidth`; the median of many copies."""
        source = torch.randn(_COPY_VALUES, device=self.device)
        target = torch.empty_like(source)

        def copy() -> None:
            target.copy_(source)

        times_s = [self.time(copy, copy).device_s for _ in range(_COPIES)]
        return 2 * source.nbytes / statistics.median(times_s)


def kernels_of_runs(events: Sequence[dict[str, Any]], num_runs: int) -> list[list[Kernel]]:
    """Splits a trace at the kernels that mark the start of a run.

    Args:
        events: Of a trace in Chrome's format, times in µs, in any order.
        num_runs: How many there were.

    Raises:
        RuntimeError: If the trace does not have as many.
    """
    work = sorted((event for event in events if event.get("cat") in _DEVICE_WORK), key=lambda event: event["ts"])
    runs: list[list[Kernel]] = []
    for event in work:
        if _MARKER in event["name"]:
            runs.append([])
        elif runs:
            runs[-1].append(Kernel(event["name"], event["dur"] / 1e6))
    if len(runs) != num_runs:
        raise RuntimeError(f"the profiler saw {len(runs)} of {num_runs} runs among {len(work)} pieces of work")
    return runs


class Journal:
    """What was found on the way: notes, and failures that did not stop the run."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.failures: list[str] = []

    def note(self, text: str) -> None:
        """Keeps something to know, and prints it."""
        self.notes.append(text)
        print(f"Note: {text}", flush=True)

    def fail(self, what: str, error: Exception | str) -> None:
        """Keeps what went wrong, and prints it loudly."""
        message = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        self.failures.append(f"{what}: {message}")
        print(f"\n!!! FAILED: {what}: {message}\n", flush=True)
        if isinstance(error, Exception):
            traceback.print_exception(error)

    @contextmanager
    def attempt(self, what: str, meter: Meter) -> Iterator[None]:
        """Keeps an error and goes on, unless the device is lost with it."""
        try:
            yield
        except Exception as error:  # one scheme or section must not take the others with it
            self.fail(what, error)
            meter.synchronize()


@dataclass(frozen=True)
class Work:
    """Of the device, per call.

    Attributes:
        seconds: Sum of its durations.
        kernels: How many pieces, by name.
    """

    seconds: float
    kernels: dict[str, float]

    @property
    def num_kernels(self) -> float:
        """Kernels, copies and fills."""
        return sum(self.kernels.values())


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Of a scheme's forward, or forward and backward, per call.

    Attributes:
        median_s: Over rounds, by the device's clock.
        least_s: Likewise.
        issue_s: Median of the time until the host had launched it.
        work: None where it was not profiled.
    """

    median_s: float
    least_s: float
    issue_s: float
    work: Work | None


@dataclass(frozen=True, kw_only=True)
class Habits:
    """What else a forward and backward of a scheme does.

    Attributes:
        host_syncs: How often the host waits for the device.
        sync_error: What it says where that is an error; asked of ours alone.
        num_collectives: Of the forward, and of both.
        saved: Memory kept for the backward, the input included, over the input's.
        peak: The most memory taken, over the input's.
    """

    host_syncs: int
    sync_error: str | None
    num_collectives: tuple[int, int]
    saved: float
    peak: float


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of a scheme on a workload.

    Attributes:
        errors: By what a call returns or updates.
        forward: None where both alone were timed.
        both: Forward and backward.
        habits: None where they were not observed.
    """

    errors: dict[str, float]
    forward: Pass | None
    both: Pass
    habits: Habits | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured on a workload.

    Attributes:
        workload: Which.
        is_valid: Whether all that ours returned was right.
        num_batches: That took turns.
        num_rounds: That the medians are over.
        layer: By scheme.
        block: By scheme: norm, += residual, ReLU.
    """

    workload: Workload
    is_valid: bool
    num_batches: int
    num_rounds: int
    layer: dict[str, Figures]
    block: dict[str, Figures]


class Subject(NamedTuple):
    """A scheme on a workload that passed its check."""

    is_block: bool
    calls: list[Call]
    errors: dict[str, float]

    @property
    def scheme(self) -> Scheme:
        """Of its calls."""
        return self.calls[0].scheme


class Timed(NamedTuple):
    """Calls that are timed together.

    Attributes:
        warm_up: What runs right before.
        run: All of them.
        num_calls: How many.
    """

    warm_up: Run
    run: Run
    num_calls: int


def num_batches(workload: Workload, l2_bytes: int) -> int:
    """How many batches it takes that none of them is found in the cache."""
    return max(1, math.ceil(_CACHES * l2_bytes / workload.x_bytes))


def measure(
    journal: Journal,
    meter: Meter,
    workload: Workload,
    given: Data,
    layer: Sequence[Scheme],
    block: Sequence[Scheme],
    deadline_s: float,
) -> Row | None:
    """Checks all schemes, then lets those that are right take turns; None where none was.

    Args:
        journal: Takes what goes wrong.
        meter: Of the device.
        workload: What is measured.
        given: Its batches.
        layer: Ways to compute the layer.
        block: Ways to compute the block.
        deadline_s: When to stop, by `time.monotonic`; a few rounds are made in any case.
    """
    failures_before = len(journal.failures)
    subjects = [
        subject
        for is_block, schemes in ((False, layer), (True, block))
        for scheme in schemes
        if (subject := check(journal, meter, workload, given, scheme, is_block=is_block)) is not None
    ]
    is_valid = not any(failure.startswith(f"{workload}, ours") for failure in journal.failures[failures_before:])
    parts = [
        (subject, with_backward)
        for subject in subjects
        for with_backward in ((True,) if subject.is_block else (False, True))
    ]
    if not parts:
        return None
    timed = [timed_calls(meter, subject.calls, with_backward=with_backward) for subject, with_backward in parts]
    works: Sequence[Work | None] = [None] * len(parts)
    with journal.attempt(f"{workload}, profiler", meter):
        works = profiled(meter, parts, timed)
    habits: dict[int, Habits] = {}
    for index, subject in enumerate(subjects):
        if not subject.scheme.is_captured:
            with journal.attempt(f"{workload}, {subject.scheme.name}, host syncs and memory", meter):
                habits[index] = observed(meter, subject.calls[-1])
    times = take_turns(meter, timed, deadline_s - time.monotonic())
    passes = {
        (subject.is_block, subject.scheme.name, with_backward): _pass(elapsed, each.num_calls, work)
        for (subject, with_backward), elapsed, each, work in zip(parts, times, timed, works, strict=True)
    }
    figures: dict[bool, dict[str, Figures]] = {False: {}, True: {}}
    for index, (is_block, of_scheme, found) in enumerate(subjects):
        name = of_scheme[0].scheme.name
        figures[is_block][name] = Figures(
            errors=found,
            forward=passes.get((is_block, name, False)),
            both=passes[is_block, name, True],
            habits=habits.get(index),
        )
    return Row(
        workload=workload,
        is_valid=is_valid,
        num_batches=len(given.batches),
        num_rounds=len(times[0]),
        layer=figures[False],
        block=figures[True],
    )


def check(
    journal: Journal, meter: Meter, workload: Workload, given: Data, scheme: Scheme, *, is_block: bool
) -> Subject | None:
    """Compares a scheme with float64 on the first batch. One of ours is measured even where it is wrong."""
    subject = None
    is_ours = scheme.name.startswith("ours")
    with journal.attempt(f"{workload}, {scheme.name}", meter):
        of_scheme = calls(scheme, given, is_block=is_block)
        found = errors(of_scheme[0])
        too_large = wrong(found, scheme.name, workload.dtype, is_block=is_block)
        if too_large:
            journal.fail(f"{workload}, {scheme.name}", f"WRONG RESULT, relative errors {too_large}")
        if is_ours or not too_large:
            subject = Subject(is_block, of_scheme, found)
    return subject


def wrong(found: Mapping[str, float], scheme: str, dtype: torch.dtype, *, is_block: bool) -> dict[str, float]:
    """The errors that are larger than allowed; NaN is.

    One by one, the block rounds its norm to the dtype before the residual is added, which moves arguments of ReLU over
    zero; its layer is checked by itself.
    """
    if is_block and scheme != FUSED:
        return {}
    is_ours = scheme.startswith("ours")
    return {
        what: error
        for what, error in found.items()
        if not error <= (tolerance(dtype, what, is_block=is_block) if is_ours else _PEER_TOLERANCE)
    }


def timed_calls(meter: Meter, of_scheme: list[Call], *, with_backward: bool) -> Timed:
    """Several calls at least, over all batches alike."""
    repeated = of_scheme * math.ceil(_LEAST_CALLS / len(of_scheme))
    run, warm_up = runner(repeated, with_backward=with_backward), runner(repeated[-1:], with_backward=with_backward)
    if of_scheme[0].scheme.is_captured:
        run = warm_up = meter.captured(run)
    return Timed(warm_up, run, len(repeated))


def runner(of_scheme: Sequence[Call], *, with_backward: bool) -> Run:
    """All the calls, one after another."""
    context = of_scheme[0].scheme.context
    functions = [call.both if with_backward else call.forward for call in of_scheme]

    def run() -> None:
        with context():
            for function in functions:
                function()

    return run


def take_turns(
    meter: Meter, timed: Sequence[Timed], seconds: float, clock: Callable[[], float] = time.monotonic
) -> list[list[Elapsed]]:
    """Times all of them, round after round, another one first in each, for about so long."""
    times: list[list[Elapsed]] = [[] for _ in timed]
    deadline_s = clock() + seconds
    gc.collect()
    gc.disable()
    try:
        for turn in range(_MOST_ROUNDS):
            if turn >= _LEAST_ROUNDS and clock() > deadline_s:
                break
            for offset in range(len(timed)):
                index = (turn + offset) % len(timed)
                times[index].append(meter.time(timed[index].warm_up, timed[index].run))
    finally:
        gc.enable()
    return times


def profiled(meter: Meter, parts: Sequence[tuple[Subject, bool]], timed: Sequence[Timed]) -> list[Work]:
    """The device's work in a call of each, over a few batches that were not used right before."""
    runs, numbers = [], []
    first = 0
    for (subject, with_backward), each in zip(parts, timed, strict=True):
        if subject.scheme.is_captured:  # all calls are one
            runs.append(each.run)
            numbers.append(each.num_calls)
            continue
        picked = [subject.calls[(first + offset) % len(subject.calls)] for offset in range(_PROFILED_CALLS)]
        first += _PROFILED_CALLS
        runs.append(runner(picked, with_backward=with_backward))
        numbers.append(_PROFILED_CALLS)
    return [work(kernels, number) for kernels, number in zip(meter.kernels(runs), numbers, strict=True)]


def work(kernels: Sequence[Kernel], num_calls: int) -> Work:
    """Per call."""
    counts = Counter(kernel.name for kernel in kernels)
    seconds = sum(kernel.duration_s for kernel in kernels) / num_calls
    return Work(seconds, {name: count / num_calls for name, count in counts.items()})


def observed(meter: Meter, call: Call) -> Habits:
    """One call at a time, none of them timed."""
    both = runner([call], with_backward=True)
    with call.scheme.context():  # outermost: it may replace the collectives that are counted
        with counted_collectives() as forward_collectives:
            call.forward()
        with counted_collectives() as collectives:
            call.both()
        saved_bytes = call.saved_bytes()
    return Habits(
        host_syncs=meter.host_syncs(both),
        sync_error=meter.obstacle_without_syncs(both) if call.scheme.name.startswith("ours") else None,
        num_collectives=(len(forward_collectives), len(collectives)),
        saved=saved_bytes / call.step.x.nbytes,
        peak=meter.peak_bytes(both) / call.step.x.nbytes,
    )


def _pass(elapsed: Sequence[Elapsed], num_calls: int, done: Work | None) -> Pass:
    device_s = [each.device_s / num_calls for each in elapsed]
    return Pass(
        median_s=statistics.median(device_s),
        least_s=min(device_s),
        issue_s=statistics.median(each.issue_s for each in elapsed) / num_calls,
        work=done,
    )
