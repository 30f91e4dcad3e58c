"""Switches from the environment, for comparison and diagnosis."""

import os


def debug() -> bool:
    """SYNCBN_DEBUG=1: ranks compare which layer they are in before every collective; costs another collective.

    Read at each call, so that tests and notebooks may set it late.
    """
    return _switch("SYNCBN_DEBUG", default=False)


def native() -> bool:
    """SYNCBN_NATIVE=0: do without the C++ kernels. Read at the first batch on a CPU."""
    return _switch("SYNCBN_NATIVE", default=True)


def triton() -> bool:
    """SYNCBN_TRITON=0: do without the Triton kernels. Read at each GPU's first batch."""
    return _switch("SYNCBN_TRITON", default=True)


def shared_memory() -> bool:
    """SYNCBN_SHARED_MEMORY=0: never exchange through shared memory. Read at each group's first batch."""
    return _switch("SYNCBN_SHARED_MEMORY", default=True)


def _switch(name: str, *, default: bool) -> bool:
    value = os.environ.get(name, "")
    return value != "0" if value else default
