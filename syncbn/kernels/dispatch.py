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
    if input.is_cuda and (input.numel() <= _MAX_INDEX or _is_indexable(input)):
        return available_backend(input.get_device()) or eager
    return eager


# The Triton kernels count positions of a channel, and values of a sample, in 32 bits.
_MAX_INDEX = 2**31 - 1


def _is_indexable(input: torch.Tensor) -> bool:
    num_samples, num_channels = input.shape[:2]
    return max(input.numel() // num_samples, input.numel() // num_channels) <= _MAX_INDEX - _MAX_REACH


_MAX_REACH = 1 << 16  # of a program beyond the end
