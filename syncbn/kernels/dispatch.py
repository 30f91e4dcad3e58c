import torch

from syncbn import native
from syncbn.kernels import eager
from syncbn.kernels import native as native_kernels
from syncbn.kernels.backend import Backend
from syncbn.kernels.triton import available_backend

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_MAX_INDEX = 2**30  # what the Triton kernels count in 32 bits, with room for a program's reach beyond the end


def backend_for(input: torch.Tensor) -> Backend:
    """The fastest backend that takes this tensor."""
    if input.is_cpu:
        return native_kernels if native.available() else eager
    # Kernels are handed addresses: of tensors that have one, where a tracer does not need to see what is done.
    if input.is_cuda and type(input) in _PLAIN and torch._C._get_tracing_state() is None and _is_indexable(input):
        return available_backend(input.get_device()) or eager
    return eager


def _is_indexable(input: torch.Tensor) -> bool:
    size = input.numel()
    if size <= _MAX_INDEX:
        return True
    num_samples, num_channels = input.shape[:2]
    return max(size // num_samples, size // num_channels) <= _MAX_INDEX  # of a sample, of a channel
