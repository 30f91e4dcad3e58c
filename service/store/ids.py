"""Names of jobs."""

import base64
import secrets
import time


def new_job_id() -> str:
    """Return a name that sorts by the time it was made (milliseconds) and that nobody can guess (80 random bits)."""
    value = time.time_ns() // 1_000_000 << 80 | secrets.randbits(80)
    # The alphabet 0–9, A–V keeps the order of what it encodes.
    return "job-" + base64.b32hexencode(value.to_bytes(16, "big")).decode().rstrip("=").lower()
