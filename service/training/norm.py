"""Makes a model's batch norms what a specification says, and tells them which ranks normalize together."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from service.domain.batch_plan import BatchPlan
from service.domain.spec import NormSpec
from service.training.errors import BadFactory
from service.training.world import World
from syncbn import DeferredStatistics, SyncBatchNorm, convert_sync_batchnorm, freeze
from syncbn.errors import ConversionError

GROUP_SIZE = 16
"""Channels of a group, as Wu & He (2018, table 3) found best where it is fixed."""


def configure_norm(model: nn.Module, norm: NormSpec) -> nn.Module:
    """Make a model's batch norms what the specification says, in place; names and values of its parameters stay.

    Returns:
        The model; another object only where it is itself a batch norm.

    Raises:
        BadFactory: a layer cannot become what is asked for.
    """
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            if norm.momentum is not None:
                layer.momentum = norm.momentum
            if norm.eps is not None:
                layer.eps = norm.eps
    if norm.kind in ("local", "group", "none"):
        for path, layer in model.named_modules():
            if isinstance(layer, _BatchNorm):
                _check_replaceable(path, layer, norm.kind)
    if norm.kind == "local":
        return _replaced(model, _local)
    if norm.kind == "group":
        return _replaced(model, lambda layer: _group_norm(layer, norm.group_size or GROUP_SIZE))
    if norm.kind == "none":
        return _replaced(model, lambda layer: _Affine(layer) if layer.affine else nn.Identity())
    try:
        convert_sync_batchnorm(model, skip_nonfinite=norm.skip_nonfinite)
        return freeze(model, parameters=False) if norm.kind == "frozen" else model
    except ConversionError as error:
        raise BadFactory(f"model: its batch norms cannot be norm.kind: {norm.kind}. {error}") from error


_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, SyncBatchNorm)
"""What is a batch norm and nothing else; subclasses add something."""


class NormalizationGroups:
    """Lets a model's SyncBatchNorm layers normalize the batches of a plan, whichever ranks they lie on.

    Where a mini-batch holds several normalization batches, their statistics are folded into the running ones at the
    end of the step, in sample order: which of them ran at once, and where, does not show.

    Args:
        model: its layers are converted already.
        world: the ranks.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        self._model = model
        self._world = world
        self._layers = [layer for layer in model.modules() if isinstance(layer, SyncBatchNorm)]
        self._plan: BatchPlan | None = None
        self._deferred: DeferredStatistics | None = None

    def prepare(self, plan: BatchPlan) -> None:
        """Make the process groups of a plan; all ranks call it together, before the plan is followed."""
        self._world.make_groups(plan)

    def follow(self, plan: BatchPlan) -> None:
        """Normalize as a plan says from now on."""
        if plan == self._plan:
            return
        self._plan = plan
        if self._deferred is not None:
            self._deferred.close()
            self._deferred = None
        for layer in self._layers:
            layer.process_group = self._world.group_of(plan)
        if plan.num_normalization_batches > 1:
            self._deferred = DeferredStatistics(self._model, self._world.group)

    def batch(self, index: int) -> AbstractContextManager[None]:
        """Return the context for the forward of one normalization batch of the mini-batch."""
        return nullcontext() if self._deferred is None else self._deferred.batch(index)

    def commit(self) -> None:
        """Fold the step's statistics in; all ranks call it together."""
        if self._deferred is not None:
            self._deferred.commit()

    def discard(self) -> None:
        """Forget the step's statistics, where they are not folded in yet."""
        if self._deferred is not None:
            self._deferred.discard()


def has_batch_norm(model: nn.Module) -> bool:
    """Tell whether a model has a batch norm, of torch.nn or converted."""
    return any(isinstance(layer, _BatchNorm) for layer in model.modules())


class _LocalBatchNorm(_BatchNorm):
    """Batch norm over this rank's samples alone, (N, C, *) to the same: what was synchronized tells no dimension."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        pass


class _Affine(nn.Module):
    """What is left of a batch norm that normalizes nothing: γ and, where it has one, β.

    Args:
        layer: the batch norm; its parameters are taken over.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Scale and shift each channel, (N, C, *) to the same."""
        shape = (1, -1, *(1 for _ in inputs.shape[2:]))
        scaled = inputs * self.weight.view(shape)
        return scaled if self.bias is None else scaled + self.bias.view(shape)


def _check_replaceable(path: str, layer: _BatchNorm, kind: str) -> None:
    """Raise ``BadFactory`` where another layer in its place would drop what a batch norm does beside normalizing."""
    if kind == "local" and not isinstance(layer, nn.SyncBatchNorm | SyncBatchNorm):
        return  # it stays
    is_plain = type(layer) in _PLAIN
    if isinstance(layer, SyncBatchNorm):
        is_plain = is_plain and not (layer.activation or layer.ghost_size or layer.renormalization)
    if not is_plain:
        raise BadFactory(
            f"model: {path or 'the model itself'} is a {type(layer).__name__}, which may do more than a batch norm of "
            f"torch.nn, and norm.kind: {kind} would drop that. Build the model with torch.nn.BatchNorm1d, 2d or 3d and "
            "a module for the rest, or choose norm.kind: sync."
        )


def _local(layer: _BatchNorm) -> nn.Module:
    if not isinstance(layer, nn.SyncBatchNorm | SyncBatchNorm):
        return layer
    norm = _LocalBatchNorm(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(norm, name, getattr(layer, name))
    return norm.train(layer.training)


def _group_norm(layer: _BatchNorm, group_size: int) -> nn.Module:
    channels = layer.num_features
    if channels % group_size:
        # As close as whole groups allow: 24 channels make two groups of 12 rather than one and a half of 16.
        sizes = [size for size in range(1, channels + 1) if channels % size == 0]
        group_size = min(sizes, key=lambda size: abs(size - group_size))
    norm = nn.GroupNorm(channels // group_size, channels, eps=layer.eps, affine=layer.affine)
    if layer.affine:
        norm.weight, norm.bias = layer.weight, layer.bias
    return norm


def _replaced(model: nn.Module, replace: Callable[[_BatchNorm], nn.Module]) -> nn.Module:
    if isinstance(model, _BatchNorm):
        return replace(model)
    made: dict[nn.Module, nn.Module] = {}  # a layer that is used in several places stays one
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, _BatchNorm):
                if child not in made:
                    made[child] = replace(child)
                setattr(parent, name, made[child])
    return model
