"""Activations computed again in the backward instead of being kept."""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_activations(model: nn.Module) -> None:
    """Let the parts that a model runs one after another keep only their inputs (Chen et al. 2016), in place.

    Parts are the members of its outermost ``nn.Sequential`` and ``nn.ModuleList`` with layers of their own inside; a
    model without any is one part. Names of parameters stay. SyncBatchNorm and dropout notice the second forward.

    Args:
        model: its modules stay the same objects.
    """
    parts = _parts(model)
    for part in parts or [model]:
        part.forward = MethodType(_checkpointed(part.forward), part)


def _parts(module: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(module, nn.Sequential | nn.ModuleList) and any(True for _ in child.children()):
            found.append(child)
        else:
            found += _parts(child)
    return found


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    # A copy of the model has to compute with its own weights, so nothing here is bound to the original.
    function = forward.__func__ if isinstance(forward, MethodType) else None

    def checkpointed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever forward takes
        compute = forward if function is None else MethodType(function, self)
        if not (self.training and torch.is_grad_enabled()):
            return compute(*args, **kwargs)
        return checkpoint(compute, *args, use_reentrant=False, **kwargs)

    return checkpointed
