from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from syncbn.errors import ArgumentError, ConversionError
from syncbn.groups import LOCAL, as_process_group
from syncbn.identity import new_identity
from syncbn.module import SyncBatchNorm

if TYPE_CHECKING:
    from syncbn.groups import Group

M = TypeVar("M", bound=nn.Module)


def convert_sync_batchnorm(module: M, process_group: Group = None, *, skip_nonfinite: bool = False) -> M:
    """Turns every batch norm of a model into SyncBatchNorm, in place.

    The layers stay the same objects and only change their class, so parameters, buffers, hooks, flags, dtypes,
    devices and every reference to a layer are kept. Converted are `torch.nn.BatchNorm1d/2d/3d`, their subclasses, and
    `torch.nn.SyncBatchNorm`; instance norm is left alone. A model that is refused is left unchanged.

    A subclass keeps what it adds, a forward of its own included, as long as that goes through `super().forward(…)`:
    its layers become instances of a class that derives from it and from SyncBatchNorm, in this order. A call in
    training that nevertheless did not reach SyncBatchNorm raises ConversionError, after its forward.

    Each layer's `name`, by which errors call it, becomes its path in the model, unless it has one.

    Args:
        module: The model, or a single layer.
        process_group: Group to synchronize over, or a one-dimensional DeviceMesh, or "local" for each rank alone.
            None keeps the group of layers that have one; the others use the default group.
        skip_nonfinite: Whether to set `skip_nonfinite` on every layer; False leaves it as it is.

    Returns:
        `module` itself.

    Raises:
        ConversionError: If a batch norm is lazy and not yet initialized, is parametrized, derives from
            `torch.nn.SyncBatchNorm`, has a forward of its own that does not go through super(), or an attribute of a
            name that SyncBatchNorm uses.
        ArgumentError: If `process_group` is not a group.
    """
    if isinstance(process_group, str) and process_group != LOCAL:
        raise ArgumentError(f'process_group: expected a group, "local" or None, got {process_group!r}')
    if process_group is not None and process_group != LOCAL:
        as_process_group(process_group)
    layers = list(_layers(module))
    for path, layer in layers:
        _check_convertible(path or _ROOT, layer)
    for path, layer in layers:
        if not isinstance(layer, SyncBatchNorm):
            _convert(layer)
        facts = vars(layer)
        if path and ("name" not in facts or "_name_is_path" in facts):
            facts["name"], facts["_name_is_path"] = path, True
        if process_group is not None:
            facts["process_group"] = process_group
        if skip_nonfinite:
            assert isinstance(layer, SyncBatchNorm)
            layer.skip_nonfinite = True
    return module


def revert_sync_batchnorm(module: M) -> M:
    """Turns every SyncBatchNorm of this package back into the class it came from, in place.

    It undoes `convert_sync_batchnorm`. A layer that was built as SyncBatchNorm becomes the `torch.nn.BatchNorm1d`,
    `BatchNorm2d` or `BatchNorm3d` that takes the inputs it has seen. A `torch.nn.SyncBatchNorm` keeps its group, also
    one that it was given meanwhile. A model that is refused is left unchanged.

    That a layer was frozen is forgotten, since torch.nn knows no such thing: it stays in evaluation mode, and its
    parameters without gradient, until `train()` and `requires_grad_()` change that. Likewise `skip_nonfinite`, with
    its counter.

    Args:
        module: The model, or a single layer.

    Returns:
        `module` itself.

    Raises:
        ConversionError: If a layer that was built as SyncBatchNorm has seen no input yet, or inputs that no single
            class takes; if it is of a subclass; if it has options that torch.nn does not have: an activation, ghost
            batches or renormalization; or if something that watches it is attached.
    """
    targets: list[tuple[SyncBatchNorm, type[_BatchNorm]]] = [
        (layer, _target(path or _ROOT, layer)) for path, layer in _layers(module) if isinstance(layer, SyncBatchNorm)
    ]
    for layer, target in targets:
        layer.skip_nonfinite = False
        kept = _shared_attributes(target, vars(layer))
        if "process_group" in kept and layer.process_group is not None:
            assert layer.process_group != LOCAL
            layer.process_group = as_process_group(layer.process_group)
        for attribute in (_OWN_ATTRIBUTES | _FACTS) - kept:
            vars(layer).pop(attribute, None)
        layer.__class__ = target  # type: ignore[assignment]  # the class it was an instance of before
    return module


class _Made(SyncBatchNorm):
    """Comes before a subclass of torch.nn's batch norm, and sees to it that instances pickle."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:  # noqa: ANN401  # as object has it
        return _blank, (_original(self),), self.__getstate__()


class _Watched(_Made):
    """Sees to it, too, that the forward of such a subclass reaches SyncBatchNorm's."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401  # the subclass's own arguments
        """Calls the subclass's forward, and raises ConversionError if that trained without synchronizing."""
        self._reached = False
        output = super().forward(*args, **kwargs)
        if not self._reached and (self.training or self.running_mean is None):
            raise ConversionError(
                f"{self.name}: the forward of {_original(self).__name__} did not call super().forward(…), so that it "
                "normalized with this rank's batch alone; let it call super().forward(…) whenever it trains, or "
                "replace it with a plain batch norm and a module for the rest"
            )
        return output


class _Reached(SyncBatchNorm):
    """Comes between such a subclass and SyncBatchNorm, to be seen."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401  # as above
        """Normalizes, and leaves word of it."""
        self._reached = True
        return super().forward(*args, **kwargs)


def _synchronized(original: type[_BatchNorm]) -> type[_BatchNorm]:
    """The class whose `super().forward`, seen from the original, is that of SyncBatchNorm; made once."""
    if original not in _made:
        metaclass: Any = type(original)
        keeps_forward = original.forward is _BatchNorm.forward
        _made[original] = metaclass(
            f"Sync{original.__name__}",
            (_Made, original, SyncBatchNorm) if keeps_forward else (_Watched, original, _Reached),
            {"__module__": original.__module__, "__doc__": original.__doc__, "_origin": original},
        )
    return _made[original]


_made: dict[type[_BatchNorm], type[_BatchNorm]] = {}


def _blank(original: type[_BatchNorm]) -> _BatchNorm:
    """What unpickling fills in; the class itself cannot be found by its name."""
    made = _synchronized(original)
    return made.__new__(made)


def _original(layer: SyncBatchNorm) -> type[_BatchNorm]:
    assert layer._origin is not None
    return layer._origin


_ROOT = "the module itself"
_TORCH_CLASSES = frozenset((*_BatchNorm.__mro__, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm))
# What SyncBatchNorm adds to torch.nn's batch norm.
_OWN_ATTRIBUTES = frozenset(
    name
    for name in (*vars(SyncBatchNorm), *inspect.get_annotations(SyncBatchNorm))
    if not (name.startswith("__") or hasattr(_BatchNorm, name))
)
# What this package notes down in the __dict__ of a layer.
_FACTS = frozenset(("_name_is_path", "_reached", "_before_freezing"))
_CLASS_OF_INPUT_DIM: dict[int, type[_BatchNorm]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}


def _layers(module: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    for path, layer in module.named_modules():
        if isinstance(layer, _BatchNorm):
            yield path, layer


def _convert(layer: _BatchNorm) -> None:
    original = type(layer)
    # DDP refuses instances of torch.nn.SyncBatchNorm on CPU, so that nothing may derive from it.
    if original in _TORCH_CLASSES or issubclass(original, nn.SyncBatchNorm):
        vars(layer)["_origin"] = original
        layer.__class__ = SyncBatchNorm
    else:
        layer.__class__ = _synchronized(original)
    assert isinstance(layer, SyncBatchNorm)
    layer._identity = new_identity(layer)


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
    if isinstance(layer, nn.SyncBatchNorm) and _own_classes(layer):
        raise ConversionError(
            f"{path}: {name} derives from torch.nn.SyncBatchNorm, which DDP refuses on CPU whatever it does; derive it "
            "from torch.nn.BatchNorm2d or the like, or replace it with a plain batch norm and a module for the rest"
        )
    if "forward" in vars(layer) or not all(_delegates(klass) for klass in _own_classes(layer)):
        raise ConversionError(
            f"{path}: {name} has a forward of its own, which does not leave the normalization to super().forward(…); "
            "let it do that, or replace it with a plain batch norm and a module for the rest"
        )
    taken = (_attributes(layer) & _OWN_ATTRIBUTES) - _shared_attributes(type(layer), vars(layer))
    if taken:
        attribute = min(taken)
        raise ConversionError(
            f"{path}: {name} has an attribute {attribute!r}, which in SyncBatchNorm means something else; rename it"
        )


def _own_classes(layer: _BatchNorm) -> list[type]:
    return [klass for klass in type(layer).__mro__ if klass not in _TORCH_CLASSES]


def _delegates(klass: type) -> bool:
    """Whether `klass` leaves normalizing to the classes after it, as far as its code tells."""
    forward = vars(klass).get("forward")
    if forward is None:
        return True
    if not hasattr(inspect.unwrap(forward), "__code__"):
        return True  # there is nothing to read; a call that does not synchronize will raise
    codes = [function.__code__ for function in map(inspect.unwrap, _functions(klass)) if hasattr(function, "__code__")]
    names = [_names(code) for code in codes]
    normalizes = any(own & {"batch_norm", "native_batch_norm"} for own in names)
    return not normalizes and any(own >= {"super", "forward"} for own in names)


def _functions(klass: type) -> Iterator[Any]:
    return (value for value in vars(klass).values() if callable(value) and not isinstance(value, type))


def _names(code: CodeType) -> set[str]:
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


def _attributes(layer: _BatchNorm) -> frozenset[str]:
    instance = (vars(layer), layer._parameters, layer._buffers, layer._modules)
    return frozenset(name for names in (*instance, *map(vars, _own_classes(layer))) for name in names)


def _shared_attributes(original: type[_BatchNorm], facts: dict[str, Any]) -> frozenset[str]:
    """The attributes that a layer of the original class has, or had, and that mean the same in SyncBatchNorm."""
    shared = set()
    if issubclass(original, nn.SyncBatchNorm):
        shared.add("process_group")
    if isinstance(facts.get("name"), str) and "_name_is_path" not in facts:
        shared.add("name")
    return frozenset(shared)


def _target(path: str, layer: SyncBatchNorm) -> type[_BatchNorm]:
    options = [option for option in ("activation", "ghost_size", "renormalization") if getattr(layer, option)]
    if options:
        raise ConversionError(
            f"{path}: has {' and '.join(options)}, which torch.nn's batch norm has not, so that reverting would change "
            f"what it computes; set it to None (layer.{options[0]} = None) and put what replaces it into the model"
        )
    if layer._collector is not None or layer._probe is not None:
        raise ConversionError(
            f"{path}: a DeferredStatistics or a StatisticsMonitor is attached to it; close that first (close())"
        )
    if layer._origin is not None and issubclass(layer._origin, nn.SyncBatchNorm) and layer.process_group == LOCAL:
        raise ConversionError(
            f'{path}: was a torch.nn.SyncBatchNorm, which does not know process_group="local"; set another group first'
        )
    if layer._origin is not None:
        return layer._origin
    if type(layer) is not SyncBatchNorm:
        raise ConversionError(
            f"{path}: {type(layer).__name__} was derived from SyncBatchNorm and has no counterpart in torch.nn; "
            "derive it from torch.nn.BatchNorm2d or the like and convert the model"
        )
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
