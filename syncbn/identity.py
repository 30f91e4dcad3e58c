"""How a traced graph refers to a layer: by a number in a tensor, so that layers of one kind share one graph.

A name or an object in the graph would be a constant, and torch.compile would compile each block of a model again.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Protocol
from weakref import WeakValueDictionary

import torch

if TYPE_CHECKING:
    from syncbn.tracking import Collector


class Layer(Protocol):
    """What operators look up of a layer when they run.

    Attributes:
        name: For errors.
    """

    name: str
    _collector: Collector | None


def new_identity(layer: Layer) -> torch.Tensor:
    """Enters a layer in the register, as long as it lives.

    Returns:
        Shape (), int64, on the CPU.
    """
    number = next(_numbers)
    _layers[number] = layer
    return torch.tensor(number, device="cpu")


def layer_of(identity: torch.Tensor) -> Layer:
    """The layer that `new_identity` gave this to."""
    return _layers[int(identity)]


_numbers = itertools.count()
_layers: WeakValueDictionary[int, Layer] = WeakValueDictionary()
