"""Tests that need a GPU: `pytest tests/gpu` on a machine that has one. They are no part of the suite.

Warnings are shown, not errors, as far as a test runs: torch and Triton may be other versions than the pinned ones. With
those, collecting may warn as well: `pytest tests/gpu -W default`.
"""

from collections.abc import Iterator

import pytest
import torch

from syncbn.kernels import backend_for


@pytest.fixture(autouse=True)
def gpu() -> Iterator[torch.device]:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    assert backend_for(torch.empty(0, device=device)).__name__ == "syncbn.kernels.triton.backend"
    yield device
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
