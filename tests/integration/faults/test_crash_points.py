"""The scheduler dies at each point of one job's life. A failure names the point after which it is stuck or doubled.

`tests/acceptance/test_scheduler_crashes.py` does so with Ray and real ranks, `tests/soak` twenty times each.
"""

from service.domain.spec import parse_spec
from service.scheduler.crash_points import CrashPoint
from tests.control_plane import control_plane, job_document
from tests.crashes import NUM_STEPS, Succession


def test_a_job_lives_through_the_death_of_its_scheduler_at_every_point(tmp_path):
    with control_plane(tmp_path / "plane") as plane:
        succession = Succession(plane)
        plane.arm(next(iter(CrashPoint)))
        job, _ = plane.store.submit(parse_spec(job_document(num_steps=NUM_STEPS)))
        # In the order in which a job comes to them: one job meets them all.
        succession.crash_at(*CrashPoint)
        plane.wait_for_end(job.id)
        plane.check_ran_once(job.id, num_steps=NUM_STEPS)
        assert plane.lease().epoch == 1 + len(CrashPoint)
