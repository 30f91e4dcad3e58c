"""A supervisor's own course, without Ray. A failure means an attempt that stays alive and says nothing forever."""

import asyncio
import errno
import threading
from dataclasses import replace

import pytest
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from service.cluster import supervisor as supervisor_module
from service.cluster.launch_marker import read_launch_marker
from service.cluster.supervisor import Supervisor
from service.domain.errors import StorageError, UserCodeRefused
from service.domain.job import Checkpoint, Origin, Outcome, Reason
from service.domain.journal import CheckpointQuarantined, Ended, Launched, Metrics, Running, Warned, utc_now
from service.domain.ports import Launch
from service.domain.rank_protocol import Stepped
from service.domain.spec import CodeSpec, parse_spec
from service.storage.journal_file import read_journal
from service.storage.layout import launch_marker
from service.storage.object_store import ObjectStore

DONE = Ended(outcome=Outcome.SUCCEEDED, reason=Reason.COMPLETED, message="All steps are done.", step=3)


@pytest.fixture
def supervisor(tmp_path):
    spec = parse_spec(
        {
            "name": "digits",
            "model": {"factory": "builtin:mlp"},
            "dataset": {"factory": "builtin:digits"},
            "batch": {"size": 16},
            "steps": 3,
            "workers": 2,
        }
    )
    launch = Launch(
        job_id="job",
        attempt=1,
        spec=spec,
        node_ids=("a", "a"),
        storage_url=str(tmp_path),
        storage_id=ObjectStore(str(tmp_path)).identify(),
        checkpoints=(),
        collective_timeout_s=1.0,
        start_timeout_s=1.0,
        stop_grace_s=1.0,
    )
    return Supervisor(launch, "supervisor/one")


@pytest.fixture
def store(tmp_path):
    return ObjectStore(str(tmp_path))


def _gang(result):
    async def run_gang():
        if isinstance(result, BaseException):
            raise result
        return result

    return run_gang


def _raising(error):
    async def release(_ended):
        raise error

    return release


def _reports(store):
    return [record.report for record in read_journal(store, "job", 1, after=0)]


def test_an_attempt_begins_with_its_launch_and_ends_with_its_end(supervisor, store, monkeypatch):
    monkeypatch.setattr(supervisor, "_run_gang", _gang(DONE))
    assert asyncio.run(supervisor.run())
    first, last = _reports(store)
    assert isinstance(first, Launched)
    assert last == DONE
    assert supervisor.over.is_set()
    assert read_launch_marker(store, "job", 1) == "supervisor/one"


def test_a_second_supervisor_of_an_attempt_refuses(supervisor, store):
    store.create_exclusively(launch_marker("job", 1), b"another")
    assert not asyncio.run(supervisor.run())
    assert supervisor.over.is_set()
    assert _reports(store) == []


def test_a_supervisor_that_cannot_take_the_marker_does_nothing(supervisor, store, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(supervisor._store, "create_exclusively", refuse)
    assert not asyncio.run(supervisor.run())
    assert not store.exists(launch_marker("job", 1))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TimeoutError(), Reason.LAUNCH_FAILED),
        (RayError("no room"), Reason.LAUNCH_FAILED),
        (StorageError("no storage"), Reason.LAUNCH_FAILED),
        (OSError("no disk"), Reason.LAUNCH_FAILED),
        (ValueError("what nobody thought of"), Reason.SUPERVISOR_LOST),
    ],
)
def test_whatever_goes_wrong_there_is_a_last_record(supervisor, store, monkeypatch, error, reason):
    monkeypatch.setattr(supervisor, "_run_gang", _gang(error))
    asyncio.run(supervisor.run())
    last = _reports(store)[-1]
    assert (last.outcome, last.reason) == (Outcome.LOST, reason)
    assert str(error) in last.message


@pytest.mark.parametrize("through_ray", [False, True])
def test_code_that_cannot_be_used_fails_the_job_and_is_not_run_again(supervisor, store, monkeypatch, through_ray):
    error = UserCodeRefused("The bundle's requirements.txt cannot be installed: no tiny.")
    if through_ray:
        error = RayTaskError("prepare", "Traceback of an actor", error).as_instanceof_cause()
    monkeypatch.setattr(supervisor, "_run_gang", _gang(error))
    asyncio.run(supervisor.run())
    last = _reports(store)[-1]
    assert (last.outcome, last.reason) == (Outcome.FAILED, Reason.USER_ERROR)
    assert last.message == "The bundle's requirements.txt cannot be installed: no tiny."
    assert (last.failure.error_type, last.failure.message) == ("UserCodeRefused", last.message)


def test_a_job_that_brings_something_has_time_to_fetch_it(supervisor):
    assert supervisor._start_timeout_s == supervisor._launch.start_timeout_s
    spec = supervisor._launch.spec.model_copy(update={"code": CodeSpec(bundle="0" * 64)})
    supervisor._launch = replace(supervisor._launch, spec=spec, prepare_timeout_s=7.0)
    assert supervisor._start_timeout_s == supervisor._launch.start_timeout_s + 7.0


def test_the_last_record_is_there_even_if_nothing_can_be_given_back(supervisor, store, monkeypatch):
    monkeypatch.setattr(supervisor, "_run_gang", _gang(DONE))
    monkeypatch.setattr(supervisor._gang, "release", _raising(RayError("Ray is gone")))
    with pytest.raises(RayError):
        asyncio.run(supervisor.run())
    assert _reports(store)[-1] == DONE


def test_the_end_is_readable_even_if_it_cannot_be_made_durable(supervisor, monkeypatch):
    monkeypatch.setattr(supervisor, "_run_gang", _gang(DONE))

    def refuse(_records):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(supervisor._journal._writer, "append", refuse)

    async def run_and_read():
        with pytest.raises(OSError, match="full"):
            await supervisor.run()
        return await supervisor.read(1, 0)

    (last,) = asyncio.run(run_and_read())
    assert last.report == DONE


def test_running_means_that_every_rank_has_stepped(supervisor):
    async def report():
        await supervisor.report(0, [Stepped(num_steps=3), Warned(message="slow", rank=0)])
        await supervisor.report(0, [Stepped(num_steps=3)])
        before = await supervisor.read(0, 0)
        await supervisor.report(1, [Metrics.of(1, {"a": 1.0}), Stepped(num_steps=3)])
        return before, await supervisor.read(0, 0)

    before, after = asyncio.run(report())
    assert [type(record.report) for record in before] == [Warned]
    assert [type(record.report) for record in after] == [Warned, Metrics, Running]
    assert after[-1].report.num_steps == 3
    assert supervisor._step == 1


def test_only_the_first_reason_to_stop_counts(supervisor):
    async def stop():
        await supervisor.stop(Reason.TIMEOUT)
        await supervisor.stop(Reason.CANCEL_REQUESTED)

    asyncio.run(stop())
    assert supervisor._stop_reason is Reason.TIMEOUT
    assert supervisor._stop_asked.is_set()


def test_no_thread_is_left(supervisor, monkeypatch):
    monkeypatch.setattr(supervisor, "_run_gang", _gang(DONE))
    before = set(threading.enumerate())
    asyncio.run(supervisor.run())
    assert set(threading.enumerate()) == before


def test_a_fork_whose_checkpoint_cannot_be_read_fails_and_does_not_begin_anew(supervisor, store):
    origin = Origin(job_id="parent", attempt=1, step=20)
    lost = Checkpoint(
        job_id="parent",
        attempt=1,
        step=20,
        path="jobs/parent/attempts/1/checkpoints/000000020",
        manifest_sha256="0" * 64,
        files=(),
        metrics={},
        created_at=utc_now(),
    )
    supervisor._launch = replace(supervisor._launch, forked_from=origin, checkpoints=(lost,))
    asyncio.run(supervisor.run())
    *_, quarantined, ended = _reports(store)
    assert isinstance(quarantined, CheckpointQuarantined)
    assert (quarantined.job_id, quarantined.attempt, quarantined.step) == ("parent", 1, 20)
    assert (ended.outcome, ended.reason) == (Outcome.FAILED, Reason.CHECKPOINT_FAILED)
    assert "step 20 of job parent" in ended.message


class _Gang:
    """Stands in for a gang one of whose actors answers a kill as told, one answer after another."""

    def __init__(self, *answers):
        self._answers = list(answers)
        self.num_asked = 0

    async def kill_rank(self, rank):
        assert rank == 1
        self.num_asked += 1
        answer = self._answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return await answer()


async def _at_once():
    return None


async def _never():
    await asyncio.Event().wait()


def _verdict(supervisor, monkeypatch, *answers, alive=()):
    monkeypatch.setattr(supervisor_module, "VERDICT_TIMEOUT_S", 0.2)
    monkeypatch.setattr(supervisor_module, "VERDICT_RETRY_S", 0.01)
    monkeypatch.setattr(supervisor_module, "_alive_node_ids", lambda: frozenset(alive))

    async def judge():
        supervisor._gang = gang = _Gang(*answers)
        return await supervisor._await_verdict(1), gang.num_asked

    return asyncio.run(judge())


def test_a_rank_that_can_be_reached_again_is_killed_and_is_no_failure_of_its_own(supervisor, monkeypatch):
    unavailable = ActorUnavailableError("no route", b"0" * 16)
    assert _verdict(supervisor, monkeypatch, unavailable, unavailable, _at_once) == (None, 3)


def test_a_rank_that_cannot_be_reached_is_waited_for_until_ray_calls_its_node_dead(supervisor, monkeypatch):
    unavailable = ActorUnavailableError("no route", b"0" * 16)
    failure, _ = _verdict(supervisor, monkeypatch, unavailable, RayActorError())
    assert (failure.reason, failure.failure.error_type) == (Reason.NODE_LOST, "NodeDied")
    failure, _ = _verdict(supervisor, monkeypatch, RayActorError(), alive=["a"])
    assert (failure.reason, failure.failure.error_type) == (Reason.RANK_LOST, "ActorDied")


def test_a_rank_that_is_never_heard_of_is_not_waited_for_for_ever(supervisor, monkeypatch):
    failure, _ = _verdict(supervisor, monkeypatch, _never)
    assert (failure.reason, failure.failure.error_type) == (Reason.NODE_LOST, "NodeUnreachable")
