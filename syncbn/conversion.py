from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from syncbn.errors import ConversionError
from syncbn.module import SyncBatchNorm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

M = TypeVar("M", bound=nn.Module)


def convert_sync_batchnorm(module: M, process_group: ProcessGroup | None = None) -> M:
    """Turns every batch norm of a model into SyncBatchNorm, in place.

    The layers stay the same objects and only change their class, so parameters, buffers, hooks, flags, dtypes,
    devices and every reference to a layer are kept. Converted are `torch.nn.BatchNorm1d/2d/3d` with subclasses that
    keep their forward, and `torch.nn.SyncBatchNorm`; instance norm is left alone. A model that is refused is left
    unchanged.

    Args:
        module: The model, or a single layer.
        process_group: Group to synchronize over. None keeps the group of layers that have one; the others use the
            default group.

    Returns:
        `module` itself.

    Raises:
        ConversionError: If a batch norm is lazy and not yet initialized, is parametrized, or has a forward of its own.
    """
    layers = list(_layers(module))
    for path, layer in layers:
        _check_convertible(path, layer)
    for _, layer in layers:
        if not isinstance(layer, SyncBatchNorm):
            vars(layer)["_origin"] = type(layer)
            layer.__class__ = SyncBatchNorm
        if process_group is not None:
            vars(layer)["process_group"] = process_group
    return module


def revert_sync_batchnorm(module: M) -> M:
    """Turns every SyncBatchNorm of this package back into the class it came from, in place.

    It undoes `convert_sync_batchnorm`. A layer that was built as SyncBatchNorm becomes the `torch.nn.BatchNorm1d`,
    `BatchNorm2d` or `BatchNorm3d` that takes the inputs it has seen. A model that is refused is left unchanged.

    Args:
        module: The model, or a single layer.

    Returns:
        `module` itself.

    Raises:
        ConversionError: If a layer that was built as SyncBatchNorm has seen no input yet, or inputs that no single
            class takes.
    """
    targets: list[tuple[_BatchNorm, type[_BatchNorm]]] = [
        (layer, _target(path, layer)) for path, layer in _layers(module) if isinstance(layer, SyncBatchNorm)
    ]
    for layer, target in targets:
        layer.__dict__.pop("_origin", None)
        layer.__dict__.pop("_input_dims", None)
        if not issubclass(target, nn.SyncBatchNorm):
            layer.__dict__.pop("process_group", None)
        layer.__class__ = target
    return module


_CLASS_OF_INPUT_DIM: dict[int, type[_BatchNorm]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}


def _layers(module: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    for path, layer in module.named_modules():
        if isinstance(layer, _BatchNorm):
            yield path or "the module itself", layer


def _check_convertible(path: str, layer: _BatchNorm) -> None:
    if isinstance(layer, SyncBatchNorm):
        return
    name = type(layer).__name__
    if isinstance(layer, LazyModuleMixin):
        raise ConversionError(
            f"{path}: {name} does not know its number of channels yet; run one batch through the model before "
            "converting it"
        )
    if parametrize.is_parametrized(layer):
        raise ConversionError(
            f"{path}: {name} is parametrized; convert the model first, then register the parametrization"
        )
    if type(layer).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward) or "forward" in vars(layer):
        raise ConversionError(
            f"{path}: {name} has a forward of its own, which conversion would drop; replace it with a plain batch norm "
            "and a module for the rest"
        )


def _target(path: str, layer: SyncBatchNorm) -> type[_BatchNorm]:
    if layer._origin is not None:
        return layer._origin
    candidates = {_CLASS_OF_INPUT_DIM.get(dim) for dim in layer._input_dims}
    target = candidates.pop() if len(candidates) == 1 else None
    if target is None:
        seen = ", ".join(f"{dim}-D" for dim in sorted(layer._input_dims)) or "none"
        raise ConversionError(
            f"{path}: built as SyncBatchNorm, so the class to revert to follows from its inputs, and it has seen "
            f"{seen}; run one batch of one kind (2-D to 5-D) through it, or build the model with torch.nn.BatchNorm "
            "and convert it"
        )
    return target
