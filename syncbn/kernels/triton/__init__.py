"""The passes as Triton kernels, for GPUs; importing this package itself needs no Triton."""

from syncbn.kernels.triton.availability import available_backend

__all__ = ["available_backend"]
