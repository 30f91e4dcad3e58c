"""Several schedulers, clocks that jump, leaders that die or are stopped. A failure: two lead, or none."""

import signal
import time

import pytest

from service.domain.job import JobStatus, Reason
from service.domain.spec import parse_spec
from service.scheduler.crash_points import CrashPoint
from tests.clocks import HOUR_S, JumpingClock
from tests.control_plane import TAKEOVER_S, TTL_S, control_plane, job_document, wait_until


@pytest.fixture
def plane(tmp_path):
    with control_plane(tmp_path / "plane") as plane:
        yield plane


@pytest.fixture
def clocks(tmp_path):
    """Two, for a scheduler each."""
    clocks = [JumpingClock(tmp_path / f"clock-{number}") for number in range(2)]
    with control_plane(tmp_path / "plane") as plane:
        yield clocks, plane
    clocks[0].clean_up(plane.pids())


def test_a_clock_that_jumps_ends_no_lease_and_no_job(clocks):
    clocks, plane = clocks
    first = plane.start_scheduler("first", environment=clocks[0].environment)
    plane.wait_for_leader(first)
    second = plane.start_scheduler("second", environment=clocks[1].environment)
    patient = parse_spec(job_document("patient", num_steps=500, timeout_s=1800, labels={"step_s": "0.2"}))
    job_id = plane.store.submit(patient)[0].id
    wait_until(lambda: plane.store.get(job_id).status is JobStatus.RUNNING, 30.0, plane.logs)
    for offset_s in (HOUR_S, -HOUR_S):
        clocks[0].jump(offset_s)
        clocks[1].jump(-offset_s)
        renewals = plane.lease().num_renewals
        # Long enough for a lease to have ended twice over.
        wait_until(lambda renewals=renewals: plane.lease().num_renewals >= renewals + 7, 30.0, plane.logs)
        assert plane.lease().epoch == 1, f"a jump of {offset_s} s ended the lease:\n{plane.logs()}"
    first.kill()
    plane.wait_for_leader(second, TTL_S + TAKEOVER_S)
    clocks[1].jump(-HOUR_S)
    at_jump = plane.store.get(job_id).step
    wait_until(lambda: plane.store.get(job_id).step > at_jump + 3, 30.0, plane.logs)
    assert plane.store.get(job_id).status is JobStatus.RUNNING
    # And a job whose time is up, by a clock that goes on, ends.
    hasty = parse_spec(job_document("hasty", num_steps=500, timeout_s=1.0, labels={"step_s": "0.2"}))
    hasty_id = plane.store.submit(hasty)[0].id
    job = plane.wait_for_end(hasty_id, 15.0)
    assert (job.status, job.reason) == (JobStatus.FAILED, Reason.TIMEOUT)
    assert 0.8 < job.running_s < 10.0


def test_a_leader_that_was_stopped_writes_nothing_when_it_wakes(plane):
    """Stopped right before it takes in a checkpoint and the end of a job, it wakes when another has done both."""
    first = plane.start_scheduler("first")
    plane.wait_for_leader(first)
    second = plane.start_scheduler("second")
    plane.arm(CrashPoint.BEFORE_RECORD, signal.SIGSTOP)
    job_id = plane.store.submit(parse_spec(job_document(num_steps=5)))[0].id
    wait_until(lambda: not plane.is_armed(), 30.0, plane.logs)
    stopped_at = time.monotonic()
    plane.wait_for_leader(second, TTL_S + TAKEOVER_S)
    plane.wait_for_end(job_id, TTL_S + TAKEOVER_S)
    assert time.monotonic() - stopped_at >= TTL_S, "taken over before the lease's life was over"
    before = (plane.store.get(job_id), plane.store.events(job_id), plane.store.metrics(job_id))
    first.send_signal(signal.SIGCONT)
    wait_until(lambda: "went to another scheduler" in plane.log("first"), 30.0, plane.logs)
    assert (plane.store.get(job_id), plane.store.events(job_id), plane.store.metrics(job_id)) == before
    plane.check_ran_once(job_id, num_steps=5)
    assert plane.lease().epoch == 2
    assert first.poll() is None
    # It is the next one's turn again.
    second.kill()
    plane.wait_for_leader(first, TTL_S + TAKEOVER_S)
    assert plane.lease().epoch == 3
