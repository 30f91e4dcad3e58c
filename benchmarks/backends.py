"""Choosing the library's CPU kernels within one process, so that they can be measured side by side."""

from collections.abc import Iterator
from contextlib import contextmanager

from syncbn import native


def backends() -> list[str]:
    """Names of the backends that run on this machine's CPU, the fastest first."""
    return ["native", "eager"] if native.available() else ["eager"]


@contextmanager
def using(backend: str) -> Iterator[None]:
    """Runs the passes of the layer, forward and backward, on this backend for the time being."""
    available = native.available
    if backend == "eager":
        native.available = lambda: False  # type: ignore[assignment]
    try:
        yield
    finally:
        native.available = available
