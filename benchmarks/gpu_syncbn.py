"""How long forward and backward of one layer take on a GPU, beside torch's SyncBatchNorm, F.batch_norm and others.

    python -m benchmarks.gpu_syncbn
    python -m benchmarks.gpu_syncbn --out /tmp/gpu.json          # elsewhere, with the tables beside it
    python -m benchmarks.gpu_syncbn --quick                      # a minute: two shapes, bf16
    python -m benchmarks.gpu_syncbn --shapes 8x256x28x28 2x64x200x334 --minutes 2
    python -m benchmarks.gpu_syncbn --tune --out /tmp/tune.json  # other ways to cut the passes, and nothing else

One GPU, one rank. Results are compared with float64 before anything is timed. Then all schemes take turns, round after
round; a turn is a sequence of calls over batches that together exceed the cache three times, so that none is found
there. Times are medians over rounds of the device's own clock around a turn, divided by its calls: where the host
cannot launch as fast as the device works, that is the host's time. "Issue" is the host's time per call. "Kernels" are
the device's work alone, summed, as the profiler saw it; the share of the bandwidth is the least traffic there can be
(3 accesses to x forward, 5 backward) over that sum, over the bandwidth of a large copy in the same run.

`benchmarks.gpu_schemes` says what is compared, and how torch's function is made to synchronize. The JSON is written
anew after every step, the tables at the end. Exits with 1 where a result is wrong or something failed, with 2 where
there is no GPU.
"""

import argparse
import importlib
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

if not __package__:  # run as a file: its folder is on the path, the repository is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from benchmarks import results
from benchmarks.gpu_measure import Figures, GpuMeter, Journal, Meter, Pass, Row, measure, num_batches, runner, wrong
from benchmarks.gpu_schemes import (
    ATEN,
    COMPILED,
    CUDNN,
    EPS,
    FUSED,
    ONE_BY_ONE,
    OURS,
    OURS_GRAPH,
    OURS_NCCL,
    SYNC,
    SYNC_ALONE,
    Batch,
    Data,
    Workload,
    block_schemes,
    calls,
    compiled_scheme,
    data,
    errors,
    layer_schemes,
    tolerance,
    truth,
)
from syncbn import sync_batch_norm

ROOT = Path(__file__).resolve().parents[1]
SHAPES = (
    (2, 64, 200, 334),
    (2, 256, 200, 334),
    (2, 1024, 50, 84),
    (2, 2048, 25, 42),
    (8, 256, 28, 28),
    (32, 256, 56, 56),
    (32, 1024, 14, 14),
    (32, 2048, 7, 7),
    (2, 32, 64, 128, 128),
)
QUICK_SHAPES = ((8, 256, 28, 28), (32, 256, 56, 56))
COMPILED_SHAPES = ((2, 256, 200, 334), (8, 256, 28, 28), (32, 256, 56, 56))
TUNED_SHAPES = ((2, 64, 200, 334), (2, 1024, 50, 84), (8, 256, 28, 28), (32, 256, 56, 56), (32, 2048, 7, 7))
DTYPES = (torch.bfloat16, torch.float32)
LAYOUTS = ("NCHW", "NHWC")
MEANS_OVER_STD = (1e3, 1e4, 1e5)

FORWARD_ACCESSES, BOTH_ACCESSES = 3, 8
SMALL_BYTES, LARGE_BYTES = 4e6, 60e6
LEAST_WORKLOAD_S = 3.0  # less is not worth starting
COMPILATION_S = 60.0  # of torch.compile, in all
PREPARATION_S = 90.0
RANKS_S = 60.0
RANK_SHAPE = (48, 14, 14)
RANK_CASES = tuple(  # samples on each rank, dtype, layout
    (sizes, dtype, layout) for sizes in ((3, 5), (4, 0)) for dtype, layout in zip(DTYPES, ("NHWC", "NCHW"), strict=True)
)


def main() -> int:
    arguments = _arguments()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no processes that wake up while others are timed
    if not torch.cuda.is_available():
        print("This benchmark needs a GPU, and torch finds none here.", file=sys.stderr)
        return 2
    if arguments.probe_nccl:
        with nccl_group():
            return 0
    if arguments.prepare_check is not None:
        CHECKS[arguments.prepare_check](torch.device("cuda"))
        return 0
    workloads = chosen_workloads(arguments.shapes, quick=arguments.quick, tune=arguments.tune)
    if arguments.prepare is not None:
        first, step = arguments.prepare
        (prepare_cuts if arguments.tune else prepare)(workloads[first::step])
        return 0
    minutes = arguments.minutes or (1.0 if arguments.quick else 4.5 if arguments.tune else 7.5)
    report = Report(path=arguments.out or _default_path(arguments), budget=Budget(60 * minutes))
    meter = GpuMeter()
    report.describe(meter, sys.argv[1:])
    with ExitStack() as at_the_end:
        try:
            if arguments.tune:
                tune(report, meter, workloads)
            else:
                run_all(report, meter, workloads, arguments, at_the_end)
        except (Exception, KeyboardInterrupt) as error:  # what was measured before must not be lost with it
            report.journal.fail("the run", error if isinstance(error, Exception) else "interrupted")
        print(report.finish(with_note=arguments.out is None and not (arguments.quick or arguments.tune)), flush=True)
    return 1 if report.journal.failures else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the JSON goes; by default to the results and the day's note")
    parser.add_argument("--quick", action="store_true", help="a minute's worth")
    parser.add_argument("--shapes", type=as_shape, nargs="+", help="such as 8x256x28x28")
    parser.add_argument("--minutes", type=float, help="to be done in; 7.5 unless told, 4.5 with --tune, 1 with --quick")
    parser.add_argument("--ranks", action=argparse.BooleanOptionalAction, default=True, help="two ranks on this GPU")
    parser.add_argument("--tune", action="store_true", help="try other ways to cut the passes, and nothing else")
    parser.add_argument("--prepare", type=int, nargs=2, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--prepare-check", choices=CHECKS, help=argparse.SUPPRESS)  # likewise
    parser.add_argument("--probe-nccl", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def as_shape(text: str) -> tuple[int, ...]:
    """8x256x28x28 as numbers."""
    return tuple(int(extent) for extent in text.split("x"))


def chosen_workloads(
    shapes: Sequence[tuple[int, ...]] | None, *, quick: bool = False, tune: bool = False
) -> list[Workload]:
    """In the order to measure them in: a run that is cut short has seen every shape in one dtype."""
    chosen = shapes or (QUICK_SHAPES if quick else TUNED_SHAPES if tune else SHAPES)
    dtypes = DTYPES[:1] if quick or tune else DTYPES
    return [Workload(shape, dtype, layout) for dtype in dtypes for shape in chosen for layout in LAYOUTS]


def _default_path(arguments: argparse.Namespace) -> Path:
    if arguments.quick or arguments.tune:
        name = "gpu_tuning.json" if arguments.tune else "gpu_syncbn_quick.json"
        return Path(tempfile.gettempdir(), name)
    return results.FOLDER / f"gpu_syncbn_{datetime.now(UTC):%Y-%m-%d}.json"


class Budget:
    """Time that the parts of a run share."""

    def __init__(self, total_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.total_s = total_s
        self._clock = clock
        self._started_s = clock()

    @property
    def left_s(self) -> float:
        """What is left, at least 0."""
        return max(0.0, self.total_s - (self._clock() - self._started_s))

    def share(self, num_parts: int) -> float:
        """What each of so many parts may take of what is left."""
        return self.left_s / num_parts


@dataclass(kw_only=True)
class Report:
    """Everything found so far, on its way to a file."""

    path: Path
    budget: Budget
    journal: Journal = field(default_factory=Journal)
    about: dict[str, Any] = field(default_factory=dict)
    copy_bandwidths: list[float] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    accuracy: list[dict[str, Any]] = field(default_factory=list)
    graphs: list[dict[str, Any]] = field(default_factory=list)
    ranks: list[dict[str, Any]] = field(default_factory=list)
    tuning: list[dict[str, Any]] = field(default_factory=list)
    best_cuts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def copy_bandwidth(self) -> float | None:
        """The largest seen, bytes per second."""
        return max(self.copy_bandwidths, default=None)

    def describe(self, meter: Meter, command: Sequence[str]) -> None:
        """Says when, where and how."""
        self.about = {
            "benchmark": "gpu_syncbn",
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": list(command),
            "machine": results.machine(),
            "gpu": meter.describe(),
            "versions": results.versions(),
        }

    def as_json(self) -> dict[str, Any]:
        """In plain types."""
        return {
            **self.about,
            "copy_bandwidths": self.copy_bandwidths,
            "targets": [target._asdict() for target in targets(self.rows, self.copy_bandwidth)] if self.rows else [],
            "failures": self.journal.failures,
            "notes": self.journal.notes,
            "accuracy": self.accuracy,
            "graphs": self.graphs,
            "ranks": self.ranks,
            "tuning": self.tuning,
            "best_cuts": self.best_cuts,
            "rows": [row_as_json(row) for row in self.rows],
        }

    def write(self) -> None:
        """Replaces the file; a stop meanwhile leaves the earlier one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = self.path.with_suffix(".partial")
        partial_path.write_text(json.dumps(self.as_json(), indent=1) + "\n")
        partial_path.replace(self.path)

    def text(self) -> str:
        """Every table, the targets last."""
        copies = ", ".join(f"{bandwidth / 1e12:.2f}" for bandwidth in self.copy_bandwidths)
        versions, gpu = self.about.get("versions", {}), self.about.get("gpu", {})
        parts = [
            f"{gpu.get('name')}, torch {versions.get('torch')}, Triton {gpu.get('triton')}; a large copy moves "
            f"{copies} TB/s, read and written."
        ]
        if self.rows:
            parts += tables(self.rows, self.copy_bandwidth)
        for title, rows in (
            ("Accuracy in float32, largest errors: variance relative, y in σ, dx in |γ|/σ · rms(dy)", self.accuracy),
            ("CUDA graphs replayed on new data, beside eager", self.graphs),
            ("Two ranks on this GPU over gloo, beside float64 on the whole batch", self.ranks),
            ("Cuts of the passes, µs per kernel", self.tuning),
            ("The best cut of each kernel, over the default", self.best_cuts),
        ):
            if rows:
                parts.append(f"{title}:\n\n{plain_table(rows)}")
        parts += [f"Note: {note}" for note in self.journal.notes]
        parts += [f"FAILED: {failure}" for failure in self.journal.failures]
        if self.rows:
            parts.append("\n".join(f"- {target}" for target in targets(self.rows, self.copy_bandwidth)))
        return "\n\n".join(parts)

    def finish(self, *, with_note: bool) -> str:
        """Writes the file, and the tables beside it or into the day's note; returns what is left to print."""
        self.write()
        text = self.text()
        if with_note:
            results.record("gpu_syncbn", self.as_json(), text)
            return ""
        tables_path = self.path.with_suffix(".md")
        tables_path.write_text(text + "\n")
        return f"{text}\n\nWritten to {self.path} and {tables_path}"


def run_all(
    report: Report,
    meter: Meter,
    workloads: Sequence[Workload],
    arguments: argparse.Namespace,
    at_the_end: ExitStack,
) -> None:
    """Every section, the short ones first."""
    options = ["--quick"] if arguments.quick else []
    group = None
    if prepare_in_parallel(report, workloads, options, probe_nccl=True):
        with report.journal.attempt("NCCL", meter):
            group = at_the_end.enter_context(nccl_group())
    with report.journal.attempt("copy bandwidth", meter):
        report.copy_bandwidths.append(meter.copy_bandwidth())
    with report.journal.attempt("accuracy", meter):
        report.accuracy = accuracy(meter.device, group, extent=64)
    with report.journal.attempt("CUDA graphs", meter):
        report.graphs = graphs(report.journal, meter)
    report.write()
    if arguments.ranks and not arguments.quick:
        with report.journal.attempt("two ranks", meter):
            report.ranks = two_ranks(report.journal, meter.device.type, RANKS_S)
        report.write()
    measure_all(report, meter, workloads, group)
    with report.journal.attempt("copy bandwidth", meter):
        report.copy_bandwidths.append(meter.copy_bandwidth())


def measure_all(report: Report, meter: Meter, workloads: Sequence[Workload], group: dist.ProcessGroup | None) -> None:
    """As many as there is time for; each may take its share of what is left."""
    compilation_s = 0.0
    for index, workload in enumerate(workloads):
        share_s = report.budget.share(len(workloads) - index)
        if share_s < LEAST_WORKLOAD_S:
            report.journal.note(f"{len(workloads) - index} workloads were left out for want of time: {workload} …")
            break
        started_s = time.monotonic()
        layer = layer_schemes(group)
        with report.journal.attempt(str(workload), meter):
            given = data(workload, meter.device, num_batches(workload, meter.l2_bytes), seed=index)
            if workload.shape in COMPILED_SHAPES and compilation_s < COMPILATION_S:
                with report.journal.attempt(f"{workload}, {COMPILED}", meter):
                    compiled = compiled_scheme()
                    calls(compiled, given, is_block=False)[0].both()
                    layer.append(compiled)
                compilation_s += time.monotonic() - started_s
            elif workload.shape in COMPILED_SHAPES:
                report.journal.note(f"{workload}: without torch.compile, which had taken {compilation_s:.0f} s before")
            row = measure(
                report.journal, meter, workload, given, layer, block_schemes(group), deadline_s=started_s + share_s
            )
            if row is not None:
                report.rows.append(row)
                took = f"{row.num_rounds} rounds, {time.monotonic() - started_s:.1f} s"
                print(f"{progress(row, report.copy_bandwidth)}; {took}", flush=True)
        report.write()


# Before anything is measured, processes of their own fill the compilers' caches and try whether NCCL works.


def prepare_in_parallel(
    report: Report, workloads: Sequence[Workload], options: Sequence[str], *, probe_nccl: bool
) -> bool:
    """Runs what is compiled once, on as many processes as there are cores; whether NCCL works, if that was asked."""
    limit_s = min(PREPARATION_S, report.budget.left_s / 2)
    shapes = dict.fromkeys("x".join(map(str, workload.shape)) for workload in workloads)
    num_processes = min(12, os.cpu_count() or 1, len(workloads))
    commands = [
        ["--prepare", str(index), str(num_processes), *options, "--shapes", *shapes] for index in range(num_processes)
    ]
    if probe_nccl:  # last, as its end is asked for
        commands += [*(["--prepare-check", name] for name in CHECKS), ["--probe-nccl"]]
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="prepare-") as folder:
        outputs = [Path(folder, str(index)) for index in range(len(commands))]
        processes = [start(command, output) for command, output in zip(commands, outputs, strict=True)]
        ends = [end_of(process, started_s + limit_s) for process in processes]
        for command, code, output in zip(commands, ends, outputs, strict=True):
            if code != 0:
                last = output.read_text(errors="replace").strip().splitlines()[-1:]
                why = f"did not end in {limit_s:.0f} s" if code is None else f"ended with {code}: {' '.join(last)}"
                report.journal.note(f"{' '.join(command[:3])} {why}")
    print(f"Prepared in {time.monotonic() - started_s:.0f} s", flush=True)
    return probe_nccl and ends[-1] == 0


def start(options: Sequence[str], output: Path) -> subprocess.Popen[bytes]:
    """This script in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with output.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_syncbn", *options],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def end_of(process: subprocess.Popen[bytes], deadline_s: float) -> int | None:
    """The exit status; None where it had to be killed at the deadline."""
    try:
        return process.wait(max(0.0, deadline_s - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def prepare(workloads: Sequence[Workload]) -> None:
    """Compiles what measuring these workloads needs into the caches on disk."""
    for workload in workloads:
        given = data(workload, torch.device("cuda"), 1)
        layer = layer_schemes(None)[:1]
        if workload.shape in COMPILED_SHAPES:
            layer.append(compiled_scheme())
        for scheme in layer:
            calls(scheme, given, is_block=False)[0].both()
        calls(block_schemes(None)[0], given, is_block=True)[0].both()
        torch.cuda.synchronize()


def prepare_ranks(device: torch.device) -> None:
    """Likewise for what `two_ranks` runs."""
    for sizes, dtype, layout in RANK_CASES:
        for num_samples in sizes:
            given = data(Workload((num_samples, *RANK_SHAPE), dtype, layout), device, 1)
            calls(layer_schemes(None)[0], given, is_block=False)[0].both()
    torch.cuda.synchronize()


def prepare_cuts(workloads: Sequence[Workload]) -> None:
    """Likewise for tuning; a cut that does not compile is told of when it is measured."""
    default = default_cut()
    for workload in workloads:
        given = data(workload, torch.device("cuda"), 1)
        for cut in [default, *variations(default)]:
            with suppress(Exception), cut_as(cut):
                calls(layer_schemes(None)[0], given, is_block=False)[0].both()
        torch.cuda.synchronize()


CHECKS: dict[str, Callable[[torch.device], object]] = {
    "accuracy": lambda device: accuracy(device, None, extent=64),
    "graphs": lambda _: graphs(Journal(), GpuMeter()),
    "ranks": prepare_ranks,
}


@contextmanager
def nccl_group() -> Iterator[dist.ProcessGroup]:
    """A group of this process alone, over NCCL, that has done its first collective."""
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
    try:
        dist.all_reduce(torch.ones(1, device="cuda"))
        torch.cuda.synchronize()
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


# Whether it is right where no time matters.


def accuracy(device: torch.device, group: dist.ProcessGroup | None, *, extent: int) -> list[dict[str, Any]]:
    """Values far from zero, in float32: 16 images of 64 channels; the variance is what the running one becomes."""
    left_out = (OURS_NCCL, OURS_GRAPH) if group is None else (OURS_NCCL, OURS_GRAPH, SYNC_ALONE)
    rows = []
    for mean, layout in itertools.product(MEANS_OVER_STD, LAYOUTS):
        given = _far_from_zero(mean, Workload((16, 64, extent, extent), torch.float32, layout), device)
        batch, gamma = given.batches[0], given.weight.detach().double()
        right = truth(batch.x.detach(), batch.dy, gamma, given.bias.detach())
        n, shape = batch.x.numel() // batch.x.size(1), (1, -1, 1, 1)
        unit_dx = gamma / (right.var + EPS).sqrt() * batch.dy.double().square().mean((0, 2, 3)).sqrt()
        for scheme in (scheme for scheme in layer_schemes(group) if scheme.name not in left_out):
            call = calls(scheme, given, is_block=False, momentum=1)[0]
            with scheme.context():
                y, dx, *_ = call.both()
            var = call.step.running_var.double() * ((n - 1) / n)
            rows.append(
                {
                    "mean/std": mean,
                    "layout": layout,
                    "scheme": scheme.name,
                    "variance": ((var - right.var) / right.var).abs().max().item(),
                    "y": ((y.detach().double() - right.y).abs() / gamma.view(shape)).max().item(),
                    "dx": ((dx.double() - right.dx).abs() / unit_dx.view(shape)).max().item(),
                }
            )
    return rows


def _far_from_zero(mean: float, workload: Workload, device: torch.device) -> Data:
    given = data(workload, device, 1)
    dy = given.batches[0].dy
    x = torch.randn(workload.shape, device=device, generator=torch.Generator(device).manual_seed(1)).double()
    x = (x + mean).to(workload.dtype).contiguous(memory_format=workload.memory_format).requires_grad_()
    return Data([Batch(x, dy, x)], given.weight, given.bias)


def graphs(journal: Journal, meter: Meter) -> list[dict[str, Any]]:
    """Forward and backward captured on one batch and replayed on another, an empty one too; equal to the bit."""
    rows = []
    for num_samples, layout in itertools.product((4, 0), LAYOUTS):
        shape = (num_samples, 64, 28, 28)
        x, dy, new_x, new_dy = (_random(shape, layout, meter.device, seed) for seed in range(4))
        parameters = [_random((64,), "NCHW", meter.device, seed).requires_grad_() for seed in (4, 5)]
        running, eager_running = ([torch.zeros(64, device=meter.device) for _ in range(2)] for _ in range(2))
        replayed: list[torch.Tensor] = []
        replay = meter.captured(partial(_step, x.requires_grad_(), dy, running, parameters, replayed))
        with torch.no_grad():
            x.copy_(new_x)
            dy.copy_(new_dy)
        for values in running:
            values.zero_()
        replay()
        meter.synchronize()
        called: list[torch.Tensor] = []
        _step(new_x.requires_grad_(), new_dy, eager_running, parameters, called)
        names = ("y", "dx", "dγ", "dβ", "running_mean", "running_var")
        is_equal = {
            name: torch.equal(*pair)
            for name, *pair in zip(names, [*replayed, *running], [*called, *eager_running], strict=True)
        }
        if not all(is_equal.values()):
            journal.fail(f"CUDA graph, N = {num_samples}, {layout}", f"WRONG RESULT, equal to eager: {is_equal}")
        rows.append({"N": num_samples, "layout": layout, **is_equal})
    return rows


def _step(
    x: torch.Tensor,
    dy: torch.Tensor,
    running: Sequence[torch.Tensor],
    parameters: Sequence[torch.Tensor],
    into: list[torch.Tensor],
) -> None:
    y = sync_batch_norm(x, running[0], running[1], *parameters, training=True, activation="relu")
    into[:] = [y.detach(), *torch.autograd.grad(y, [x, *parameters], dy)]


def _random(shape: tuple[int, ...], layout: str, device: torch.device, seed: int) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    return values.contiguous(memory_format=Workload(shape, values.dtype, layout).memory_format)


def two_ranks(journal: Journal, device_type: str, limit_s: float) -> list[dict[str, Any]]:
    """Uneven batches and an empty rank, on two processes that share the device; errors as of `gpu_schemes.errors`."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    context = torch.multiprocessing.get_context("spawn")
    deadline_s = time.monotonic() + limit_s
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks = [context.Process(target=rank_main, args=(rank, folder, device_type, limit_s)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        while time.monotonic() < deadline_s and any(rank.is_alive() for rank in ranks):
            if any(rank.exitcode for rank in ranks):  # the other one would wait for it
                break
            time.sleep(0.05)
        codes = [rank.exitcode for rank in ranks]  # None of one that did not end in time
        for rank in ranks:
            if rank.is_alive():
                rank.kill()
            rank.join()
        outputs = [Path(folder, f"rank{number}") for number in range(len(ranks))]
        texts = [output.read_text() if output.exists() else "" for output in outputs]
    if any(code != 0 for code in codes):
        raise RuntimeError(f"the ranks ended with {codes}: {' / '.join(text[-1000:] for text in texts)}")
    found = [json.loads(text) for text in texts]
    rows = []
    for of_ranks in zip(*found, strict=True):
        worst = {key: max(case["errors"][key] for case in of_ranks) for key in of_ranks[0]["errors"]}
        case = of_ranks[0]["case"]
        dtype = getattr(torch, case["dtype"])
        too_large = {key: error for key, error in worst.items() if not error <= tolerance(dtype, key, is_block=False)}
        if too_large:
            journal.fail(f"two ranks, {case}", f"WRONG RESULT, relative errors {too_large}")
        rows.append({**case, **worst})
    return rows


def rank_main(rank: int, folder: str, device_type: str, limit_s: float) -> None:
    """One of two ranks; leaves what it found, or how it failed, in a file."""
    output = Path(folder, f"rank{rank}")
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=limit_s / 2),
        )
        device = torch.device(device_type)
        output.write_text(json.dumps([_rank_case(rank, *case, device) for case in RANK_CASES]))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        output.write_text(traceback.format_exc())
        raise


def _rank_case(
    rank: int, sizes: tuple[int, int], dtype: torch.dtype, layout: str, device: torch.device
) -> dict[str, Any]:
    workload = Workload((sum(sizes), *RANK_SHAPE), dtype, layout)
    given = data(workload, torch.device("cpu"), 1)  # the same on both ranks
    whole_x, whole_dy = (tensor.detach() for tensor in given.batches[0][:2])
    mine = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
    x, dy = (tensor[mine].contiguous(memory_format=workload.memory_format).to(device) for tensor in (whole_x, whole_dy))
    x = x.requires_grad_()
    weight, bias = (tensor.detach().to(device).requires_grad_() for tensor in (given.weight, given.bias))
    running_mean, running_var = (torch.zeros_like(weight, requires_grad=False) for _ in range(2))
    y = sync_batch_norm(x, running_mean, running_var, weight, bias, training=True, eps=EPS)
    dx, *own = torch.autograd.grad(y, [x, weight, bias], dy)
    parameter_gradients = torch.stack(own).double().cpu()
    dist.all_reduce(parameter_gradients)
    right = truth(whole_x, whole_dy, given.weight.detach(), given.bias.detach())
    n = whole_x.numel() // whole_x.size(1)
    pairs = {
        "y": (y.detach(), right.y[mine]),
        "dx": (dx, right.dx[mine]),
        "grad_weight": (parameter_gradients[0], right.grad_weight),
        "grad_bias": (parameter_gradients[1], right.grad_bias),
        "running_mean": (running_mean, right.mean * 0.1),
        "running_var": (running_var, right.var * (0.1 * n / (n - 1))),
    }
    case = {"samples": "+".join(map(str, sizes)), "dtype": str(dtype).removeprefix("torch."), "layout": layout}
    return {"case": case, "errors": {name: _relative(*pair) for name, pair in pairs.items()}}


def _relative(result: torch.Tensor, true: torch.Tensor) -> float:
    distance: float = (result.double().cpu() - true).norm().item()
    return distance / true.norm().item() if true.numel() else distance


# What it comes to.


class Target(NamedTuple):
    """Something to reach.

    Attributes:
        what: In words.
        bound: What the value has to be.
        value: None where it was not measured.
        is_met: Likewise.
        detail: What the value is made of.
    """

    what: str
    bound: str
    value: float | None
    is_met: bool | None
    detail: str = ""

    def __str__(self) -> str:
        verdict = {True: "met", False: "MISSED", None: "not measured"}[self.is_met]
        value = "" if self.value is None else f": {self.value:.3g}"
        return f"{verdict}: {self.what}, {self.bound}{value}{f' ({self.detail})' if self.detail else ''}"


def targets(rows: Sequence[Row], copy_bandwidth: float | None) -> list[Target]:
    """Every target with its figure; rows where ours was wrong count for the first alone."""
    valid = [row for row in rows if row.is_valid]
    small = [row for row in valid if row.workload.x_bytes < SMALL_BYTES]
    large = [row for row in valid if row.workload.x_bytes >= LARGE_BYTES]
    found = [at_most("workloads with a wrong result of ours", 0, [float(not row.is_valid) for row in rows], sum)]
    for theirs, mine in ((SYNC, OURS_NCCL), (SYNC_ALONE, OURS)):
        for layout, least in (("NCHW", 1.8), ("NHWC", 1.2)):
            speedups = layer_speedups([row for row in valid if row.workload.layout == layout], theirs, mine)
            found.append(at_least(f"{mine} over {theirs}, {layout}", least, speedups, geometric_mean))
        found.append(
            at_least(f"{mine} over {theirs}, x < 4 MB", 3, layer_speedups(small, theirs, mine), geometric_mean)
        )
    shares = {str(row.workload): share for row in large if (share := bandwidth_share(row, OURS, copy_bandwidth))}
    found.append(at_least("share of the copy bandwidth, every x ≥ 60 MB", 0.75, shares, min))
    habits = [figures.habits for row in valid for figures in _ours(row) if figures.habits is not None]
    found.append(at_most("host syncs of ours", 0, [habit.host_syncs for habit in habits], max))
    errors = [float(habit.sync_error is not None) for habit in habits]
    found.append(at_most("calls of ours that fail where syncs are errors", 0, errors, sum))
    layer = [row.layer[OURS] for row in valid if OURS in row.layer]
    forward = [figures.forward.work.num_kernels for figures in layer if figures.forward and figures.forward.work]
    both = [figures.both.work.num_kernels for figures in layer if figures.both.work]
    found.append(at_most("kernels of ours, forward", 2, forward, max))
    found.append(at_most("kernels of ours, forward + backward", 4, both, max))
    synced = [row.layer[OURS_NCCL].habits for row in valid if OURS_NCCL in row.layer]
    collectives = [habit.num_collectives for habit in synced if habit is not None]
    found.append(at_most("collectives of ours, forward", 1, [each[0] for each in collectives], max))
    found.append(at_most("collectives of ours, forward + backward", 2, [each[1] for each in collectives], max))
    gains = {
        str(row.workload): row.block[ONE_BY_ONE].both.median_s / row.block[FUSED].both.median_s
        for row in valid
        if FUSED in row.block and ONE_BY_ONE in row.block
    }
    found.append(at_least("fused over one by one", 1.3, gains, geometric_mean))
    return found


def at_least(what: str, bound: float, values: dict[str, float], total: Callable[[Iterable[float]], float]) -> Target:
    """A target from below; the value that is furthest from it is named."""
    if not values:
        return Target(what, f"≥ {bound:g}", None, None)
    value = total(values.values())
    worst = min(values, key=values.__getitem__)
    detail = f"{len(values)} workloads, least {values[worst]:.3g} at {worst}"
    return Target(what, f"≥ {bound:g}", value, value >= bound, detail)


def at_most(what: str, bound: float, values: Sequence[float], total: Callable[[Iterable[float]], float]) -> Target:
    """A target from above."""
    if not values:
        return Target(what, f"≤ {bound:g}", None, None)
    value = float(total(values))
    return Target(what, f"≤ {bound:g}", value, value <= bound)


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive values, one at least."""
    return math.exp(statistics.fmean(map(math.log, values)))


def layer_speedups(rows: Iterable[Row], theirs: str, mine: str) -> dict[str, float]:
    """How many times as fast forward and backward are, by workload."""
    return {
        str(row.workload): row.layer[theirs].both.median_s / row.layer[mine].both.median_s
        for row in rows
        if theirs in row.layer and mine in row.layer
    }


def bandwidth_share(row: Row, scheme: str, copy_bandwidth: float | None, *, is_forward: bool = False) -> float | None:
    """The least traffic there can be over the time of the kernels, over the bandwidth of a copy."""
    figures = row.layer.get(scheme)
    done = None if figures is None else figures.forward if is_forward else figures.both
    if done is None or done.work is None or not done.work.seconds or copy_bandwidth is None:
        return None
    accesses = FORWARD_ACCESSES if is_forward else BOTH_ACCESSES
    return accesses * row.workload.x_bytes / done.work.seconds / copy_bandwidth


def _ours(row: Row) -> list[Figures]:
    return [figures for of in (row.layer, row.block) for scheme, figures in of.items() if scheme.startswith("ours")]


def tables(rows: Sequence[Row], copy_bandwidth: float | None) -> list[str]:
    """Times, kernels, what the host does, memory, and the block."""
    layer = [name for name in _LAYER_ORDER if any(name in row.layer for row in rows)]
    block = [name for name in _BLOCK_ORDER if any(name in row.block for row in rows)]
    profiled = [name for name in layer if name not in (OURS_NCCL, SYNC_ALONE)]

    def table(title: str, names: Sequence[str], cell: Callable[[Row, str], str], first: str) -> str:
        body = [[_label(row), *(cell(row, name) for name in names)] for row in rows]
        return f"{title}:\n\n{results.table([first, *names], body)}"

    return [
        table(
            f"Forward + backward, median µs, and times of {OURS}",
            layer,
            lambda row, name: _time_cell(row.layer, name, lambda figures: figures.both),
            "layer",
        ),
        table(
            f"Forward, median µs, and times of {OURS}",
            layer,
            lambda row, name: _time_cell(row.layer, name, lambda figures: figures.forward),
            "layer",
        ),
        table(
            "Kernels, forward + backward: µs in all, how many, share of the copy's bandwidth forward and both",
            profiled,
            lambda row, name: _kernels_cell(row, name, copy_bandwidth),
            "layer",
        ),
        table(
            "Forward + backward: µs until the host has launched it, host syncs, collectives",
            layer,
            lambda row, name: _host_cell(row.layer.get(name)),
            "layer",
        ),
        table(
            "Memory kept for the backward, the input included, and the most that is taken beside it, in sizes of x",
            profiled,
            lambda row, name: _memory_cell(row.layer.get(name)),
            "layer",
        ),
        table(
            f"Norm, += residual, ReLU, forward + backward: median µs, and times of {FUSED}",
            block,
            lambda row, name: _time_cell(row.block, name, lambda figures: figures.both, FUSED),
            "block",
        ),
    ]


_LAYER_ORDER = (OURS, OURS_NCCL, OURS_GRAPH, SYNC, SYNC_ALONE, CUDNN, ATEN, COMPILED)
_BLOCK_ORDER = (FUSED, ONE_BY_ONE, SYNC, SYNC_ALONE)


def _label(row: Row) -> str:
    return str(row.workload) if row.is_valid else f"INVALID {row.workload}"


def _time_cell(
    figures: dict[str, Figures], name: str, part: Callable[[Figures], Pass | None], reference: str = OURS
) -> str:
    measured = part(figures[name]) if name in figures else None
    if measured is None:
        return ""
    base = part(figures[reference]) if reference in figures else None
    ratio = "" if base is None else f" {measured.median_s / base.median_s:.2f}×"
    return f"{measured.median_s * 1e6:.1f}{ratio}"


def _kernels_cell(row: Row, name: str, copy_bandwidth: float | None) -> str:
    figures = row.layer.get(name)
    if figures is None or figures.both.work is None:
        return ""
    shares = [bandwidth_share(row, name, copy_bandwidth, is_forward=is_forward) for is_forward in (True, False)]
    percents = " ".join("–" if share is None else f"{share:.0%}" for share in shares)
    return f"{figures.both.work.seconds * 1e6:.1f} {figures.both.work.num_kernels:.3g} {percents}"


def _host_cell(figures: Figures | None) -> str:
    if figures is None:
        return ""
    habits = figures.habits
    others = "" if habits is None else f" {habits.host_syncs} {habits.num_collectives[1]}"
    return f"{figures.both.issue_s * 1e6:.1f}{others}"


def _memory_cell(figures: Figures | None) -> str:
    if figures is None or figures.habits is None:
        return ""
    return f"{figures.habits.saved:.2f} {figures.habits.peak:.2f}"


def plain_table(rows: Sequence[dict[str, Any]]) -> str:
    """One column for each key of any row."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return results.table(keys, [[_plain_cell(row.get(key, "")) for key in keys] for row in rows])


def _plain_cell(value: object) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def progress(row: Row, copy_bandwidth: float | None) -> str:
    """A row in one line, for whoever waits."""
    parts = []
    for theirs, mine in ((SYNC, OURS_NCCL), (SYNC_ALONE, OURS)):
        if theirs in row.layer and mine in row.layer:
            mine_s, theirs_s = (row.layer[name].both.median_s for name in (mine, theirs))
            parts.append(f"{mine} {mine_s * 1e6:.0f} µs, {theirs} {theirs_s / mine_s:.2f}×")
    share = bandwidth_share(row, OURS, copy_bandwidth)
    if share is not None:
        parts.append(f"{share:.0%} of copy")
    return f"{_label(row)}: {'; '.join(parts)}"


def row_as_json(row: Row) -> dict[str, Any]:
    """In plain types."""
    shape, dtype, layout = row.workload
    return {
        **asdict(row),
        "workload": {
            "shape": shape,
            "dtype": str(dtype).removeprefix("torch."),
            "layout": layout,
            "x_bytes": row.workload.x_bytes,
        },
    }


# Other ways to cut the passes. `syncbn.kernels.triton.plan` decides; what it calls its numbers may change.

NUMBERS = {
    "num_warps": (2, 4, 8),
    "_PROGRAMS_PER_PROCESSOR": (2, 4, 8, 16),
    "_MAX_STEPS": (1, 2, 4, 8, 16),
    "j of first passes": (0.5, 1, 2),
    "j of second passes": (0.5, 1, 2),
}
Cut = tuple[tuple[str, float], ...]  # every number that can be changed, with its value


def tune(report: Report, meter: Meter, workloads: Sequence[Workload]) -> None:
    """Changes one number of the cut at a time, then takes the best of each together."""
    prepare_in_parallel(report, workloads, ["--tune"], probe_nccl=False)
    with report.journal.attempt("copy bandwidth", meter):
        report.copy_bandwidths.append(meter.copy_bandwidth())
    for index, workload in enumerate(workloads):
        deadline_s = time.monotonic() + report.budget.share(len(workloads) - index)
        with report.journal.attempt(str(workload), meter):
            given = data(workload, meter.device, num_batches(workload, meter.l2_bytes), seed=index)
            found = tuned(report.journal, meter, workload, given, deadline_s)
            rows = tuning_rows(workload, found)
            report.tuning += rows
            report.best_cuts += best_cuts(workload, found)
            print(f"{plain_table(rows)}\n", flush=True)
        report.write()


def tuned(
    journal: Journal, meter: Meter, workload: Workload, given: Data, deadline_s: float
) -> dict[Cut, dict[str, float]]:
    """The kernels' times with each cut that gives right results, the default first."""
    default = default_cut()
    found: dict[Cut, dict[str, float]] = {}

    def try_out(cut: Cut) -> None:
        if cut in found or (found and time.monotonic() > deadline_s):
            return
        with journal.attempt(f"{workload}, {difference(cut, default)}", meter), cut_as(cut):
            call = calls(layer_schemes(None)[0], given, is_block=False)[0]
            too_large = wrong(errors(call), OURS, workload.dtype, is_block=False)
            if too_large:  # no cut that the plan would make itself
                journal.note(f"{workload}, {difference(cut, default)}: relative errors {too_large}")
            else:
                found[cut] = kernel_times(meter, given)

    for cut in [default, *variations(default)]:
        try_out(cut)
    if default in found:
        try_out(best_of_each(default, {cut: sum(times.values()) for cut, times in found.items()}))
    return found


def tuning_rows(workload: Workload, found: dict[Cut, dict[str, float]]) -> list[dict[str, Any]]:
    """A row for each cut."""
    default = next(iter(found), ())
    return [
        {
            "workload": str(workload),
            "cut": difference(cut, default),
            **{kernel: f"{seconds * 1e6:.2f}" for kernel, seconds in times.items()},
            "sum": f"{sum(times.values()) * 1e6:.2f}",
        }
        for cut, times in found.items()
    ]


def best_cuts(workload: Workload, found: dict[Cut, dict[str, float]]) -> list[dict[str, Any]]:
    """A row with the best cut of each kernel, and of all together."""
    if not found:
        return []
    default = next(iter(found))
    best = {"workload": str(workload)}
    for kernel in [*found[default], "sum"]:
        times = {cut: times.get(kernel, sum(times.values())) for cut, times in found.items()}
        fastest = min(times, key=times.__getitem__)
        best[kernel] = f"{times[default] / times[fastest]:.2f}× {difference(fastest, default)}"
    return [best]


def difference(cut: Cut, default: Cut) -> str:
    """What a cut changes, in words."""
    usual = dict(default)
    return ", ".join(f"{name} {value:g}" for name, value in cut if value != usual[name]) or "default"


def variations(default: Cut) -> list[Cut]:
    """Cuts that differ from the default in one number."""
    return [
        tuple((other, choice if other == name else theirs) for other, theirs in default)
        for name, value in default
        for choice in NUMBERS[name]
        if choice != value
    ]


def best_of_each(default: Cut, seconds: dict[Cut, float]) -> Cut:
    """For every number, what was fastest while the others were the default's."""
    best = dict(default)
    for name, value in default:
        alone = {
            dict(cut)[name]: taken
            for cut, taken in seconds.items()
            if all(a == b for a, b in zip(cut, default, strict=True) if a[0] != name)
        }
        best[name] = min(alone, key=alone.__getitem__, default=value)
    return tuple(best.items())


def kernel_times(meter: Meter, given: Data) -> dict[str, float]:
    """Median time of each kernel of a forward and backward, by name, over a turn of the batches."""
    of_scheme = calls(layer_schemes(None)[0], given, is_block=False)
    run = runner((of_scheme * math.ceil(12 / len(of_scheme)))[:24], with_backward=True)
    run()
    (kernels,) = meter.kernels([run])
    by_name: dict[str, list[float]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, []).append(kernel.duration_s)
    return {name: statistics.median(durations_s) for name, durations_s in by_name.items()}


def default_cut() -> Cut:
    """As the library cuts and launches, of what it lets be changed."""
    plan = _kernels_module("plan")
    values = {"num_warps": plan.NUM_WARPS, "j of first passes": 1, "j of second passes": 1}
    numbers = {name: values.get(name, getattr(plan, name, None)) for name in NUMBERS}
    return tuple((name, value) for name, value in numbers.items() if value is not None)


@contextmanager
def cut_as(cut: Cut) -> Iterator[None]:
    """Has the library cut and launch so for the time being."""
    plan, launch, backend = (_kernels_module(name) for name in ("plan", "launch", "backend"))
    numbers = dict(cut)
    changed: dict[tuple[ModuleType, str], Any] = {(plan, name): value for name, value in cut if name.startswith("_")}
    changed[plan, "_NUM_THREADS"] = 32 * numbers["num_warps"]
    changed[launch, "_OPTIONS"] = {**launch._OPTIONS, "num_warps": numbers["num_warps"]}
    changed[backend, "reduction"] = partial(_reduction_with, numbers["j of first passes"])
    changed[backend, "mapping"] = partial(_mapping_with, numbers["j of second passes"])
    usual = {place: getattr(*place) for place in changed}
    try:
        for (module, name), value in changed.items():
            setattr(module, name, value)
        _forget(plan, backend)
        yield
    finally:
        for (module, name), value in usual.items():
            setattr(module, name, value)
        _forget(plan, backend)


def _kernels_module(name: str) -> ModuleType:
    return importlib.import_module(f"syncbn.kernels.triton.{name}")  # needs Triton, which this script does not


def _forget(*modules: ModuleType) -> None:
    """Clears every cache of decisions in these modules."""
    for module in modules:
        for value in list(vars(module).values()):
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def _reduction_with(factor: float, layout: Any, itemsize: int, **options: Any) -> Any:  # noqa: ANN401 - not public
    """The plan with another J, and shares that are multiples of the tiles it makes."""
    usual = _kernels_module("plan").reduction(layout, itemsize, **options)
    j = max(1, int(usual.j * factor))
    step = 1 if usual.along else j if layout.is_planes else j * usual.r
    samples = _ceil(usual.samples_per_program, step) * step
    chunks = _ceil(usual.chunks_per_part, j) * j if usual.along else usual.chunks_per_part
    num_parts = _ceil(usual.num_parts * usual.chunks_per_part, chunks)
    num_splits = max(1, _ceil(layout.num_rows, samples)) * num_parts
    return usual._replace(
        j=j,
        samples_per_program=samples,
        chunks_per_part=chunks,
        num_parts=num_parts,
        num_splits=num_splits,
        num_programs=num_splits * usual.num_blocks,
    )


def _mapping_with(factor: float, layout: Any, itemsize: int, **options: Any) -> Any:  # noqa: ANN401 - not public
    usual = _kernels_module("plan").mapping(layout, itemsize, **options)
    j = max(1, int(usual.j * factor))
    one_below_another = max(1, _ceil(layout.num_rows, j * usual.r))
    if not usual.along:
        one_below_another = _ceil(one_below_another, usual.steps_per_program)
    return usual._replace(j=j, num_programs=usual.num_blocks * one_below_another)


def _ceil(n: int, step: int) -> int:
    return -(-n // step)


if __name__ == "__main__":
    sys.exit(main())
