"""Who grows and who shrinks, alone. A failure means over-committed nodes, a job below its fewest workers, or churn."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from service.domain.elasticity import exact_worlds, worlds_of
from service.domain.job import AttemptStatus, JobStatus, Reason
from service.domain.placement import place_gang
from service.scheduler.admission import admit, first_in_line
from service.scheduler.elasticity import decide_resizes
from service.scheduler.room import Room
from tests.unit.scheduler.examples import make_job, make_live, make_node

ELASTIC = {"min": 1, "max": 4}


def _decide(queued, live, nodes, *, settled=None):
    everyone = {(entry.job.id, entry.attempt.number) for entry in live}
    resizes = decide_resizes(queued, live, nodes, settled=everyone if settled is None else settled)
    return {resize.live.job.spec.name: len(resize.node_ids) for resize in resizes}


def test_a_job_grows_into_what_is_free():
    live = make_live(make_job("a", workers=ELASTIC), "n")
    assert _decide([], [live], [make_node("n", 3)]) == {"a": 3}
    assert _decide([], [live], [make_node("n", 8)]) == {"a": 4}
    assert _decide([], [live], [make_node("n", 1), make_node("m", 1)]) == {"a": 2}
    assert _decide([], [live], [make_node("n", 1)]) == {}


def test_it_grows_only_to_an_exact_world():
    live = make_live(make_job("a", workers={"min": 1, "max": 8}, batch={"size": 4}), "n")
    assert worlds_of(live.job) == (4, 3, 2, 1)
    assert _decide([], [live], [make_node("n", 8)]) == {"a": 4}


def test_a_job_that_was_started_a_moment_ago_is_left_alone_unless_its_owner_asked():
    live = make_live(make_job("a", workers=ELASTIC), "n")
    assert _decide([], [live], [make_node("n", 4)], settled=set()) == {}
    asked = make_live(make_job("a", workers=ELASTIC, workers_wanted=3, resize_requested=True), "n")
    assert _decide([], [asked], [make_node("n", 4)], settled=set()) == {"a": 3}


def test_a_job_gives_back_what_its_owner_does_not_want_any_more():
    live = make_live(make_job("a", workers=ELASTIC, workers_wanted=2, resize_requested=True), "n", "n", "n")
    assert _decide([], [live], [make_node("n", 4)], settled=set()) == {"a": 2}


def test_a_job_shrinks_just_as_much_as_the_first_in_line_needs():
    live = make_live(make_job("a", workers=ELASTIC), "n", "n", "n", "n")
    assert _decide([make_job("b")], [live], [make_node("n", 4)]) == {"a": 3}
    assert _decide([make_job("b", workers=2), make_job("c")], [live], [make_node("n", 4)]) == {"a": 2}
    assert _decide([make_job("b", workers={"min": 3, "max": 4})], [live], [make_node("n", 4)]) == {"a": 1}


def test_nobody_shrinks_for_a_job_that_could_not_start_all_the_same():
    live = make_live(make_job("a", workers={"min": 2, "max": 4}), "n", "n", "n", "n")
    assert _decide([make_job("b", workers=3)], [live], [make_node("n", 4)]) == {}
    assert _decide([make_job("b", workers=5)], [live], [make_node("n", 4)]) == {}
    assert _decide([make_job("b", gpus=1)], [live], [make_node("n", 4)]) == {}


def test_room_that_the_queue_has_a_use_for_is_not_grown_into():
    grower = make_live(make_job("a", workers={"min": 2, "max": 4}), "n", "n")
    nodes = [make_node("n", 4)]
    # It starts in this very iteration, or could if the job that starts now were asked to shrink.
    assert _decide([make_job("b", workers=2)], [grower], nodes) == {}
    starting = make_live(make_job("c", workers={"min": 1, "max": 2}), "m", "m", status=AttemptStatus.LAUNCHED)
    starting = type(starting)(
        job=starting.job.model_copy(update={"status": JobStatus.STARTING}), attempt=starting.attempt
    )
    both = [*nodes, make_node("m", 2)]
    assert _decide([make_job("b", workers=3)], [grower, starting], both) == {}


def test_room_that_nobody_in_the_queue_can_use_is_grown_into():
    live = make_live(make_job("a", workers=ELASTIC), "n")
    assert _decide([make_job("b", workers=4)], [live], [make_node("n", 4)]) == {"a": 4}, "b waits for its end anyway"
    assert _decide([make_job("b", gpus=1)], [live], [make_node("n", 4)]) == {"a": 4}


def test_nobody_is_asked_twice_or_while_something_else_was_asked():
    nodes, head = [make_node("n", 4)], [make_job("b")]
    shrinking = make_live(make_job("a", workers=ELASTIC), *["n"] * 4, target=("n", "n", "n"))
    assert _decide(head, [shrinking], nodes) == {}
    other = make_live(make_job("c", workers=ELASTIC), *["m"] * 4)
    assert _decide(head, [shrinking, other], [*nodes, make_node("m", 4)]) == {}, "room is on its way"
    for change in ({"cancel_requested": True}, {"pause_requested": True}):
        assert _decide(head, [make_live(make_job("a", workers=ELASTIC, **change), *["n"] * 4)], nodes) == {}
    stopping = make_live(make_job("a", workers=ELASTIC), "n", stop_reason=Reason.SERVICE_STOPPED)
    assert _decide([], [stopping], nodes) == {}
    ended = make_live(make_job("a", workers=ELASTIC), "n", status=AttemptStatus.ENDED)
    assert _decide([], [ended], nodes) == {}


def test_an_attempt_on_a_node_that_is_gone_is_not_resized():
    live = make_live(make_job("a", workers=ELASTIC), "gone")
    assert _decide([], [live], [make_node("n", 4)]) == {}


def test_the_lowest_priority_gives_first_and_of_one_priority_the_latest():
    nodes = [make_node("n", 9)]
    live = [
        make_live(make_job("old", workers=ELASTIC), *["n"] * 3),
        make_live(make_job("low", workers=ELASTIC, priority=-1), *["n"] * 3),
        make_live(make_job("new", workers=ELASTIC), *["n"] * 3),
    ]
    assert _decide([make_job("b", workers=2)], live, nodes) == {"low": 1}
    assert _decide([make_job("b", workers=3)], live, nodes) == {"low": 1, "new": 2}
    assert _decide([make_job("b", workers=6)], live, nodes) == {"low": 1, "new": 1, "old": 1}


def test_room_on_a_node_where_it_does_not_help_is_not_asked_for():
    live = [
        make_live(make_job("a", workers=ELASTIC), "n", "n"),
        make_live(make_job("b", workers=ELASTIC), "m", "m"),
    ]
    nodes = [make_node("n", 3), make_node("m", 2)]
    # Two CPUs on one node: only a can make it so.
    assert _decide([make_job("c", cpus=2)], live, nodes) == {"a": 1}


def test_what_fewer_ranks_leave_is_found_where_it_helps():
    live = make_live(make_job("a", workers={"min": 1, "max": 6}), "n", "n", "n", "m", "m", "o")
    nodes = [make_node("n", 3), make_node("m", 3), make_node("o", 3)]
    # Three CPUs on one node; two of that of the last rank are free already.
    assert _decide([make_job("b", cpus=3)], [live], nodes) == {"a": 5}
    assert _decide([make_job("b", cpus=3, workers=2)], [live], nodes) == {"a": 3}


@given(data=st.data())
def test_a_shrink_is_the_least_that_helps(data):
    worlds = {"min": 1, "max": 12}
    names = ["n", "m", "o", "p"]
    places = [name for name in names for _ in range(data.draw(st.integers(0, 3)))] or ["n"]
    live = make_live(make_job("a", workers=worlds), *places)
    nodes = [make_node(name, places.count(name) + data.draw(st.integers(0, 3))) for name in names]
    head = make_job("b", cpus=data.draw(st.sampled_from([1, 2, 3, 5])), workers=data.draw(st.integers(1, 4)))
    if admit([head], [live], nodes)[0]:
        return
    enough = [
        world
        for world in worlds_of(live.job)
        if world < len(places) and admit([head], [make_live(live.job, *_kept(places, world))], nodes)[0]
    ]
    expected = {"a": enough[0]} if enough else {}
    decided = {name: world for name, world in _decide([head], [live], nodes).items() if world < len(places)}
    assert decided == expected


def _kept(places, world):
    """The places that stay: most of them on few nodes."""
    return sorted(places, key=lambda name: (-places.count(name), name))[:world]


def test_thousands_of_worlds_take_few_looks_at_the_cluster(monkeypatch):
    # Each of them takes milliseconds on a large cluster, and all of them happen between two renewals of the lease.
    num_placed, num_counted = Counter(), Counter()
    place, num_fitting = Room.place, Room.num_fitting
    monkeypatch.setattr(Room, "place", lambda *args: num_placed.update("n") or place(*args))
    monkeypatch.setattr(Room, "num_fitting", lambda *args: num_counted.update("n") or num_fitting(*args))
    workers, batch = {"min": 1, "max": 4096}, {"size": 4096}
    factory = {"factory": "package.module:data"}
    jobs = [make_job(f"j{number}", workers=workers, batch=batch, dataset=factory) for number in range(4)]
    nodes = [make_node(f"n{number}", 8) for number in range(16)]
    starts, _ = admit(jobs, [], nodes)
    assert [len(start.node_ids) for start in starts] == [125, 1, 1, 1]
    live = [make_live(start.job, *start.node_ids) for start in starts]
    assert _decide([make_job("head", workers=60)], live, nodes) == {"j0": 65}
    assert _decide([], live[1:], nodes) == {"j1": 126}
    assert num_placed.total() < 20
    assert num_counted.total() < 60


_ranges = st.tuples(st.integers(1, 3), st.integers(0, 5)).map(lambda pair: {"min": pair[0], "max": pair[0] + pair[1]})
_sizes = st.lists(
    st.tuples(_ranges, st.sampled_from([0.5, 1.0, 3.0]), st.integers(-1, 1), st.none() | st.integers(0, 7)),
    min_size=1,
    max_size=6,
)
_totals = st.lists(st.integers(1, 8), min_size=1, max_size=4)


@given(sizes=_sizes, totals=_totals, num_live=st.integers(0, 6), data=st.data())
def test_no_resize_over_commits_or_goes_below_the_fewest(sizes, totals, num_live, data):
    nodes = [make_node(f"n{number}", cpus) for number, cpus in enumerate(totals)]
    jobs = []
    for number, (workers, cpus, priority, wanted) in enumerate(sizes):
        job = make_job(f"j{number}", workers=workers, cpus=cpus, priority=priority)
        if wanted is not None:
            worlds = exact_worlds(job.spec)
            job = job.model_copy(update={"workers_wanted": worlds[wanted % len(worlds)], "resize_requested": True})
        jobs.append(job)
    live, free = [], {node.id: node.total for node in nodes}
    for job in jobs[:num_live]:  # on any exact world, as earlier decisions may have left them
        world = data.draw(st.sampled_from(exact_worlds(job.spec)))
        places = place_gang(world, job.spec.resources_per_rank, free)
        if places is not None:
            live.append(make_live(job, *places))
            for node_id in places:
                free[node_id] = free[node_id] - job.spec.resources_per_rank
    _, waits = admit(jobs[num_live:], live, nodes)
    queued = [wait.job for wait in waits]
    settled = {(entry.job.id, 1) for entry in live if data.draw(st.booleans())}

    resizes = decide_resizes(queued, live, nodes, settled=settled)

    assert len({resize.live.job.id for resize in resizes}) == len(resizes)
    held = Counter()
    for entry in live:
        places = Counter(entry.attempt.node_ids)
        for resize in resizes:
            if resize.live is entry:
                places |= Counter(resize.node_ids)
        for node_id, count in places.items():
            held[node_id] += count * entry.job.spec.resources.cpus_per_rank
    assert all(held[node.id] <= node.total.cpus + 1e-9 for node in nodes)
    for resize in resizes:
        job, before, after = resize.live.job, resize.live.attempt.world_size, len(resize.node_ids)
        assert after in worlds_of(job)
        assert after != before
        if after > before:
            assert job.resize_requested or (job.id, 1) in settled
    shrunk_for_room = [
        resize
        for resize in resizes
        if len(resize.node_ids) < resize.live.attempt.world_size <= worlds_of(resize.live.job)[0]
    ]
    if shrunk_for_room:
        # Then, and only then, the first in line starts; and nobody takes the room.
        head = first_in_line(queued, nodes)
        assert not any(len(resize.node_ids) > resize.live.attempt.world_size for resize in resizes)
        after = [
            make_live(entry.job, *next((r.node_ids for r in resizes if r.live is entry), entry.attempt.node_ids))
            for entry in live
        ]
        starts, _ = admit(queued, after, nodes)
        assert starts[0].job.id == head.id


@given(sizes=_sizes, totals=_totals)
def test_deciding_again_after_what_was_decided_changes_nothing_more(sizes, totals):
    """Whatever grew has no reason to grow or shrink again while nothing else happens: there is no oscillation."""
    nodes = [make_node(f"n{number}", cpus) for number, cpus in enumerate(totals)]
    queued = [
        make_job(f"j{number}", workers=workers, cpus=cpus, priority=priority)
        for number, (workers, cpus, priority, _) in enumerate(sizes)
    ]
    queued.sort(key=lambda job: -job.spec.priority)
    live = []
    for _ in range(4 * len(queued) + 4):
        starts, waits = admit(queued, live, nodes)
        live += [make_live(start.job, *start.node_ids) for start in starts]
        queued = [wait.job for wait in waits]
        resizes = decide_resizes(queued, live, nodes, settled={(entry.job.id, 1) for entry in live})
        if not starts and not resizes:
            return
        by_job = {resize.live.job.id: resize.node_ids for resize in resizes}
        live = [make_live(entry.job, *by_job.get(entry.job.id, entry.attempt.node_ids)) for entry in live]
    raise AssertionError("no rest was found")
