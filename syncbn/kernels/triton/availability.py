import functools
import importlib
import importlib.util
import logging
from typing import cast

import torch

from syncbn import settings
from syncbn.kernels.backend import Backend

_OLDEST_CAPABILITY = (7, 0)  # that Triton compiles for

_logger = logging.getLogger("syncbn")


@functools.cache
def available_backend(device_index: int) -> Backend | None:
    """The Triton kernels, or None where they cannot run; logs once for each GPU which kernels run there and why.

    SYNCBN_TRITON=0 in the environment turns them off, for comparison and diagnosis.

    Args:
        device_index: Of the GPU.
    """
    obstacle = _obstacle(device_index)
    if obstacle is not None:
        _logger.warning("GPU %d kernels: torch operations, which are slower, since %s", device_index, obstacle)
        return None
    _logger.info("GPU %d kernels: Triton %s", device_index, importlib.import_module("triton").__version__)
    return cast(Backend, importlib.import_module("syncbn.kernels.triton.backend"))


def _obstacle(device_index: int) -> str | None:
    if not settings.triton():
        return "SYNCBN_TRITON=0 turns Triton off"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton; torch's builds for GPUs bring it on Linux)"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if torch.version.hip is not None:
        return "it is AMD's: there a program's barrier does not wait for what its other threads have stored"
    capability = torch.cuda.get_device_capability(device_index)
    if capability < _OLDEST_CAPABILITY:
        return f"its compute capability {capability[0]}.{capability[1]} is older than 7.0"
    try:  # it builds its part of the driver at first use, for which it needs a C compiler
        _ = importlib.import_module("triton").runtime.driver.active.utils
    except Exception as error:
        return f"Triton does not work ({type(error).__name__}: {error})"
    return None
