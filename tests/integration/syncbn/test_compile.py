"""torch.compile and torch.export see through the layer: one graph, the same numbers, the same buffers.

`aot_eager` runs what was traced without generating code: a failure there is one of tracing (a graph break, a wrong
fake, a mutation that got lost). What fails with `inductor` alone is the layout or the lifetime of a tensor.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from syncbn import DeferredStatistics, Renormalization, SyncBatchNorm, convert_sync_batchnorm, new_sync_group
from syncbn.errors import SingleValueError
from tests.integration.syncbn.whole_batch import draw
from tests.ranks import run_ranks

CHANNELS = 4
# Inductor fuses what surrounds the layer and may reorder its float64 sums; the layer itself runs the same kernels.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """A layer between others, with a loss inside the graph, so that the compiler sees the layer's gradient too."""

    def __init__(self, residual: bool = False, masked: bool = False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.norm = SyncBatchNorm(CHANNELS, **options)
        self.residual, self.masked = residual, masked

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.conv(x)
        mask = x[:, :1] > -0.5 if self.masked else None
        y = self.norm(hidden, hidden.sin() if self.residual else None, mask)
        return (y * y.detach().cos()).flatten(1).square().mean(1)


CASES = {
    "plain": {},
    "residual": {"residual": True},
    "residual and relu": {"residual": True, "activation": "relu"},
    "mask": {"masked": True},
    "mask, residual and silu": {"masked": True, "residual": True, "activation": "silu"},
    "leaky_relu": {"activation": "leaky_relu", "negative_slope": 0.3},
    "skip_nonfinite": {"skip_nonfinite": True},
    "momentum=None": {"momentum": None},
    "without affine": {"affine": False},
    "without bias": {"bias": False},
    "without running statistics": {"track_running_stats": False},
    "batch renormalization": {"renormalization": Renormalization(1.5, 0.5)},
    "ghosts": {"ghost_size": 2},
    "this rank alone": {"process_group": "local"},
}


def _steps(model, call, inputs):
    """Two optimizer steps: everything that they leave behind."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    buffers = {name: (id(b), b.data_ptr()) for name, b in model.named_buffers()}
    seen = []
    for x in inputs:
        x = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = call(x)
        optimizer.zero_grad()
        y.sum().backward()
        optimizer.step()
        seen += [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]
    assert buffers == {name: (id(b), b.data_ptr()) for name, b in model.named_buffers()}
    return [*seen, *model.buffers()]


def compare(options, inputs, backend, **compile_options):
    eager, compiled = Block(**options).double(), Block(**options).double()
    if inputs[0].is_contiguous(memory_format=torch.channels_last):
        eager, compiled = (model.to(memory_format=torch.channels_last) for model in (eager, compiled))
    expected = _steps(eager, eager, inputs)
    got = _steps(compiled, torch.compile(compiled, backend=backend, fullgraph=True, **compile_options), inputs)
    for at, (a, b) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda text, at=at: f"value {at}: {text}")
    assert not torch._dynamo.utils.counters["graph_break"]


def images(*sizes, memory_format=torch.contiguous_format):
    return [x.contiguous(memory_format=memory_format) for x in draw([(n, CHANNELS, 5, 6) for n in sizes])]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_tracing_changes_nothing(options, memory_format):
    compare(options, images(4, 4, memory_format=memory_format), "aot_eager")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ["plain", "residual", "mask, residual and silu"])
def test_generated_code_changes_nothing(name, memory_format):
    compare({**CASES[name], "skip_nonfinite": True}, images(4, 4, memory_format=memory_format), "inductor")


def test_any_batch_size_with_one_graph():
    # None as large as the channels, height or width: the compiler would take them for the same size.
    compare(CASES["residual and relu"], images(9, 3, 7, 2), "aot_eager", dynamic=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_there_is_no_graph_break():
    model = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), SyncBatchNorm(CHANNELS), nn.ReLU(), SyncBatchNorm(CHANNELS))
    explanation = torch._dynamo.explain(model)(torch.randn(3, CHANNELS, 4, 4))
    assert explanation.graph_break_count == 0
    assert explanation.graph_count == 1


def test_training_and_evaluation_of_one_compiled_model():
    model = Block().double()
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    (x,) = images(4)
    for mode in (True, False, True):
        model.train(mode)
        plain.train(mode)
        torch.testing.assert_close(compiled(x), plain(x), **CLOSE)
    assert model.norm.num_batches_tracked == 2
    torch.testing.assert_close(model.norm.running_var, plain.norm.running_var, **CLOSE)


def test_a_forward_without_gradient_counts_in_training_mode():
    model = Block().double()
    with torch.no_grad():
        torch.compile(model, backend="aot_eager", fullgraph=True)(*images(4))
    assert model.norm.num_batches_tracked == 1
    assert model.norm.running_mean.any()


def test_a_nonfinite_batch_is_counted_in_compiled_code():
    model = Block(skip_nonfinite=True).double()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    (x,) = images(4)
    compiled(x)
    before = model.norm.running_mean.clone()
    x[0, 0, 0, 0] = torch.nan
    assert compiled(x).isnan().any()
    assert torch.equal(model.norm.running_mean, before)
    assert (model.norm.num_nonfinite_batches, model.norm.num_batches_tracked) == (1, 1)


def test_checkpointing_inside_compiled_code_counts_once():
    model = Block(activation="silu").double()
    plain = copy.deepcopy(model)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(x):
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    (x,) = images(4)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    compiled(a).sum().backward()
    plain(b).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, **CLOSE)
    torch.testing.assert_close(model.norm.running_var, plain.norm.running_var, **CLOSE)
    assert model.norm.num_batches_tracked == 1


def test_checkpointing_around_compiled_code_counts_once():
    model = Block(activation="silu").double()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = images(4)[0].requires_grad_()
    torch.utils.checkpoint.checkpoint(compiled, x, use_reentrant=False).sum().backward()
    assert model.norm.num_batches_tracked == 1


@pytest.mark.parametrize("options", [{}, {"activation": "silu"}, {"activation": "relu"}], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_a_layer_in_evaluation_mode_can_be_exported(options, masked):
    layer = SyncBatchNorm(CHANNELS, dtype=torch.float64, **options)
    (x,) = images(4)
    layer(x)
    layer.eval()
    given = {"residual": x.sin(), "mask": x[:, :1] > 0 if masked else None}
    batch = torch.export.Dim("batch", min=2)
    shapes = {"input": {0: batch}, "residual": {0: batch}, "mask": {0: batch} if masked else None}
    program = torch.export.export(layer, (x,), given, dynamic_shapes=shapes)
    (other,) = images(7)
    given = {"residual": other.sin(), "mask": other[:, :1] > 0 if masked else None}
    torch.testing.assert_close(program.module()(other, **given), layer(other, **given), **CLOSE)


def _on_ranks(rank, options, inputs, backend, dynamic, group):
    torch._dynamo.reset()
    torch._inductor.config.compile_threads = 1  # a rank is a daemon, which may have no children
    if group is not None:
        options = {**options, "process_group": new_sync_group(group)}
    compare(options, [batch[rank] for batch in inputs], backend, dynamic=dynamic)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    dist.barrier()
    return graphs


UNEVEN = [(7, 2), (3, 8), (2, 3)]


@pytest.mark.parametrize("group", [None, "world"])
@pytest.mark.parametrize("name", ["plain", "mask, residual and silu", "momentum=None", "skip_nonfinite"])
def test_on_ranks_of_uneven_and_changing_batch_sizes(name, group):
    batches = [images(*sizes) for sizes in UNEVEN]
    graphs = run_ranks(2, _on_ranks, CASES[name], batches, "aot_eager", True, group, timeout_s=90)
    assert graphs == [1, 1]


def test_on_ranks_with_generated_code():
    batches = [images(*sizes) for sizes in UNEVEN[:1]]
    run_ranks(2, _on_ranks, CASES["residual and relu"], batches, "inductor", None, None, timeout_s=110)


def _on_an_empty_rank(rank, batch):
    torch._dynamo.reset()
    compare({"activation": "relu"}, [batch[rank]], "aot_eager")
    return True


def test_on_ranks_of_which_one_is_empty():
    assert run_ranks(2, _on_an_empty_rank, images(3, 0), timeout_s=90) == [True, True]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo's own look at a block's input
def test_blocks_of_one_kind_share_one_graph_whatever_their_names():
    model = convert_sync_batchnorm(
        nn.Sequential(*(nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS)) for _ in range(10)))
    )
    assert len({layer.name for layer in model.modules() if isinstance(layer, SyncBatchNorm)}) == 10
    for block in model:
        block.compile(fullgraph=True, backend="aot_eager")
    x = torch.randn(2, CHANNELS, 3, 3)
    for _ in range(6):  # a new object on the layers each time, as short-lived as the step
        with DeferredStatistics(model) as deferred:
            model(x).sum().backward()
            deferred.commit()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # one is specialized to the first block's input
    layer = model[0][1]
    assert layer.num_batches_tracked == 6


def _wrong_in_a_graph(rank):
    layer = convert_sync_batchnorm(nn.ModuleDict({"head": nn.BatchNorm1d(CHANNELS)}))["head"]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with pytest.raises(SingleValueError, match="head: batch statistics need more than one value"):
        compiled(torch.randn(1 if rank == 0 else 0, CHANNELS))
    return True


def test_errors_from_inside_a_graph_name_the_layer():
    assert run_ranks(2, _wrong_in_a_graph) == [True, True]
