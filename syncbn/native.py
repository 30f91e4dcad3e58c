"""The compiled library, syncbn/_native.so: whether it is there, fits this torch, and is wanted."""

import functools
import logging
from pathlib import Path

import torch

from syncbn import settings

PATH = Path(__file__).with_name("_native.so")
REBUILD = "in the source directory: pip install --no-build-isolation --force-reinstall --no-deps ."

_logger = logging.getLogger("syncbn")


@functools.cache
def available() -> bool:
    """Loads the library at the first call, and logs once which kernels run on CPU and why.

    SYNCBN_NATIVE=0 in the environment turns it off, for comparison and diagnosis; it is read at the first call.

    Returns:
        Whether the operators of `torch.ops.syncbn_native` are there.
    """
    if not settings.native():
        _logger.info("CPU kernels: torch operations, since SYNCBN_NATIVE=0 turns the native ones off")
        return False
    obstacle = _obstacle()
    if obstacle is None:
        try:
            torch.ops.load_library(str(PATH))  # type: ignore[no-untyped-call]
        except OSError as error:
            obstacle = f"{PATH} does not load ({error}); rebuild it"
    if obstacle is not None:
        _logger.warning("CPU kernels: torch operations, which are slower, since %s (%s)", obstacle, REBUILD)
        return False
    _logger.info("CPU kernels: native (%s, torch %s)", torch.ops.syncbn_native.instruction_set(), torch.__version__)
    return True


def _obstacle() -> str | None:
    """Why the library should not be loaded, and what to do; None where nothing speaks against it."""
    if not PATH.exists():
        return f"there is no {PATH}; install with torch present and a C++ compiler"
    # Read from the file: a library for another torch might crash as soon as it is loaded.
    if f"syncbn native for torch {torch.__version__};".encode() not in PATH.read_bytes():
        return f"{PATH} was not built for torch {torch.__version__}; rebuild it"
    return None
