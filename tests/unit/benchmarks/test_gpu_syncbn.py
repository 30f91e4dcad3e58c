"""What the GPU benchmark decides and writes, without a GPU: a meter that reads the host's clock takes its place.

torch's own SyncBatchNorm refuses CPU tensors; its formula takes its place.
"""

import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks import gpu_measure, gpu_schemes, gpu_syncbn, peers, results
from benchmarks.gpu_measure import Elapsed, Figures, Habits, Journal, Kernel, Pass, Row, Run, Timed, Work
from benchmarks.gpu_schemes import FUSED, ONE_BY_ONE, OURS, OURS_GRAPH, OURS_NCCL, SYNC, SYNC_ALONE, Scheme, Workload
from benchmarks.gpu_syncbn import Budget, Report

ROOT = Path(__file__).parents[3]
TINY = [Workload((2, 8, 6, 6), torch.float32, layout) for layout in ("NCHW", "NHWC")]


class HostMeter:
    """Times by the host's clock; sees one kernel in every run."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.l2_bytes = 10_000

    def describe(self) -> dict[str, Any]:
        return {"name": "no GPU", "triton": None}

    def synchronize(self) -> None:
        pass

    def time(self, warm_up: Run, run: Run) -> Elapsed:
        warm_up()
        started_s = time.perf_counter()
        run()
        taken_s = time.perf_counter() - started_s
        return Elapsed(taken_s, taken_s)

    def captured(self, run: Run) -> Run:
        run()
        return run

    def kernels(self, runs: Sequence[Run]) -> list[list[Kernel]]:
        for run in runs:
            run()
        return [[Kernel("kernel", 1e-6)] for _ in runs]

    def host_syncs(self, run: Run) -> int:
        run()
        return 0

    def obstacle_without_syncs(self, run: Run) -> str | None:
        run()
        return None

    def peak_bytes(self, run: Run) -> int:
        run()
        return 0

    def copy_bandwidth(self) -> float:
        return 1e9


@pytest.fixture(autouse=True)
def on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_measure, "_MOST_ROUNDS", 9)
    monkeypatch.setattr(gpu_schemes, "torch_sync_function", lambda step: peers.torch_sync(step._replace(group=None)))


@pytest.fixture
def report(tmp_path: Path) -> Report:
    report = Report(path=tmp_path / "gpu.json", budget=Budget(60))
    report.describe(HostMeter(), ["--quick"])
    return report


def row(
    workload: Workload,
    times_s: dict[str, float],
    *,
    block_s: dict[str, float] | None = None,
    is_valid: bool = True,
    kernel_s: float = 1.0,
    host_syncs: int = 0,
    num_collectives: tuple[int, int] = (1, 2),
) -> Row:
    def figures(seconds: float) -> Figures:
        def of(num_kernels: float) -> Pass:
            work = Work(kernel_s, {"kernel": num_kernels})
            return Pass(median_s=seconds, least_s=seconds, issue_s=seconds, work=work)

        habits = Habits(host_syncs=host_syncs, sync_error=None, num_collectives=num_collectives, saved=1, peak=2)
        return Figures(errors={}, forward=of(2), both=of(4), habits=habits)

    return Row(
        workload=workload,
        is_valid=is_valid,
        num_batches=1,
        num_rounds=1,
        layer={name: figures(seconds) for name, seconds in times_s.items()},
        block={name: figures(seconds) for name, seconds in (block_s or {}).items()},
    )


def verdicts(rows: list[Row], copy_bandwidth: float | None = 1e12) -> dict[str, tuple[float | None, bool | None]]:
    return {target.what: (target.value, target.is_met) for target in gpu_syncbn.targets(rows, copy_bandwidth)}


SMALL, LARGE = (
    Workload((8, 256, 28, 28), torch.bfloat16, "NCHW"),
    Workload((32, 256, 56, 56), torch.float32, "NCHW"),
)


def test_speedups_are_averaged_geometrically_and_only_where_both_were_measured() -> None:
    rows = [
        row(SMALL, {OURS: 1, SYNC_ALONE: 8, OURS_NCCL: 2, SYNC: 4}),
        row(LARGE, {OURS: 1, SYNC_ALONE: 2}),
    ]
    found = verdicts(rows)
    assert found["ours over SyncBatchNorm, no collective, NCHW"] == (pytest.approx(4), True)
    assert found["ours, NCCL over SyncBatchNorm, NCHW"] == (2, True)
    assert found["ours over SyncBatchNorm, no collective, x < 4 MB"] == (pytest.approx(8), True)
    assert found["ours, NCCL over SyncBatchNorm, x < 4 MB"] == (2, False)
    assert found["ours, NCCL over SyncBatchNorm, NHWC"] == (None, None)


def test_a_workload_with_a_wrong_result_counts_for_nothing_else() -> None:
    rows = [row(SMALL, {OURS: 1, SYNC_ALONE: 1.8}), row(LARGE, {OURS: 1, SYNC_ALONE: 100}, is_valid=False)]
    found = verdicts(rows)
    assert found["workloads with a wrong result of ours"] == (1, False)
    assert found["ours over SyncBatchNorm, no collective, NCHW"] == (pytest.approx(1.8), True)


def test_the_bandwidth_share_is_the_least_of_the_large_workloads() -> None:
    rows = [row(LARGE, {OURS: 1}, kernel_s=8 * LARGE.x_bytes / share / 1e12) for share in (0.9, 0.7)]
    found = verdicts([*rows, row(SMALL, {OURS: 1})])
    (value, is_met) = found["share of the copy bandwidth, every x ≥ 60 MB"]
    assert (value, is_met) == (pytest.approx(0.7), False)
    assert verdicts(rows, None)["share of the copy bandwidth, every x ≥ 60 MB"] == (None, None)


def test_habits_and_the_fused_block_are_judged() -> None:
    rows = [
        row(SMALL, {OURS: 1, OURS_NCCL: 1}, block_s={FUSED: 1, ONE_BY_ONE: 1.2}),
        row(LARGE, {OURS: 1, OURS_NCCL: 1}, block_s={FUSED: 1, ONE_BY_ONE: 1.2}, host_syncs=3, num_collectives=(1, 3)),
    ]
    found = verdicts(rows)
    assert found["host syncs of ours"] == (3, False)
    assert found["kernels of ours, forward"] == (2, True)
    assert found["kernels of ours, forward + backward"] == (4, True)
    assert found["collectives of ours, forward"] == (1, True)
    assert found["collectives of ours, forward + backward"] == (3, False)
    assert found["fused over one by one"] == (pytest.approx(1.2), False)


def test_a_target_says_in_a_line_what_came_out() -> None:
    lines = [str(target) for target in gpu_syncbn.targets([row(SMALL, {OURS: 1, SYNC_ALONE: 2})], None)]
    assert any(line.startswith("met: ours over SyncBatchNorm, no collective, NCHW, ≥ 1.8: 2 (1 w") for line in lines)
    assert "not measured: fused over one by one, ≥ 1.3" in lines


def test_a_budget_is_shared_among_what_is_left_to_do() -> None:
    now_s = [100.0]
    budget = Budget(60, clock=lambda: now_s[0])
    assert budget.share(3) == 20
    now_s[0] += 40
    assert budget.share(2) == 10
    now_s[0] += 40
    assert budget.left_s == 0


def test_workloads_are_ordered_so_that_a_run_cut_short_has_seen_every_shape() -> None:
    workloads = gpu_syncbn.chosen_workloads(None)
    half = workloads[: len(workloads) // 2]
    assert {workload.shape for workload in half} == set(gpu_syncbn.SHAPES)
    assert len(workloads) == len(gpu_syncbn.SHAPES) * 4
    assert gpu_syncbn.chosen_workloads([gpu_syncbn.as_shape("8x16x3x3")])[0].shape == (8, 16, 3, 3)


def test_turns_rotate_and_end_at_the_deadline_but_not_before_a_few_rounds() -> None:
    order: list[str] = []
    timed = [Timed(lambda: None, lambda name=name: order.append(name), 1) for name in "ab"]
    times = gpu_measure.take_turns(HostMeter(), timed, 0, clock=lambda: float(len(order)))
    assert [len(each) for each in times] == [5, 5]
    assert order[:4] == ["a", "b", "b", "a"]
    order.clear()
    times = gpu_measure.take_turns(HostMeter(), timed, 16, clock=lambda: float(len(order)))
    assert [len(each) for each in times] == [9, 9]


def test_a_trace_is_split_at_its_markers_whatever_its_order() -> None:
    def event(ts: float, name: str, cat: str = "kernel") -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": 2.0}

    marker = "at::cuda::(anonymous namespace)::spin_kernel(long)"
    events = [
        event(6, "Memset (Device)", "gpu_memset"),
        event(1, marker),
        event(2, "moments"),
        event(5, marker),
        event(3, "cudaLaunchKernel", "cuda_runtime"),
        event(0, "before"),
        {"ph": "M", "name": "process_name"},
    ]
    assert gpu_measure.kernels_of_runs(events, 2) == [[Kernel("moments", 2e-6)], [Kernel("Memset (Device)", 2e-6)]]
    with pytest.raises(RuntimeError, match="2 of 3 runs"):
        gpu_measure.kernels_of_runs(events, 3)


def test_the_work_of_several_calls_is_that_of_one() -> None:
    found = gpu_measure.work([Kernel("a", 1.0), Kernel("a", 3.0), Kernel("b", 2.0), Kernel("b", 2.0)], 2)
    assert found == Work(4.0, {"a": 1, "b": 1})
    assert found.num_kernels == 2


def test_a_nan_is_wrong() -> None:
    for scheme in (OURS, SYNC):
        assert gpu_measure.wrong({"y": float("nan"), "dx": 0}, scheme, torch.float32, is_block=False).keys() == {"y"}


def test_collectives_are_counted_replaced_and_put_back() -> None:
    originals = dist.all_reduce, dist.all_gather
    values, target = torch.ones(3), torch.zeros(1, 3)
    with gpu_schemes.collectives_of_one_rank(), gpu_schemes.counted_collectives() as called:
        dist.all_reduce(values)
        dist.all_gather_into_tensor(target, values)
    assert called == ["all_reduce", "all_gather_into_tensor"]
    assert target.tolist() == [[1, 1, 1]]
    assert (dist.all_reduce, dist.all_gather) == originals


def test_everything_is_measured_and_written(report: Report) -> None:
    meter = HostMeter()
    report.copy_bandwidths.append(meter.copy_bandwidth())
    report.accuracy = gpu_syncbn.accuracy(meter.device, None, extent=8)
    report.graphs = gpu_syncbn.graphs(report.journal, meter)
    gpu_syncbn.measure_all(report, meter, TINY, None)
    printed = report.finish(with_note=False)
    assert report.journal.failures == []
    written = json.loads(report.path.read_text())
    assert [each["workload"]["layout"] for each in written["rows"]] == ["NCHW", "NHWC"]
    assert set(written["rows"][0]["layer"]) == {
        *(OURS, OURS_GRAPH, SYNC_ALONE),
        *(gpu_schemes.CUDNN, gpu_schemes.ATEN),
    }
    assert set(written["rows"][0]["block"]) == {FUSED, ONE_BY_ONE, SYNC_ALONE}
    assert all(each["is_valid"] for each in written["rows"])
    assert written["rows"][0]["num_batches"] == 14
    assert [each["N"] for each in written["graphs"]] == [4, 4, 0, 0]
    assert report.path.with_suffix(".md").read_text().strip() in printed
    assert "| (2, 8, 6, 6) fp32 NHWC |" in printed


def test_two_ranks_with_uneven_batches_and_an_empty_rank_agree_with_one() -> None:
    journal = Journal()
    rows = gpu_syncbn.two_ranks(journal, "cpu", 60)
    assert journal.failures == []
    assert {each["samples"] for each in rows} == {"3+5", "4+0"}
    assert max(each["dx"] for each in rows if each["dtype"] == "float32") < 1e-6


def test_what_raises_is_kept_and_the_others_are_measured(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(step: peers.Step, residual: torch.Tensor | None) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    schemes = [*gpu_schemes.layer_schemes(None)[:1], Scheme(name=gpu_schemes.CUDNN, function=fail)]
    monkeypatch.setattr(gpu_syncbn, "layer_schemes", lambda group: schemes)
    gpu_syncbn.measure_all(report, HostMeter(), TINY[:1], None)
    assert report.journal.failures == [f"{TINY[0]}, F.batch_norm, cuDNN: RuntimeError: no such kernel"]
    assert list(report.rows[0].layer) == [OURS]
    assert report.rows[0].is_valid
    assert json.loads(report.path.read_text())["failures"] == report.journal.failures


def test_a_wrong_result_of_ours_makes_the_row_invalid(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(step: peers.Step, residual: torch.Tensor | None) -> torch.Tensor:
        return peers.ours(step) + 1e-3

    monkeypatch.setattr(gpu_syncbn, "layer_schemes", lambda group: [Scheme(name=OURS, function=shifted)])
    gpu_syncbn.measure_all(report, HostMeter(), TINY[:1], None)
    assert not report.rows[0].is_valid
    assert "WRONG RESULT" in report.journal.failures[0]
    assert "INVALID (2, 8, 6, 6)" in report.text()


def test_workloads_without_time_are_left_out(report: Report) -> None:
    report.budget = Budget(0)
    gpu_syncbn.measure_all(report, HostMeter(), TINY, None)
    assert report.rows == []
    assert "2 workloads were left out" in report.journal.notes[0]


def test_the_plain_formula_is_right() -> None:
    given = gpu_schemes.data(TINY[0], torch.device("cpu"), 1)

    def function(step: peers.Step, residual: torch.Tensor | None) -> torch.Tensor:
        return gpu_schemes.plain_formula(*step[:7])

    (call,) = gpu_schemes.calls(Scheme(name="plain", function=function), given, is_block=False)
    assert max(gpu_schemes.errors(call).values()) < 1e-5


def test_tuning_varies_one_number_and_then_takes_the_best_of_each() -> None:
    default = (("num_warps", 4), ("_PROGRAMS_PER_PROCESSOR", 8))
    cuts = gpu_syncbn.variations(default)
    assert len(cuts) == 5
    assert default not in cuts
    seconds = dict.fromkeys([default, *cuts], 1.0)
    wide, many = (("num_warps", 8), default[1]), (default[0], ("_PROGRAMS_PER_PROCESSOR", 16))
    seconds[wide] = seconds[many] = 0.5
    assert gpu_syncbn.best_of_each(default, seconds) == (("num_warps", 8), ("_PROGRAMS_PER_PROCESSOR", 16))
    assert gpu_syncbn.difference(wide, default) == "num_warps 8"


def test_versions_leave_out_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != "torch":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert list(results.versions()) == ["python", "torch"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which it would measure")
@pytest.mark.parametrize("command", [["benchmarks/gpu_syncbn.py"], ["-m", "benchmarks.gpu_syncbn"]])
def test_without_a_gpu_it_says_so(command: list[str]) -> None:
    run = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "This benchmark needs a GPU, and torch finds none here.\n"
