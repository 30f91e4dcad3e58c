"""Ways to normalize a batch on a GPU, the batches they are given, and what has to come out.

torch's own. `torch.nn.SyncBatchNorm` hands a group of one rank to `F.batch_norm`, so its autograd function is called
instead. That asks nowhere how many ranks there are: `world_size` sizes the gather's result and forbids a single value.
With a group of one rank and `world_size` 1 it therefore does all it does among many: statistics, all-gather, the
boolean masks that drop empty ranks, the merge, the normalization; in the backward the sums, the all-reduce, dx. (With
`world_size` 2 half of what it gathers would be memory that nobody wrote.)

Ours leaves out the collectives of a group of one rank. "ours, NCCL" is told to take that group for one with peers, and
so runs what ranks run. Its counterpart is SyncBatchNorm over NCCL; that of "ours" is SyncBatchNorm whose collectives
are a copy on the device and nothing.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.nn.modules._functions import SyncBatchNorm

from benchmarks.cpu_kernels import fused, one_by_one
from benchmarks.peers import Step, ours, torch_local
from syncbn import functional

OURS = "ours"
OURS_NCCL = "ours, NCCL"
OURS_GRAPH = "ours, graph"
SYNC = "SyncBatchNorm"
SYNC_ALONE = "SyncBatchNorm, no collective"
CUDNN = "F.batch_norm, cuDNN"
ATEN = "F.batch_norm, native"
COMPILED = "torch.compile"
FUSED = "ours, fused"
ONE_BY_ONE = "ours, one by one"

EPS = 1e-5
_COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single")
_CHUNK_VALUES = 1 << 26  # of a batch that is compared with float64 at once: half a GB for each float64 tensor


class Workload(NamedTuple):
    """The shape, dtype and memory layout of a batch."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.shape))}) {dtype_name(self.dtype)} {self.layout}"

    @property
    def x_bytes(self) -> int:
        """Size of the batch."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def memory_format(self) -> torch.memory_format:
        """As torch calls the layout."""
        if self.layout == "NCHW":
            return torch.contiguous_format
        return torch.channels_last if len(self.shape) == 4 else torch.channels_last_3d


def dtype_name(dtype: torch.dtype) -> str:
    """In few letters."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}.get(dtype, str(dtype))


class Batch(NamedTuple):
    """What one training step is given, each of shape (N, C, *)."""

    x: torch.Tensor
    dy: torch.Tensor
    residual: torch.Tensor


class Data(NamedTuple):
    """Batches that take turns, so that none finds itself in the cache, and the parameters of their layer."""

    batches: list[Batch]
    weight: torch.Tensor
    bias: torch.Tensor


def data(workload: Workload, device: torch.device, num_batches: int, *, seed: int = 0) -> Data:
    """Normally distributed values; dy correlates with x, so that every term of dx counts."""
    generator = torch.Generator(device).manual_seed(seed)
    channels = workload.shape[1]
    per_channel = (1, channels, *[1] * (len(workload.shape) - 2))
    means = torch.randn(per_channel, generator=generator, device=device)

    def tensor(values: torch.Tensor) -> torch.Tensor:
        return values.to(workload.dtype).contiguous(memory_format=workload.memory_format)

    batches = []
    for _ in range(num_batches):
        noise, slope, residual = (torch.randn(workload.shape, generator=generator, device=device) for _ in range(3))
        dy = slope.add_(noise, alpha=0.5).add_(0.3)
        x, dy, residual = tensor(noise.mul_(1.5).add_(means)), tensor(dy), tensor(residual)
        batches.append(Batch(x.requires_grad_(), dy, residual.requires_grad_()))
    weight = torch.rand(channels, generator=generator, device=device).add_(0.5).requires_grad_()
    bias = torch.randn(channels, generator=generator, device=device).requires_grad_()
    return Data(batches, weight, bias)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A way to compute the layer, or the block (norm, += residual, ReLU) where a residual is given.

    Attributes:
        name: For tables.
        function: The forward.
        group: Whom to synchronize with.
        context: What has to hold around forward and backward.
        is_captured: Whether the host's part is left out when it is timed.
    """

    name: str
    function: Callable[[Step, torch.Tensor | None], torch.Tensor]
    group: Any = None
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    is_captured: bool = False


class Call(NamedTuple):
    """One forward, and backward, of a scheme; calls of the same layer share its running statistics."""

    scheme: Scheme
    step: Step
    residual: torch.Tensor | None
    dy: torch.Tensor

    @property
    def inputs(self) -> list[torch.Tensor]:
        """What to differentiate with respect to."""
        return [*self.step[:3], *([] if self.residual is None else [self.residual])]

    def forward(self) -> torch.Tensor:
        """The output, with what its backward needs."""
        return self.scheme.function(self.step, self.residual)

    def both(self) -> list[torch.Tensor]:
        """The output and the gradients."""
        y = self.scheme.function(self.step, self.residual)
        return [y, *torch.autograd.grad(y, self.inputs, self.dy)]

    def saved_bytes(self) -> int:
        """Memory kept for the backward, the input's own included; what shares memory counts once."""
        storages = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            _y = self.forward()  # holds them, so that no address comes twice
        return sum(storages.values())


def calls(scheme: Scheme, given: Data, *, is_block: bool, momentum: float = 0.1) -> list[Call]:
    """The scheme on each of the batches."""
    weight, bias = given.weight, given.bias
    running = torch.zeros_like(weight, requires_grad=False), torch.ones_like(weight, requires_grad=False)
    return [
        Call(
            scheme,
            Step(batch.x, weight, bias, *running, momentum=momentum, eps=EPS, group=scheme.group),
            batch.residual if is_block else None,
            batch.dy,
        )
        for batch in given.batches
    ]


def layer_schemes(group: dist.ProcessGroup | None) -> list[Scheme]:
    """Ours first.

    Args:
        group: Of one rank, over NCCL; None where there is none.
    """
    schemes = [
        Scheme(name=OURS, function=partial(one_by_one, ours)),
        Scheme(name=OURS_GRAPH, function=partial(one_by_one, ours), is_captured=True),
        torch_sync_alone(),
        Scheme(name=CUDNN, function=partial(one_by_one, torch_local)),
        Scheme(
            name=ATEN,
            function=partial(one_by_one, torch_local),
            context=partial(torch.backends.cudnn.flags, enabled=False),
        ),
    ]
    if group is not None:
        schemes += [
            Scheme(name=OURS_NCCL, function=partial(one_by_one, ours), group=group, context=with_peers),
            Scheme(name=SYNC, function=partial(one_by_one, torch_sync_function), group=group),
        ]
    return schemes


def block_schemes(group: dist.ProcessGroup | None) -> list[Scheme]:
    """Ours in one call, and one by one; then torch's."""
    return [
        Scheme(name=FUSED, function=fused),
        Scheme(name=ONE_BY_ONE, function=partial(one_by_one, ours)),
        torch_sync_alone()
        if group is None
        else Scheme(name=SYNC, function=partial(one_by_one, torch_sync_function), group=group),
    ]


def torch_sync_alone() -> Scheme:
    """SyncBatchNorm without the cost of collectives."""
    return Scheme(
        name=SYNC_ALONE,
        function=partial(one_by_one, torch_sync_function),
        group=_Alone(),
        context=collectives_of_one_rank,
    )


def compiled_scheme() -> Scheme:
    """The plain formula under torch.compile; a new one for each workload, since it is compiled for one shape."""
    torch._dynamo.reset()
    compiled = torch.compile(plain_formula, fullgraph=True, dynamic=False)

    def function(step: Step, residual: torch.Tensor | None) -> torch.Tensor:
        assert residual is None
        y: torch.Tensor = compiled(
            step.x, step.weight, step.bias, step.running_mean, step.running_var, step.momentum, step.eps
        )
        return y

    return Scheme(name=COMPILED, function=function)


def plain_formula(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    momentum: float,
    eps: float,
) -> torch.Tensor:
    """Batch norm as a textbook writes it, in float32."""
    shape = (1, -1, *[1] * (x.dim() - 2))
    n = x.numel() // x.size(1)
    values = x.float()
    var, mean = torch.var_mean(values, [0, *range(2, x.dim())], correction=0)
    with torch.no_grad():
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * (n / (n - 1)), momentum)
    y = (values - mean.view(shape)) * torch.rsqrt(var + eps).view(shape) * weight.view(shape) + bias.view(shape)
    return y.to(x.dtype)


def torch_sync_function(step: Step) -> torch.Tensor:
    """The autograd function of `torch.nn.SyncBatchNorm`, for a group of one rank."""
    x, weight, bias, running_mean, running_var, momentum, eps, group = step
    y: torch.Tensor = SyncBatchNorm.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, running_mean, running_var, eps, momentum, group, 1
    )
    return y


@contextmanager
def with_peers() -> Iterator[None]:
    """Has our layer take any group for one with peers."""
    resolve_group = functional.resolve_group  # type: ignore[attr-defined]
    functional.resolve_group = lambda group: group  # type: ignore[attr-defined,assignment,return-value]
    try:
        yield
    finally:
        functional.resolve_group = resolve_group  # type: ignore[attr-defined]


class _Alone:
    """In place of a process group, where `collectives_of_one_rank` takes the place of collectives."""

    def _get_backend_name(self) -> str:
        return "alone"


@contextmanager
def collectives_of_one_rank() -> Iterator[None]:
    """Turns a gather into a copy, and a reduction into nothing."""

    def gather(output: torch.Tensor, input: torch.Tensor, *_: object, **__: object) -> None:
        output.view(-1).copy_(input)

    def reduce(*_: object, **__: object) -> None:
        pass

    with _replaced({name: reduce if name == "all_reduce" else gather for name in _COLLECTIVES}):
        yield


@contextmanager
def counted_collectives() -> Iterator[list[str]]:
    """Yields the names of the collectives that are called meanwhile, whatever they call themselves left out."""
    called: list[str] = []
    depth = [0]

    def counted(name: str, original: Callable[..., object]) -> Callable[..., object]:
        def collective(*arguments: object, **keywords: object) -> object:
            if depth[0] == 0:
                called.append(name)
            depth[0] += 1
            try:
                return original(*arguments, **keywords)
            finally:
                depth[0] -= 1

        return collective

    names = [name for name in _COLLECTIVES if hasattr(dist, name)]
    with _replaced({name: counted(name, getattr(dist, name)) for name in names}):
        yield called


@contextmanager
def _replaced(functions: dict[str, Callable[..., object]]) -> Iterator[None]:
    """Those of torch.distributed that this torch has, by other functions."""
    originals = {name: getattr(dist, name) for name in functions if hasattr(dist, name)}
    try:
        for name in originals:
            setattr(dist, name, functions[name])
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


class Truth(NamedTuple):
    """What a batch has to give, in float64 (Ioffe & Szegedy 2015, Algorithm 1 and section 3); parameters' are (C,)."""

    mean: torch.Tensor
    var: torch.Tensor
    y: torch.Tensor
    dx: torch.Tensor
    grad_weight: torch.Tensor
    grad_bias: torch.Tensor
    grad_residual: torch.Tensor | None


def truth(
    x: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor | None = None
) -> Truth:
    """Of the layer, or of the block where a residual is given."""
    x, dy, weight, bias = x.double(), dy.double(), weight.double(), bias.double()
    dims, shape = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
    n = x.numel() // x.size(1)
    mean = x.mean(dims)
    centered = x - mean.view(shape)
    var = centered.square().mean(dims)
    invstd = (var + EPS).rsqrt()
    xhat = centered * invstd.view(shape)
    y = xhat * weight.view(shape) + bias.view(shape)
    if residual is not None:
        y = (y + residual.double()).relu()
        dy = torch.where(y > 0, dy, 0)
    grad_bias, grad_weight = dy.sum(dims), (dy * xhat).sum(dims)
    dx = dy - (grad_bias / n).view(shape) - xhat * (grad_weight / n).view(shape)
    dx *= (weight * invstd).view(shape)
    return Truth(mean, var, y, dx, grad_weight, grad_bias, None if residual is None else dy)


def errors(call: Call) -> dict[str, float]:
    """Runs a call and compares everything it returns and updates with float64: ‖result − truth‖ / ‖truth‖.

    The running statistics are set to 0 before. Memory that the results may be put in holds NaN before.
    """
    step, dy = call.step, call.dy
    x, weight, bias = (tensor.detach() for tensor in step[:3])
    residual = None if call.residual is None else call.residual.detach()
    step.running_mean.zero_()
    step.running_var.zero_()
    _poison(x, 4)
    with call.scheme.context():
        y, *gradients = (tensor.detach() for tensor in call.both())
    n = x.numel() // x.size(1)
    squares: dict[str, list[torch.Tensor]] = {}
    chunk = max(1, _CHUNK_VALUES // n)
    for first in range(0, x.size(1), chunk):
        of = slice(first, first + chunk)
        right = truth(x[:, of], dy[:, of], weight[of], bias[of], None if residual is None else residual[:, of])
        results = {
            "y": (y[:, of], right.y),
            "dx": (gradients[0][:, of], right.dx),
            "grad_weight": (gradients[1][of], right.grad_weight),
            "grad_bias": (gradients[2][of], right.grad_bias),
            "running_mean": (step.running_mean[of], right.mean * step.momentum),
            "running_var": (step.running_var[of], right.var * (n / (n - 1)) * step.momentum),
        }
        if right.grad_residual is not None:
            results["grad_residual"] = (gradients[3][:, of], right.grad_residual)
        for name, (result, true) in results.items():
            sums = torch.stack([(result.double() - true).square().sum(), true.square().sum()])
            squares.setdefault(name, []).append(sums)
    totals = {name: torch.stack(sums).sum(0).tolist() for name, sums in squares.items()}
    return {name: math.sqrt(wrong / right) if right else math.inf for name, (wrong, right) in totals.items()}


def _poison(x: torch.Tensor, num_tensors: int) -> None:
    """Leaves NaN in memory that the allocator is going to hand out next."""
    _freed = [torch.full_like(x, math.nan) for _ in range(num_tensors)]


def tolerance(dtype: torch.dtype, name: str, *, is_block: bool) -> float:
    """The largest error that passes: rounding of the result, and of float32 sums.

    bfloat16 keeps 8 bits, so rounding to it moves a value by up to 2⁻⁸ of it. ReLU's gradient is on or off where
    rounding moves an argument over zero: values within 1e-7 of it, of which each counts in full.
    """
    is_rounded = name in ("y", "dx", "grad_residual") and dtype != torch.float32
    if is_block:
        return 1e-2 if is_rounded else 1e-3
    return 4e-3 if is_rounded else 1e-5
