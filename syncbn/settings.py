"""Switches from the environment, for diagnosis; read at each use, so that tests and notebooks may set them late."""

import os


def debug() -> bool:
    """SYNCBN_DEBUG=1: ranks compare which layer they are in before every collective; costs another collective."""
    return os.environ.get("SYNCBN_DEBUG", "0") not in ("", "0")
