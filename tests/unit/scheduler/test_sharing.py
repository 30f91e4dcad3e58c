"""Queues and priorities, one iteration at a time.

A failure means a decision of the policy that is not carried out, usage that is lost, or a job that is not told why it
waits.
"""

import pytest

from service.domain.job import JobStatus, Outcome, Reason
from service.domain.queue import Queue, Quota
from service.scheduler import loop, usage
from tests.fake_cluster import make_node


def test_an_urgent_job_takes_the_place_of_another_which_goes_on_after_it(house, scheduler):
    low = house.start(scheduler, workers=4)
    urgent = house.submit(workers=4, priority=1)
    scheduler.step()
    scheduler.step()
    assert set(house.cluster.stop_reasons(low, 1)) == {Reason.PREEMPTED}
    late = house.submit(name="late")
    house.cluster.checkpoint(low, 1, 7)
    house.cluster.end(low, 1, Outcome.STOPPED, Reason.PREEMPTED)
    scheduler.step()
    assert house.store.get(urgent).status is JobStatus.STARTING
    assert house.status(low) == (JobStatus.QUEUED, Reason.PREEMPTED)
    assert (house.store.get(low).retries_used, house.store.get(low).preemptions_used) == (0, 1)
    house.cluster.run(urgent, 1)
    house.cluster.end(urgent, 1)
    scheduler.step()
    launch = house.cluster.launches[-1]
    assert (launch.job_id, launch.attempt) == (low, 2)
    assert [checkpoint.step for checkpoint in launch.checkpoints] == [7]
    assert house.store.get(late).status is JobStatus.QUEUED


def test_a_job_that_may_not_be_stopped_is_left_alone(house, scheduler):
    low = house.start(scheduler, workers=4, retry={"preemptions": 0})
    house.submit(workers=4, priority=1)
    scheduler.step()
    scheduler.step()
    assert house.cluster.stop_reasons(low, 1) == []


def test_quotas_and_pauses_are_kept_and_told(house, scheduler):
    house.store.put_queue(Queue(name="small", quota=Quota(cpus=1)))
    house.store.put_queue(Queue(name="shut", paused=True))
    first, second = house.submit(queue="small"), house.submit(queue="small")
    shut = house.submit(queue="shut")
    scheduler.step()
    assert house.store.get(first).status is JobStatus.STARTING
    assert house.store.get(second).message == (
        "Over the quota of queue small: 1 of 1 CPU in use, 1 needed. 1st in queue small."
    )
    assert house.store.get(shut).message == "Queue shut is paused."
    house.store.put_queue(Queue(name="shut"))
    scheduler.step()
    assert house.store.get(shut).status is JobStatus.STARTING


def test_usage_is_kept_and_the_next_leader_goes_on_from_it(house, monkeypatch):
    monkeypatch.setattr(usage, "RECORD_INTERVAL_S", 0.0)
    house.cluster.alive = (make_node(cpus=1),)
    house.store.put_queue(Queue(name="other"))
    first = house.scheduler("first")
    job_id = house.start(first)
    used_s = house.store.queue_usage()["default"]
    assert used_s > 0.0
    assert house.store.queue_usage()["other"] == 0.0
    first.stop_all(deadline_s=0.0)
    second = house.scheduler("second")
    second.step()
    second.step()
    assert house.store.queue_usage()["default"] > used_s
    house.submit(name="mine")
    other = house.submit(name="other", queue="other")
    house.cluster.end(job_id, 1)
    second.step()
    assert house.store.get(other).status is JobStatus.STARTING, "its queue has used nothing"


@pytest.mark.parametrize("num_jobs", [7])
def test_of_many_that_wait_a_few_are_told_at_a_time_and_all_in_the_end(house, scheduler, monkeypatch, num_jobs):
    monkeypatch.setattr(loop, "TELLING_S", 0.0)
    house.start(scheduler, workers=4)
    jobs = [house.submit(name=f"job {number}") for number in range(num_jobs)]
    for _ in range(num_jobs):
        scheduler.step()
    assert len({house.store.get(job_id).message for job_id in jobs}) == num_jobs
