"""Whether an error says that there was no memory left, on the host or on a GPU."""

import errno

import torch

# What torch and the libraries below it raise as a plain RuntimeError.
_PHRASES = ("can't allocate memory", "cannot allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error, or one that it was raised from, says that memory ran out."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(cause, OSError) and cause.errno == errno.ENOMEM:
            return True
        if isinstance(cause, RuntimeError) and any(phrase in str(cause) for phrase in _PHRASES):
            return True
        cause = cause.__cause__
    return False
