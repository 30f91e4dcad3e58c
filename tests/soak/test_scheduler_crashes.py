"""Twenty jobs on real ranks, each with the death of the scheduler at every point of its life."""

import pytest

from tests.acceptance.scheduler_crashes import TTL_S, CrashingSchedulers
from tests.control_plane import TAKEOVER_S

NUM_JOBS = 20

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]


def test_kill_minus_9_of_the_scheduler_with_ray(tmp_path, record_property):
    record_property("owed", f"no job stuck or run twice; takeover ≤ {TTL_S:g} + {TAKEOVER_S:g} s")
    schedulers = CrashingSchedulers(tmp_path / "data")
    try:
        for _ in range(NUM_JOBS):
            schedulers.run_job()
    finally:
        schedulers.close()
    times = sorted(schedulers.takeovers_s)
    record_property(
        "seen",
        f"{NUM_JOBS} jobs ran once; {len(times)} takeovers, median {times[len(times) // 2]:.1f} s, "
        f"longest {times[-1]:.1f} s",
    )
