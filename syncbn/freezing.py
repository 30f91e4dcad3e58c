from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.errors import ConversionError
from syncbn.module import SyncBatchNorm

M = TypeVar("M", bound=nn.Module)


class _BeforeFreezing(NamedTuple):
    training: bool
    requires_grad: dict[str, bool]  # of the parameters that `freeze` took it from


def freeze(module: M, *, parameters: bool = True) -> M:
    """Lets every SyncBatchNorm of a model normalize with its running statistics from now on, in place.

    A frozen layer stays in evaluation mode, whatever `train()` the model is told: it communicates nothing, and its
    running statistics stay as they are. That is how detection and other fine-tuning usually treats a pretrained
    backbone. `unfreeze` undoes it; freezing twice is the same as once.

    Args:
        module: The model, a part of it, or a single layer.
        parameters: Whether γ and β stop requiring a gradient, too. An optimizer made before still holds them; it
            leaves parameters without gradient as they are. DistributedDataParallel has to be made afterwards.

    Returns:
        `module` itself.

    Raises:
        ConversionError: If it holds batch norms of torch.nn, or layers without running statistics. The model is then
            left unchanged.
    """
    layers = []
    for path, layer in _batch_norms(module):
        if not isinstance(layer, SyncBatchNorm):
            raise ConversionError(
                f"{path}: {type(layer).__name__} cannot be frozen; call convert_sync_batchnorm on the model first"
            )
        if layer.running_mean is None:
            raise ConversionError(
                f"{path}: has no running statistics to normalize with when frozen; build it with "
                "track_running_stats=True, or freeze the other parts of the model alone"
            )
        layers.append(layer)
    for layer in layers:
        before = vars(layer).setdefault("_before_freezing", _BeforeFreezing(layer.training, {}))
        layer.frozen = True
        layer.eval()
        if parameters:
            for name, parameter in layer.named_parameters(recurse=False):
                before.requires_grad.setdefault(name, parameter.requires_grad)
                parameter.requires_grad_(False)
    return module


def unfreeze(module: M) -> M:
    """Undoes `freeze`, in place.

    Parameters get back the requires_grad that they had before. A layer takes the training mode of the module that it
    belongs to, or the one it had if it is `module` itself.

    Args:
        module: The model, a part of it, or a single layer; layers that are not frozen are left alone.

    Returns:
        `module` itself.
    """
    parents = {child: parent for parent in module.modules() for child in parent.children()}
    for _, layer in _batch_norms(module):
        if not (isinstance(layer, SyncBatchNorm) and layer.frozen):
            continue
        before = vars(layer).pop("_before_freezing", _BeforeFreezing(layer.training, {}))
        vars(layer).pop("frozen")
        layer.train(parents[layer].training if layer in parents else before.training)
        for name, requires_grad in before.requires_grad.items():
            layer.get_parameter(name).requires_grad_(requires_grad)
    return module


def _batch_norms(module: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    for path, layer in module.named_modules():
        if isinstance(layer, _BatchNorm):
            yield path or "the module itself", layer
