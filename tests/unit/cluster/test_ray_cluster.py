"""Finding the supervisor of an attempt, without Ray. A failure means a healthy attempt that passes for lost, one that
is never given up, or two supervisors of one."""

from types import SimpleNamespace

import pytest

from service.cluster import ray_cluster, supervisor_pool
from service.cluster.launch_marker import take_launch_marker
from service.cluster.ray_cluster import RayCluster
from service.cluster.supervisor_actor import Release
from service.domain.errors import Unavailable
from service.domain.job import Reason
from service.domain.ports import SupervisorState
from service.storage.object_store import ObjectStore
from tests.fake_ray import FakeRay


@pytest.fixture
def store(tmp_path):
    return ObjectStore(str(tmp_path))


@pytest.fixture
def ray(monkeypatch):
    ray = FakeRay()
    monkeypatch.setattr(ray_cluster, "ray", ray)
    monkeypatch.setattr(supervisor_pool, "ray", ray)
    names = lambda **_: [{"name": actor.options["name"]} for actor in ray.alive()]  # noqa: E731
    monkeypatch.setattr(ray_cluster, "list_named_actors", names)
    return ray


@pytest.fixture
def connect(ray, store):
    """Connects schedulers, one after another."""
    return lambda: RayCluster(
        address="", node_ip=None, work_dir="", storage=store, num_warm_supervisors=1, num_warm_ranks=0
    )


def _launch(cluster, attempt=1):
    cluster.launch(SimpleNamespace(job_id="job", attempt=attempt))


def _answer_read(actor, records):
    actor.asked("read")[-1].answer(records)


def test_a_repeated_launch_goes_to_the_same_supervisor(ray, connect):
    cluster = connect()
    _launch(cluster)
    _launch(cluster)
    (supervisor,) = ray.actors
    assert len(supervisor.asked("assign")) == 2


def test_a_new_scheduler_finds_a_supervisor_by_the_launch_marker(ray, connect, store):
    _launch(connect())
    (supervisor,) = ray.actors
    take_launch_marker(store, "job", 1, supervisor.options["name"])
    cluster = connect()
    assert cluster.read("job", 1, after=3).state is SupervisorState.ALIVE
    assert supervisor.asked("read")[0].arguments[:3] == ("job", 1, 3)
    cluster.stop("job", 1, Reason.TIMEOUT)
    assert supervisor.asked("stop")[0].arguments == ("job", 1, Reason.TIMEOUT)
    cluster.close("job", 1)
    assert supervisor.asked("release")


def test_what_a_supervisor_has_reported_is_handed_on(ray, connect):
    cluster = connect()
    _launch(cluster)
    assert cluster.read("job", 1, after=0).records == ()
    _answer_read(ray.actors[0], ["record"])
    assert cluster.read("job", 1, after=0).records == ("record",)


def test_an_attempt_that_nobody_has_taken_is_gone(connect):
    assert connect().read("job", 1, after=0).state is SupervisorState.GONE


def test_an_attempt_whose_supervisor_has_died_is_gone(ray, connect, store):
    cluster = connect()
    _launch(cluster)
    (supervisor,) = ray.actors
    take_launch_marker(store, "job", 1, supervisor.options["name"])
    cluster.read("job", 1, after=0)
    supervisor.die()
    assert cluster.read("job", 1, after=0).state is SupervisorState.GONE
    assert connect().read("job", 1, after=0).state is SupervisorState.GONE


def test_an_attempt_that_was_launched_twice_is_read_where_the_marker_says(ray, connect, store):
    _launch(connect())
    owner = ray.actors[0]
    cluster = connect()  # of a scheduler that was started before the marker was taken
    _launch(cluster)
    other = ray.actors[1]
    cluster.read("job", 1, after=0)
    take_launch_marker(store, "job", 1, owner.options["name"])
    _answer_read(other, None)
    assert cluster.read("job", 1, after=0).state is SupervisorState.UNREACHABLE
    assert cluster.read("job", 1, after=0).state is SupervisorState.ALIVE
    assert owner.asked("read")
    # The one that came too late waits for another attempt.
    other.asked("release")[0].answer(Release.FREE)
    _launch(cluster, attempt=2)
    assert other.asked("assign")[-1].arguments[0].attempt == 2


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_question_that_overtakes_an_attempt_costs_it_nothing(ray, connect, store, has_begun):
    cluster = connect()
    _launch(cluster)
    (supervisor,) = ray.actors
    cluster.read("job", 1, after=0)
    _answer_read(supervisor, None)
    if has_begun:  # by the time the answer is looked at
        take_launch_marker(store, "job", 1, supervisor.options["name"])
    assert cluster.read("job", 1, after=0).state is SupervisorState.ALIVE
    assert not supervisor.asked("release")
    assert supervisor.is_alive


def test_a_supervisor_that_has_left_an_attempt_says_so(ray, connect, store):
    _launch(connect())
    take_launch_marker(store, "job", 1, ray.actors[0].options["name"])
    cluster = connect()
    cluster.read("job", 1, after=0)
    _answer_read(ray.actors[0], None)
    assert cluster.read("job", 1, after=0).state is SupervisorState.GONE


def test_storage_that_does_not_answer_proves_nothing(connect, store, monkeypatch):
    def refuse(*_):
        raise OSError("no answer")

    monkeypatch.setattr(store, "read", refuse)
    cluster = connect()
    assert cluster.read("job", 1, after=0).state is SupervisorState.UNREACHABLE
    cluster.stop("job", 1, Reason.TIMEOUT)
    cluster.close("job", 1)
    with pytest.raises(Unavailable, match="no answer"):
        cluster.close_all_but({("job", 1)}, ())


def test_a_new_leader_closes_what_no_live_attempt_needs(ray, connect, store):
    first = connect()
    for attempt in (1, 2, 3):
        _launch(first, attempt)
    live, forgotten, untaken = ray.actors
    for attempt, actor in ((1, live), (2, forgotten)):
        take_launch_marker(store, "job", attempt, actor.options["name"])
    cluster = connect()
    _launch(cluster, attempt=4)
    found = cluster.supervisors()
    _launch(cluster, attempt=5)  # by another leader, meanwhile, as far as this one knows
    cluster.close_all_but({("job", 1), ("job", 3), ("job", 4)}, found)
    assert live.is_alive
    assert not forgotten.is_alive
    assert not untaken.is_alive  # its attempt is launched again
    assert ray.actors[3].is_alive
    assert ray.actors[4].is_alive
