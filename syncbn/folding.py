from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TypeAlias, TypeVar

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from syncbn.errors import ConversionError
from syncbn.module import SyncBatchNorm

M = TypeVar("M", bound=nn.Module)


def fold_batchnorm(module: M, *, pairs: Iterable[tuple[str, str]] | None = None) -> M:
    """Makes a copy for inference, where each batch norm that follows a convolution or linear layer is part of it.

    With the running statistics fixed, γ(Wx + b − μ)/σ + β is again a convolution, with the weight γ/σ · W and the
    bias γ(b − μ)/σ + β (Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", section 3.2). They are computed in float64 and rounded once.

    Folded are layers of this package and of torch.nn, frozen or not, behind `torch.nn.Conv1d/2d/3d`,
    `ConvTranspose1d/2d/3d` and `Linear` (whose output has to have shape (N, C)). In the copy an `nn.Identity` takes
    the batch norm's place, or its activation. Left alone is what folding would change: a batch norm without running
    statistics, with a forward of its own, with hooks, or called with a residual or a mask; a convolution whose output
    or weight something else uses as well, that is called more than once, is parametrized, or has hooks.

    There is no way back: keep the model itself for training.

    Args:
        module: The model; it stays as it is.
        pairs: Paths of each convolution and the batch norm behind it, as `[("conv1", "bn1"), …]`. None to find them
            with torch.fx, for which the model's forward has to be traceable; otherwise nothing is traced, and that
            the one's output goes to the other, and nowhere else, is for the caller to know.

    Returns:
        A deep copy, in evaluation mode.

    Raises:
        ConversionError: If the model cannot be traced and `pairs` is not given, or if a pair cannot be folded.
    """
    folded = copy.deepcopy(module).eval()
    found = list(_find(folded) if pairs is None else _look_up(folded, pairs))
    for linear_map, batch_norm in found:
        _fold(linear_map, batch_norm)
        _replace(folded, batch_norm, _what_remains(batch_norm))
    return folded


LinearMap: TypeAlias = _ConvNd | nn.Linear
_LINEAR_MAPS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


class _Tracer(fx.Tracer):
    """Sees a batch norm as one step, whoever wrote it."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _find(module: nn.Module) -> Iterator[tuple[LinearMap, _BatchNorm]]:
    if isinstance(module, DistributedDataParallel):
        raise ConversionError("module: is a DistributedDataParallel; fold the model inside it (module.module)")
    try:
        nodes = list(_Tracer().trace(module).nodes)
    except Exception as error:  # whatever the model's own code does when it meets a proxy
        raise ConversionError(
            f"module: torch.fx cannot trace it ({type(error).__name__}: {error}); say which layers belong together: "
            'pairs=[("conv1", "bn1"), …]'
        ) from error
    called = {node: module.get_submodule(str(node.target)) for node in nodes if node.op == "call_module"}
    num_calls = Counter(called.values())
    # Besides calls, forward may use a parameter of a layer directly.
    tensors = {_attribute(module, str(node.target)) for node in nodes if node.op == "get_attr"}
    for node, batch_norm in called.items():
        # A residual, a mask, or an argument that only the layer's own forward knows.
        if len(node.all_input_nodes) != 1 or len(node.args) + len(node.kwargs) != 1:
            continue
        producer = node.all_input_nodes[0]
        linear_map = called.get(producer)
        if (
            linear_map is not None
            and len(producer.users) == 1
            and num_calls[linear_map] == num_calls[batch_norm] == 1
            and tensors.isdisjoint((*linear_map.parameters(), *batch_norm.parameters(), *batch_norm.buffers()))
            and _obstacle(linear_map, batch_norm) is None
        ):
            assert isinstance(linear_map, LinearMap)
            assert isinstance(batch_norm, _BatchNorm)
            yield linear_map, batch_norm


def _look_up(module: nn.Module, pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[LinearMap, _BatchNorm]]:
    modules = dict(module.named_modules(remove_duplicate=False))
    seen: set[nn.Module] = set()
    for pair in pairs:
        for path in pair:
            if path not in modules:
                raise ConversionError(f"pairs: the model has no module {path!r}; named_modules() lists the paths")
            if modules[path] in seen:
                raise ConversionError(f"pairs: {path} occurs in more than one; only one of them can be folded")
            seen.add(modules[path])
        linear_map, batch_norm = modules[pair[0]], modules[pair[1]]
        obstacle = _obstacle(linear_map, batch_norm)
        if obstacle is not None:
            raise ConversionError(f"pairs: {pair[0]} and {pair[1]} cannot be folded: {obstacle}; leave the pair out")
        assert isinstance(linear_map, LinearMap)
        assert isinstance(batch_norm, _BatchNorm)
        yield linear_map, batch_norm


def _obstacle(linear_map: nn.Module, batch_norm: nn.Module) -> str | None:
    """Why the two cannot be one layer; None where they can."""
    kind, norm_kind = type(linear_map).__name__, type(batch_norm).__name__
    if not isinstance(linear_map, _LINEAR_MAPS):
        return f"a {kind} is neither a convolution nor linear"
    if not isinstance(batch_norm, _BatchNorm):
        return f"a {norm_kind} is not a batch norm"
    if parametrize.is_parametrized(linear_map) or parametrize.is_parametrized(batch_norm):
        return "a parametrized weight is computed anew in each call (remove_parametrizations makes it one that stays)"
    if not any(type(linear_map).forward is each.forward for each in _LINEAR_MAPS) or "forward" in vars(linear_map):
        return f"the {kind} has a forward of its own"
    norms = (SyncBatchNorm, _BatchNorm, nn.SyncBatchNorm)
    if not any(type(batch_norm).forward is each.forward for each in norms) or "forward" in vars(batch_norm):
        return f"the {norm_kind} has a forward of its own"
    if any(each._forward_hooks or each._forward_pre_hooks for each in (linear_map, batch_norm)):
        return "a forward hook would see, or change, something else"
    if batch_norm.running_mean is None or batch_norm.running_var is None:
        return "the batch norm has no running statistics"
    num_outputs = linear_map.out_features if isinstance(linear_map, nn.Linear) else linear_map.out_channels
    if num_outputs != batch_norm.num_features:
        return f"the {kind} has {num_outputs} outputs, the batch norm {batch_norm.num_features} channels"
    # Of (N, L, C) a linear layer maps the last dimension, batch norm normalizes the second.
    if isinstance(linear_map, nn.Linear) and isinstance(batch_norm, SyncBatchNorm) and batch_norm._input_dims - {2}:
        return "the channels of batch norm are not the outputs of a linear layer where those are not of shape (N, C)"
    return None


def _fold(linear_map: LinearMap, batch_norm: _BatchNorm) -> None:
    assert batch_norm.running_mean is not None
    assert batch_norm.running_var is not None
    weight, bias = linear_map.weight, linear_map.bias
    with torch.no_grad():
        scale = (batch_norm.running_var.double() + batch_norm.eps).rsqrt()  # (C,)
        if batch_norm.weight is not None:
            scale = scale * batch_norm.weight.double()
        shift = -batch_norm.running_mean.double() if bias is None else bias.double() - batch_norm.running_mean.double()
        shift = shift * scale
        if batch_norm.bias is not None:
            shift = shift + batch_norm.bias.double()
        # Not torch.nn.utils.fusion, which rounds at each step and takes the channels of a grouped transposed
        # convolution for those of one group.
        if isinstance(linear_map, _ConvTransposeNd):
            groups = linear_map.groups  # weight: (C_in, C/groups, *)
            grouped = weight.double().reshape(groups, -1, *weight.shape[1:])
            factor = scale.view(groups, 1, -1, *[1] * (weight.dim() - 2))
            scaled = (grouped * factor).flatten(0, 1)
        else:
            scaled = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))  # (C, C_in/groups, *)
    linear_map.weight = nn.Parameter(scaled.to(weight.dtype), requires_grad=weight.requires_grad)
    requires_grad = weight.requires_grad if bias is None else bias.requires_grad
    linear_map.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=requires_grad)


def _what_remains(batch_norm: _BatchNorm) -> nn.Module:
    activation = batch_norm.activation if isinstance(batch_norm, SyncBatchNorm) else None
    remains: nn.Module = nn.Identity()
    if activation == "relu":
        remains = nn.ReLU()
    elif activation == "leaky_relu":
        assert isinstance(batch_norm, SyncBatchNorm)
        remains = nn.LeakyReLU(batch_norm.negative_slope)
    elif activation == "silu":
        remains = nn.SiLU()
    return remains.eval()


def _replace(module: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)


def _attribute(module: nn.Module, path: str) -> object:
    value: object = module
    for name in path.split("."):
        value = getattr(value, name)
    return value
