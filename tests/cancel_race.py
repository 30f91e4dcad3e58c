"""A cancel and a success that meet: one of them is what becomes of the job, and its events tell one story."""

import itertools
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from service.domain.errors import InvalidTransition
from service.domain.job import TRANSITIONS, AttemptStatus, JobStatus, Outcome, Reason
from service.store import SqlStore
from tests.contract.store_examples import ended, lead, loss, records, run

# Each is at work for about as long: a start that is off by up to this much lets either be first, at any of its steps.
HEAD_START_S = 0.005
# Now and then one of them comes late, so that either is first in some rounds on a machine that is busy as well.
LATENESS = (1, 1, 20)


def race(database_url: str, num_rounds: int) -> dict[JobStatus, int]:
    """Let as many jobs succeed while they are cancelled; how many became what.

    The one who cancels has connections of his own, as the API has.
    """
    scheduler_store, api_store = SqlStore(database_url), SqlStore(database_url)
    lease = lead(scheduler_store)
    chance = random.Random(0)
    became: dict[JobStatus, int] = {}
    try:
        with ThreadPoolExecutor(2) as pool:
            for _ in range(num_rounds):
                job = run(scheduler_store, lease, loss(1))
                barrier = threading.Barrier(2)
                heads_s = [chance.choice(LATENESS) * chance.uniform(0, HEAD_START_S) for _ in range(2)]

                def succeed(job=job, barrier=barrier, head_s=heads_s[0]):
                    barrier.wait(timeout=30)
                    time.sleep(head_s)
                    outcome, reason = Outcome.SUCCEEDED, Reason.COMPLETED
                    if scheduler_store.get(job.id).cancel_requested:  # in time to be passed on to the ranks
                        outcome, reason = Outcome.STOPPED, Reason.CANCEL_REQUESTED
                        scheduler_store.mark_stopping(lease, job.id, 1, reason)
                    end = ended(outcome, reason, step=2)
                    scheduler_store.ingest(lease, job.id, 1, records(loss(2), end, first=5))
                    scheduler_store.seal_attempt(lease, job.id, 1, outcome=outcome, reason=reason, failure=None)

                def cancel(job=job, barrier=barrier, head_s=heads_s[1]):
                    barrier.wait(timeout=30)
                    time.sleep(head_s)
                    try:
                        return api_store.request_cancel(job.id)
                    except InvalidTransition:
                        return None

                succeeding, cancelling = pool.submit(succeed), pool.submit(cancel)
                succeeding.result(timeout=60)
                status = check(api_store, job.id, accepted=cancelling.result(timeout=60) is not None)
                became[status] = became.get(status, 0) + 1
    finally:
        scheduler_store.close()
        api_store.close()
    return became


def check(store: SqlStore, job_id: str, *, accepted: bool) -> JobStatus:
    """Prove that a job has ended once, and that its events lead there; the status it has.

    Args:
        accepted: whether the cancel was.
    """
    job = store.get(job_id)
    assert job.status in (JobStatus.SUCCEEDED, JobStatus.CANCELLED), job
    assert job.status is JobStatus.SUCCEEDED or accepted, "cancelled, although that was refused"
    assert not job.cancel_requested
    assert job.ended_at is not None
    events = store.events(job_id)
    assert [event.position for event in events] == sorted({event.position for event in events})
    moves = [(event.data["from"], event.data["to"]) for event in events if event.kind == "status"]
    assert moves[0][0] is None
    for (_, before), (origin, target) in itertools.pairwise(moves):
        assert before == origin, moves
        assert JobStatus(target) in TRANSITIONS[JobStatus(origin)], moves
    assert [to for _, to in moves if JobStatus(to).is_terminal] == [job.status], moves
    assert events[-1].kind == "status", "something happened after the end"
    asked = [event for event in events if event.kind == "cancel_requested"]
    assert len(asked) == (1 if accepted else 0)
    (attempt,) = store.attempts(job_id)
    assert attempt.status is AttemptStatus.SEALED
    return job.status
