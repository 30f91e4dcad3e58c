import torch

from syncbn import native
from syncbn.kernels import eager
from syncbn.kernels import native as native_kernels
from syncbn.kernels.backend import Backend
from syncbn.kernels.triton import available_backend


def backend_for(input: torch.Tensor) -> Backend:
    """The fastest backend that takes this tensor."""
    if input.is_cpu:
        return native_kernels if native.available() else eager
    if input.is_cuda:
        return available_backend(input.get_device()) or eager
    return eager
