"""Threads and processes on one database. A failure here is a race: a promise kept alone and broken together."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from sqlalchemy.exc import OperationalError

from service.domain.errors import InvalidTransition, NotFound, StaleWrite, Unavailable
from service.domain.job import JobStatus, Origin, Outcome, Reason
from service.domain.queue import Queue
from service.store import SqlStore
from service.store.engine import create_engine
from tests.contract.store_examples import checkpoint, feed_of, lead, loss, make_key, make_spec, records, run
from tests.fakes import wait_for


def at_once(num_threads, call):
    """Call with 0, 1, … from as many threads, started together; the results in that order."""
    barrier = threading.Barrier(num_threads)

    def wait_and_call(place):
        barrier.wait(timeout=30)
        return call(place)

    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(wait_and_call, range(num_threads)))


def refused(call):
    """Call; whether it was refused."""
    try:
        call()
    except InvalidTransition:
        return True
    return False


def test_a_request_that_is_repeated_at_once_makes_one_job(store):
    for key in ("a", "b", "c"):
        results = at_once(8, lambda _, key=key: store.submit(make_spec(), key=make_key(key=key)))
        assert len({job.id for job, _ in results}) == 1
        assert [created for _, created in results].count(True) == 1
    assert len(store.list_jobs().jobs) == 3


def test_one_of_two_claimers_gets_the_job(database_url, store):
    lease = lead(store)
    other = SqlStore(database_url)
    for _ in range(5):
        job, _ = store.submit(make_spec())
        attempts = at_once(
            2, lambda place, job=job: (store, other)[place].create_attempt(lease, job.id, node_ids=["n"])
        )
        assert [attempt is None for attempt in attempts].count(True) == 1
        assert len(store.attempts(job.id)) == 1
    other.close()


def test_one_of_many_takes_the_lease(store):
    for round_number in range(3):
        seen = store.read_lease()
        leases = at_once(6, lambda place, r=round_number, seen=seen: store.take_lease(f"holder-{r}-{place}", seen=seen))
        (lease,) = [lease for lease in leases if lease is not None]
        assert lease.epoch == round_number + 1
        store.release_lease(lease)


def test_cancelling_and_starting_at_once_have_one_winner(store):
    lease = lead(store)
    for _ in range(5):
        job, _ = store.submit(make_spec())
        calls = (
            lambda job=job: store.request_cancel(job.id),
            lambda job=job: store.create_attempt(lease, job.id, node_ids=["n"]),
        )
        _, attempt = at_once(2, lambda place, calls=calls: calls[place]())
        job = store.get(job.id)
        if attempt is None:
            assert job.status is JobStatus.CANCELLED
        else:
            assert (job.status, job.cancel_requested) == (JobStatus.STARTING, True)


def test_a_job_is_resumed_or_its_queue_removed_and_not_both(store):
    for _ in range(10):
        store.put_queue(Queue(name="research"))
        job, _ = store.submit(make_spec(queue="research"))
        store.request_cancel(job.id)
        at_once(
            2,
            lambda place, job=job: refused(
                (lambda: store.resume(job.id), lambda: store.remove_queue("research"))[place]
            ),
        )
        is_resumed = store.get(job.id).status is JobStatus.QUEUED
        assert is_resumed == (len(store.queues()) == 2)
        if is_resumed:
            store.request_cancel(job.id)


def test_a_queue_that_is_made_twice_at_once_is_made_once(store):
    for number in range(10):
        queue = Queue(name=f"research-{number}")
        assert sorted(at_once(4, lambda _, queue=queue: store.put_queue(queue))) == [False] * 3 + [True]
    assert len(store.queues()) == 11


@pytest.mark.postgres
@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_a_submit_that_waits_in_a_ring_with_another_transaction_goes_through(database_url, store):
    first, second = (store.submit(make_spec())[0] for _ in range(2))
    engine = create_engine(database_url)

    def lock(connection, job, words=""):
        return connection.exec_driver_sql(f"SELECT id FROM jobs WHERE id = %s FOR UPDATE {words}", (job.id,)).all()

    def num_waiting_for(pid):
        query = "SELECT count(*) FROM pg_stat_activity WHERE %s = ANY(pg_blocking_pids(pid))"
        return watching.exec_driver_sql(query, (pid,)).scalar_one()

    with engine.connect() as other, engine.connect() as watching, ThreadPoolExecutor(1) as pool:
        lock(other, second)
        pid = other.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        submitting = pool.submit(store.submit, make_spec(after=[second.id, first.id]))
        wait_for(lambda: num_waiting_for(pid) == 1)
        assert lock(watching, first, "SKIP LOCKED") == [], "the submit has locked them in the order of their numbers"
        # Now each waits for the other. Whoever notices it first is undone.
        with suppress(OperationalError):
            lock(other, first)
        other.rollback()
        job, _ = submitting.result(timeout=30)
    assert store.held_back()[job.id].waits_for == (first.id, second.id)
    engine.dispose()


def test_a_checkpoint_is_forked_from_or_removed_and_not_both(database_url, store):
    lease = lead(store)
    other = SqlStore(database_url)
    for _ in range(10):
        parent = run(store, lease, checkpoint(1), checkpoint(2))
        origin = Origin(job_id=parent.id, attempt=1, step=1)

        def fork(origin=origin):
            try:
                return store.fork(make_spec(), origin)[0]
            except NotFound:
                return None

        calls = (fork, lambda parent=parent: other.retire_checkpoint(lease, parent.id, 1, 1))
        forked, _ = at_once(2, lambda place, calls=calls: calls[place]())
        assert [one.step for one in store.removable_checkpoints(parent.id)] == ([1] if forked is None else [])
        if forked is not None:
            assert [one.step for one in store.resumable_checkpoints(forked.id)] == [1]
    other.close()


def test_an_attempt_is_resized_or_its_job_cancelled_and_either_way_nothing_runs_unseen(store):
    lease = lead(store)
    for _ in range(10):
        job = run(store, lease)
        store.mark_resizing(lease, job.id, 1, node_ids=["n"], message="")
        calls = (
            lambda job=job: store.request_cancel(job.id),
            lambda job=job: store.seal_attempt(
                lease, job.id, 1, outcome=Outcome.STOPPED, reason=Reason.RESIZED, failure=None, next_node_ids=["n"]
            ),
        )
        at_once(2, lambda place, calls=calls: calls[place]())
        after = store.get(job.id)
        if after.status is JobStatus.CANCELLED:
            assert len(store.attempts(job.id)) == 1
        else:  # the new attempt is told
            assert (after.status, after.attempt, after.cancel_requested) == (JobStatus.STARTING, 2, True)


def test_a_follower_misses_nothing_of_what_several_write(store):
    lease = lead(store)
    jobs = [run(store, lease) for _ in range(2)]
    done = threading.Event()

    def write(place):
        job = jobs[place % 2]
        if place < 2:
            for step in range(1, 31):
                store.ingest(lease, job.id, 1, records(loss(step), first=3 + step))
        else:
            store.request_cancel(job.id)
            store.mark_stopping(lease, job.id, 1, Reason.CANCEL_REQUESTED)

    def follow(job_id):
        places, position = [], 0
        while True:
            last_look = done.is_set()
            page = feed_of(store, job_id, after=position, limit=5)
            places += sorted({item.position for item in (*page.events, *page.points)})
            if page.position == position and last_look:
                return places
            position = page.position

    with ThreadPoolExecutor(2) as followers:
        reading = [followers.submit(follow, job.id) for job in jobs]
        try:
            at_once(4, write)
        finally:
            done.set()
        for job, places in zip(jobs, reading, strict=True):
            assert places.result(timeout=30) == list(range(1, feed_of(store, job.id).position + 1))


def test_sealing_and_taking_in_at_once_leave_a_whole_journal(store):
    lease = lead(store)
    job = run(store, lease)

    def write(place):
        if place == 0:
            return store.seal_attempt(lease, job.id, 1, outcome=Outcome.LOST, reason=Reason.RANK_LOST, failure=None)
        try:
            for step in range(1, 21):
                store.ingest(lease, job.id, 1, records(loss(step), first=3 + step))
        except StaleWrite:
            return None

    at_once(2, write)
    (attempt,) = store.attempts(job.id)
    assert len(store.metrics(job.id)) == attempt.last_sequence - 3
    assert store.get(job.id).status is JobStatus.QUEUED


SUBMIT = """
import sys
from service.domain.spec import parse_spec
from service.store import SqlStore
store = SqlStore(sys.argv[1])
spec = parse_spec({"name": "digits", "model": {"factory": "builtin:mlp"}, "dataset": {"factory": "builtin:digits"},
                   "batch": {"size": 16}, "steps": 100})
for _ in range(int(sys.argv[2])):
    print(store.submit(spec)[0].id, flush=True)
"""


def submitting(url, count):
    return subprocess.Popen(
        [sys.executable, "-c", SUBMIT, url, str(count)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_kill_9_between_submits_loses_no_acknowledged_job(database_url, store):
    """Two processes write at once; one is killed, the other notices nothing."""
    killed, other = submitting(database_url, 10_000), submitting(database_url, 40)
    try:
        acknowledged = [killed.stdout.readline() for _ in range(15)]
    finally:
        killed.kill()
    out, _ = killed.communicate(timeout=30)
    acknowledged += out.splitlines(keepends=True)
    out, err = other.communicate(timeout=60)
    assert other.returncode == 0, err
    assert len(out.split()) == 40
    acknowledged += out.splitlines(keepends=True)
    # A last line may have been cut short; what was printed whole was acknowledged.
    ids = [line.strip() for line in acknowledged if line.endswith("\n")]
    assert len(ids) == len(set(ids)) >= 55
    for job_id in ids:
        assert store.get(job_id).status is JobStatus.QUEUED
        assert len(store.events(job_id)) == 1
    if database_url.startswith("sqlite"):
        engine = create_engine(database_url)
        with engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar_one() == "ok"
        engine.dispose()


def test_a_lock_that_is_held_for_too_long_is_an_outage(database_url, store, monkeypatch):
    monkeypatch.setattr("service.store.engine.LOCK_TIMEOUT_S", 0.2)
    job, _ = store.submit(make_spec())
    engine = create_engine(database_url)
    blocked = SqlStore(database_url)
    with engine.connect() as connection:
        connection.execution_options(sqlite_begin="IMMEDIATE")
        with connection.begin():
            connection.exec_driver_sql("UPDATE jobs SET message = 'held'")
            with pytest.raises(Unavailable):
                blocked.request_cancel(job.id)
            assert blocked.get(job.id) == job  # readers do not wait for writers
    assert blocked.request_cancel(job.id).status is JobStatus.CANCELLED
    blocked.close()
    engine.dispose()


def test_a_follower_of_a_held_write_sees_all_of_it_or_nothing(database_url, store):
    """A position is taken under the job's lock: what commits later has a greater one."""
    lease = lead(store)
    job = run(store, lease)
    before = feed_of(store, job.id)
    engine = create_engine(database_url)
    with engine.connect() as connection:
        connection.execution_options(sqlite_begin="IMMEDIATE")
        with connection.begin():
            connection.exec_driver_sql("UPDATE jobs SET position = position")  # as the first part of a write
            with ThreadPoolExecutor(1) as pool:
                late = pool.submit(store.ingest, lease, job.id, 1, records(loss(1), first=4))
                assert feed_of(store, job.id) == before
                connection.commit()
                late.result(timeout=30)
    assert feed_of(store, job.id).position == before.position + 1
    engine.dispose()
