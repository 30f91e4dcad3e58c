"""The scheduler dies twenty times at each named point of a job's life, and each time another one takes over."""

import pytest

from service.domain.spec import parse_spec
from service.scheduler.crash_points import CrashPoint
from tests.control_plane import TAKEOVER_S, TTL_S, control_plane, job_document
from tests.crashes import NUM_STEPS, Succession

NUM_REPETITIONS = 20


@pytest.mark.parametrize("point", CrashPoint)
def test_kill_minus_9_of_the_scheduler(tmp_path, record_property, point):
    record_property("owed", f"no job stuck or run twice; takeover ≤ {TTL_S:g} + {TAKEOVER_S:g} s")
    with control_plane(tmp_path / "plane") as plane:
        succession = Succession(plane)
        for _ in range(NUM_REPETITIONS):
            plane.arm(point)
            job, _ = plane.store.submit(parse_spec(job_document(num_steps=NUM_STEPS)))
            succession.crash_at(point)
            plane.wait_for_end(job.id)
            plane.check_ran_once(job.id, num_steps=NUM_STEPS)
    record_property("seen", f"{NUM_REPETITIONS} jobs ran once; {succession.describe()}")
