"""What the API may expect of any ``JobStore``. A failure names a promise that an implementation breaks."""

from datetime import UTC, timedelta

import pytest

from service.domain.errors import IdempotencyConflict, InvalidCursor, InvalidSpec, InvalidTransition, NotFound
from service.domain.job import AttemptStatus, JobStatus, Outcome, Reason
from service.domain.journal import Metrics, Resumed
from service.domain.ports import ClusterSnapshot, Feed
from tests.contract.store_examples import (
    checkpoint,
    ended,
    feed_of,
    lead,
    loss,
    make_key,
    make_spec,
    records,
    run,
    start,
    steps,
)


def test_a_submitted_job_is_queued_and_is_what_was_submitted(store):
    spec = make_spec(labels={"team": "vision"}, seed=2**63 - 1, optimizer={"name": "adamw", "learning_rate": 0.1 + 0.2})
    job, created = store.submit(spec)
    assert created
    assert job == store.get(job.id)
    assert job.spec == spec
    assert job.spec.sha256 == spec.sha256
    assert (job.status, job.reason) == (JobStatus.QUEUED, Reason.SUBMITTED)
    assert (job.attempt, job.retries_used, job.step, job.running_s) == (0, 0, 0, 0.0)
    assert not job.cancel_requested
    assert job.created_at.tzinfo is UTC
    assert job.started_at is job.ended_at is job.failure is None


def test_job_ids_are_lower_case_and_sort_by_time_of_submission(store):
    first = store.submit(make_spec())[0]
    later = store.submit(make_spec())[0]
    while later.created_at - first.created_at < timedelta(milliseconds=2):
        later = store.submit(make_spec())[0]
    assert first.id < later.id
    assert first.id.startswith("job-")
    assert first.id == first.id.lower()


def test_submitting_is_the_first_event(store):
    job, _ = store.submit(make_spec())
    (event,) = store.events(job.id)
    assert (event.position, event.kind, event.attempt, event.reason) == (1, "status", 0, Reason.SUBMITTED)
    assert event.data == {"from": None, "to": "queued"}
    assert event.time == job.created_at


def test_the_same_key_and_body_give_the_first_job(store):
    job, created = store.submit(make_spec(), key=make_key())
    again, created_again = store.submit(make_spec(), key=make_key())
    assert (created, created_again) == (True, False)
    assert again == job
    assert len(store.list_jobs().jobs) == 1


def test_the_same_key_with_another_body_is_refused_and_has_no_effect(store):
    store.submit(make_spec(), key=make_key(body="a"))
    with pytest.raises(IdempotencyConflict):
        store.submit(make_spec(), key=make_key(body="b"))
    assert len(store.list_jobs().jobs) == 1


def test_keys_of_others_do_not_meet(store):
    mine = make_key()
    jobs = [store.submit(make_spec(), key=mine)[0]]
    jobs.append(store.submit(make_spec(), key=make_key(key="other"))[0])
    jobs.append(store.submit(make_spec(), key=type(mine)(**{**vars(mine), "owner": "you"}))[0])
    jobs.append(store.submit(make_spec(), key=type(mine)(**{**vars(mine), "route": "POST /v1/other"}))[0])
    assert len({job.id for job in jobs}) == 4


def test_what_does_not_exist_is_not_found(store):
    for read in (
        store.get,
        store.request_cancel,
        store.attempts,
        store.events,
        store.metrics,
        store.checkpoints,
    ):
        with pytest.raises(NotFound, match="job-none"):
            read("job-none")


def test_pages_are_newest_first_and_together_hold_every_job_once(store):
    ids = [store.submit(make_spec())[0].id for _ in range(5)]
    seen, cursor = [], None
    for size in (2, 2, 1):
        page = store.list_jobs(limit=2, cursor=cursor)
        store.submit(make_spec())  # what comes later does not shift the pages
        assert len(page.jobs) == size
        seen += [job.id for job in page.jobs]
        cursor = page.next_cursor
    assert cursor is None
    assert seen == ids[::-1]


def test_a_full_last_page_has_no_next_one(store):
    for _ in range(2):
        store.submit(make_spec())
    assert store.list_jobs(limit=2).next_cursor is None


def test_jobs_are_listed_by_everything_that_is_given(store):
    lease = lead(store)
    plain = store.submit(make_spec(name="a"))[0].id
    red = store.submit(make_spec(name="a", labels={"colour": "red"}))[0].id
    both = store.submit(make_spec(name="b", labels={"colour": "red", "size": "big"}))[0].id
    store.request_cancel(red)
    start(store, lease, job=store.get(both))

    def ids(**filters):
        return [job.id for job in store.list_jobs(**filters).jobs]

    assert ids(name="a") == [red, plain]
    assert ids(labels=[("colour", "red")]) == [both, red]
    assert ids(labels=[("colour", "red"), ("size", "big")]) == [both]
    assert ids(labels=[("colour", "blue")]) == []
    assert ids(labels=[("colour", "red"), ("colour", "blue")]) == []
    assert ids(statuses=[JobStatus.CANCELLED]) == [red]
    assert ids(statuses=[JobStatus.QUEUED, JobStatus.STARTING, JobStatus.QUEUED]) == [both, plain]
    assert ids(statuses=[JobStatus.CANCELLED, JobStatus.QUEUED], name="a", labels=[("colour", "red")]) == [red]


def test_pages_of_a_filtered_list_hold_every_job_once(store):
    ids = []
    for place in range(7):
        job = store.submit(make_spec(labels={"kind": "even" if place % 2 == 0 else "odd"}))[0]
        if place % 3 == 0:
            store.request_cancel(job.id)
        if place % 2 == 0:
            ids.append(job.id)
    seen, cursor = [], None
    while True:
        page = store.list_jobs(
            statuses=[JobStatus.QUEUED, JobStatus.CANCELLED], labels=[("kind", "even")], limit=1, cursor=cursor
        )
        seen += [job.id for job in page.jobs]
        cursor = page.next_cursor
        if cursor is None:
            break
    assert seen == ids[::-1]


@pytest.mark.parametrize("cursor", ["", "x", "-", "é", "MTI", "am9iczow", "am9iczotMQ", "am9iczox=", "a" * 5000])
def test_a_cursor_of_someone_else_is_refused(store, cursor):
    with pytest.raises(InvalidCursor):
        store.list_jobs(cursor=cursor)


def test_text_of_any_kind_comes_back(store):
    label = "ä 漢字 \U0001f600 ' \" % \\ \n"
    job, _ = store.submit(make_spec(labels={"note": label}))
    assert store.get(job.id).spec.labels == {"note": label}
    assert [found.id for found in store.list_jobs(labels=[("note", label)]).jobs] == [job.id]
    job, _ = store.submit(make_spec(labels={"note": "with\0nul"}))
    assert store.get(job.id).spec.labels == {"note": "with\0nul"}
    assert [found.id for found in store.list_jobs(labels=[("note", "with\0nul")]).jobs] == [job.id]


def test_a_queued_job_is_cancelled_at_once(store):
    job, _ = store.submit(make_spec())
    cancelled = store.request_cancel(job.id)
    assert cancelled == store.get(job.id)
    assert (cancelled.status, cancelled.reason) == (JobStatus.CANCELLED, Reason.CANCELLED)
    assert cancelled.ended_at is not None
    assert not cancelled.cancel_requested
    assert store.events(job.id)[-1].data == {"from": "queued", "to": "cancelled"}


@pytest.mark.parametrize("status", [JobStatus.STARTING, JobStatus.RUNNING])
def test_cancelling_what_runs_is_asked_for(store, status):
    lease = lead(store)
    job = start(store, lease) if status is JobStatus.STARTING else run(store, lease)
    asked = store.request_cancel(job.id)
    assert asked == store.get(job.id)
    assert (asked.status, asked.cancel_requested) == (status, True)
    event = store.events(job.id)[-1]
    assert (event.kind, event.reason, event.attempt) == ("cancel_requested", Reason.CANCEL_REQUESTED, 1)


def test_cancelling_twice_changes_nothing(store):
    lease = lead(store)
    queued, _ = store.submit(make_spec())
    running = run(store, lease)
    for job_id in (queued.id, running.id):
        first = store.request_cancel(job_id)
        events = store.events(job_id)
        assert store.request_cancel(job_id) == first
        assert store.events(job_id) == events


def test_cancelling_what_is_stopping_changes_nothing(store):
    lease = lead(store)
    job = run(store, lease)
    store.mark_stopping(lease, job.id, 1, Reason.TIMEOUT)
    before = store.get(job.id)
    assert store.request_cancel(job.id) == before


@pytest.mark.parametrize("outcome", [Outcome.SUCCEEDED, Outcome.FAILED])
def test_what_has_ended_cannot_be_cancelled(store, outcome):
    lease = lead(store)
    job = run(store, lease)
    store.seal_attempt(lease, job.id, 1, outcome=outcome, reason=Reason.COMPLETED, failure=None)
    with pytest.raises(InvalidTransition):
        store.request_cancel(job.id)


def test_events_are_read_from_a_position_on(store):
    lease = lead(store)
    job = run(store, lease)
    events = store.events(job.id)
    assert [event.position for event in events] == list(range(1, len(events) + 1))
    assert store.events(job.id, after=2, limit=2) == events[2:4]
    assert store.events(job.id, after=events[-1].position) == ()


def test_metrics_are_ordered_by_step_then_name(store):
    lease = lead(store)
    reports = [
        Metrics.of(2, {"train/loss": 0.5, "eval/accuracy": 0.75, "train/Z": 1.0}),
        Metrics.of(1, {"train/loss": 1.0}),
        Metrics.of(10, {"train/loss": float("nan"), "train/grad_norm": float("-inf")}),
    ]
    job = run(store, lease, *reports)
    points = store.metrics(job.id)
    assert [(point.step, point.name, point.value, point.nonfinite) for point in points] == [
        (1, "train/loss", 1.0, None),
        (2, "eval/accuracy", 0.75, None),
        (2, "train/Z", 1.0, None),
        (2, "train/loss", 0.5, None),
        (10, "train/grad_norm", None, "-inf"),
        (10, "train/loss", None, "nan"),
    ]
    assert {point.attempt for point in points} == {1}
    assert steps(store.metrics(job.id, names=["train/loss"])) == [1, 2, 10]
    assert steps(store.metrics(job.id, names=["train/loss", "eval/accuracy"], after_step=1)) == [2, 2, 10]
    assert store.metrics(job.id, names=["unknown"]) == ()


def test_a_value_comes_back_bit_for_bit(store):
    values = [0.1 + 0.2, 5e-324, 1.7976931348623157e308, -1e22, 1 / 3]
    job = run(store, lead(store), *(loss(step, value) for step, value in enumerate(values, start=1)))
    assert [point.value.hex() for point in store.metrics(job.id)] == [value.hex() for value in values]


def test_a_feed_has_events_and_points_in_one_order_and_is_read_page_by_page(store):
    lease = lead(store)
    job = run(store, lease, *(Metrics.of(step, {"train/loss": 1.0, "train/lr": 0.1}) for step in range(1, 6)))
    whole = feed_of(store, job.id)
    assert whole.events == store.events(job.id)
    assert len(whole.points) == 10
    # The points of one report share a place; everything else has its own.
    places = [event.position for event in whole.events] + [point.position for point in whole.points[::2]]
    assert sorted(places) == list(range(1, whole.position + 1))

    events, points, position = [], [], 0
    while True:
        page = feed_of(store, job.id, after=position, limit=2)
        if page.position == position:
            break
        assert page.events or page.points
        assert len(page.events) + len({point.position for point in page.points}) <= 2
        assert all(position < item.position <= page.position for item in (*page.events, *page.points))
        events += page.events
        points += page.points
        position = page.position
    assert (tuple(events), tuple(points), position) == (whole.events, whole.points, whole.position)


def test_a_feed_that_was_read_to_its_end_is_empty_until_something_happens(store):
    lease = lead(store)
    job = run(store, lease, loss(1))
    end = feed_of(store, job.id).position
    assert feed_of(store, job.id, after=end) == Feed(events=(), points=(), position=end)
    store.ingest(lease, job.id, 1, records(loss(2), first=5))
    assert steps(feed_of(store, job.id, after=end).points) == [2]


def test_a_feed_read_late_leaves_out_what_was_superseded(store):
    lease = lead(store)
    job = run(store, lease, loss(1), checkpoint(1), loss(2), loss(3))
    store.seal_attempt(lease, job.id, 1, outcome=Outcome.LOST, reason=Reason.NODE_LOST, failure=None)
    run(store, lease, loss(2), job=job, resume=1)
    feed = feed_of(store, job.id)
    assert [(point.step, point.attempt) for point in feed.points] == [(1, 1), (2, 2)]
    assert [event.data["step"] for event in feed.events if event.kind == "resumed"] == [0, 1]


def test_attempts_are_listed_in_order(store):
    lease = lead(store)
    job = run(store, lease)
    store.seal_attempt(lease, job.id, 1, outcome=Outcome.LOST, reason=Reason.RANK_LOST, failure=None)
    start(store, lease, job=job, num_ranks=3)
    first, second = store.attempts(job.id)
    assert (first.number, first.status, first.reason) == (1, AttemptStatus.SEALED, Reason.RANK_LOST)
    assert (second.number, second.status, second.world_size) == (2, AttemptStatus.CREATED, 3)
    assert second.node_ids == ("node-a",) * 3


def test_checkpoints_are_listed_by_step_with_their_files(store):
    job = run(store, lead(store), checkpoint(20), checkpoint(3))
    early, late = store.checkpoints(job.id)
    assert (early.step, late.step) == (3, 20)
    assert late.job_id == job.id
    assert late.path == "attempts/1/checkpoints/20"
    assert late.files == checkpoint(20).files
    assert late.metrics == {"train/loss": 0.5}
    assert late.created_at.tzinfo is UTC


def test_the_cluster_is_unknown_at_first(store):
    assert store.cluster() == ClusterSnapshot(nodes=(), observed_at=None)


def test_a_database_that_answers_is_pinged(store):
    store.ping()


def test_the_life_of_a_job_is_told_by_its_events(store):
    lease = lead(store)
    job = run(store, lease, loss(1), checkpoint(1), ended(step=1))
    store.seal_attempt(lease, job.id, 1, outcome=Outcome.SUCCEEDED, reason=Reason.COMPLETED, failure=None)
    told = [(event.kind, event.reason, event.attempt) for event in store.events(job.id)]
    assert told == [
        ("status", Reason.SUBMITTED, 0),
        ("status", Reason.ADMITTED, 1),
        ("attempt_created", None, 1),
        ("launched", None, 1),
        ("resumed", None, 1),
        ("status", Reason.ALL_RANKS_STEPPED, 1),
        ("checkpoint", None, 1),
        ("ended", Reason.COMPLETED, 1),
        ("status", Reason.COMPLETED, 1),
    ]


def test_resuming_twice_in_one_attempt_counts_each_step_once(store):
    job = run(store, lead(store), loss(1), loss(2), Resumed(step=1), loss(2, 2.0))
    assert [(point.step, point.value) for point in store.metrics(job.id)] == [(1, 1.0), (2, 2.0)]


def test_many_feeds_are_followed_at_once_each_from_its_own_position(store):
    lease = lead(store)
    busy = run(store, lease, *(Metrics.of(step, {"a": 1.0, "b": 2.0}) for step in range(1, 31)))
    idle, _ = store.submit(make_spec())
    done = run(store, lease, loss(1), ended(step=1))
    store.seal_attempt(lease, done.id, 1, outcome=Outcome.SUCCEEDED, reason=Reason.COMPLETED, failure=None)
    found = store.follow({busy.id: 3, idle.id: 1, done.id: 0, "job-none": 0})
    assert found.keys() == {busy.id, idle.id, done.id}
    assert found[busy.id].feed.points == feed_of(store, busy.id).points
    assert found[busy.id].feed.events == store.events(busy.id, after=3)
    assert found[idle.id].feed == Feed(events=(), points=(), position=1)
    assert found[done.id].feed.events == store.events(done.id)
    assert steps(found[done.id].feed.points) == [1]
    assert not any(one.has_more for one in found.values())
    assert found[done.id].message == store.get(done.id).message
    assert [found[job.id].status for job in (busy, idle, done)] == ["running", "queued", "succeeded"]
    assert store.follow({}) == {}


def test_a_feed_is_followed_in_pages_that_miss_nothing(store):
    lease = lead(store)
    long = run(store, lease, *(loss(step) for step in range(1, 51)), loss(20), loss(21))
    short, _ = store.submit(make_spec())
    after, told = {long.id: 0, short.id: 0}, []
    for _ in range(100):
        found = store.follow(after, limit=10)
        told += found[long.id].feed.points
        after = {job_id: one.feed.position for job_id, one in found.items()}
        if not any(one.has_more for one in found.values()):
            break
    assert tuple(told) == feed_of(store, long.id).points
    assert after[long.id] == feed_of(store, long.id).position
    assert after[short.id] == 1


def test_submits_that_wait_together_have_their_own_outcomes(store):
    earlier, _ = store.submit(make_spec(name="earlier"), key=make_key(key="earlier"))
    submits = [
        store.submit_soon(make_spec(name=name, **changes), owner="mia", key=key)
        for name, changes, key in (
            ("a", {"labels": {"x": "y"}}, make_key(key="a")),
            ("no queue", {"queue": "nowhere"}, make_key(key="none")),
            ("again", {}, make_key(key="a")),
            ("other", {}, make_key(key="a", body="b")),
            ("earlier", {}, make_key(key="earlier")),
            ("b", {}, None),
            ("after", {"after": [earlier.id]}, make_key(key="after")),
            ("after none", {"after": ["job-none"]}, make_key(key="earlier")),
        )
    ]
    one, none, again, other, replayed, unnamed, after, refused_but_replayed = (
        future.exception() or future.result() for future in submits
    )
    assert one == (store.get(one[0].id), True)
    assert (one[0].owner, one[0].spec.labels) == ("mia", {"x": "y"})
    assert isinstance(none, InvalidSpec)
    assert [problem.field for problem in none.problems] == ["queue"]
    assert store.replayed(make_key(key="none")) is None
    assert again == (one[0], False)
    assert isinstance(other, IdempotencyConflict)
    assert replayed == refused_but_replayed == (earlier, False)
    assert unnamed[1]
    assert after == (store.get(after[0].id), True)
    names = [job.spec.name for job in store.list_jobs().jobs]
    assert sorted(names) == ["a", "after", "b", "earlier"]


def test_names_of_metrics_come_back_whatever_is_in_them(store):
    names = ["tab\there", "back\\slash", "\\N", "new\nline", "re\rturn", "quote'\"", "ü/λ", "\\t"]
    job = run(store, lead(store), Metrics.of(1, {name: float(place) for place, name in enumerate(names)}))
    assert {point.name: point.value for point in store.metrics(job.id)} == {
        name: float(place) for place, name in enumerate(names)
    }
    assert store.curves(job.id, max_points=2).keys() == set(names)
