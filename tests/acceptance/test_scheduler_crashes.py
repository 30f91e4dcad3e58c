"""The scheduler dies at every point of a job's life, with Ray and real ranks. A failure: it is stuck, or runs twice."""

import pytest

from tests.acceptance.scheduler_crashes import CrashingSchedulers

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


def test_a_job_lives_through_the_death_of_its_scheduler_at_every_point(tmp_path, clean_machine):
    schedulers = CrashingSchedulers(tmp_path / "data")
    try:
        schedulers.run_job()
    finally:
        schedulers.close()
