"""The random numbers that code of a user's draws from generators which all of a process shares."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch


class RandomState(NamedTuple):
    """Of Python's, NumPy's and torch's generators, the last on the CPU."""

    python: tuple[Any, ...]
    numpy: Any
    torch: torch.Tensor

    @classmethod
    def capture(cls) -> "RandomState":
        """Return the present state."""
        return cls(random.getstate(), np.random.get_state(), torch.default_generator.get_state())

    def restore(self) -> None:
        """Go back to it."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.default_generator.set_state(self.torch)


def seed_all(seed: int) -> None:
    """Seed the shared generators with 63 bits."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)
    torch.default_generator.manual_seed(
        seed
    )  # torch.manual_seed would go on to the GPUs, which a worker must not touch


@contextmanager
def randomness_kept() -> Iterator[None]:
    """Leave the shared generators as they were, whatever is drawn inside."""
    state = RandomState.capture()
    try:
        yield
    finally:
        state.restore()
