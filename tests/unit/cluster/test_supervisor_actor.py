"""One supervisor's actor, one attempt after another, without Ray. A failure means words to the wrong attempt."""

import asyncio
from types import SimpleNamespace
from typing import ClassVar

import pytest

from service.cluster import supervisor_actor
from service.cluster.supervisor_actor import Release, SupervisorActor
from service.domain.job import Reason


class FakeSupervisor:
    """One that ends when a test has it end; ``made`` holds all of them, in order."""

    made: ClassVar = []

    def __init__(self, launch, name):
        self.launch, self.name = launch, name
        self.over = asyncio.Event()
        self.end = asyncio.get_running_loop().create_future()
        self.heard = []
        self.made.append(self)

    async def run(self):
        return await self.end

    async def read(self, after, wait_s):
        return [after]

    async def stop(self, reason):
        self.heard.append(reason)

    async def report(self, rank, reports):
        self.heard.append((rank, reports))


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    monkeypatch.setattr(supervisor_actor, "Supervisor", FakeSupervisor)
    monkeypatch.setattr(supervisor_actor, "RELEASE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(FakeSupervisor, "made", [])


def _launch(attempt=1, job_id="job"):
    return SimpleNamespace(job_id=job_id, attempt=attempt)


async def _assign(actor, launch):
    task = asyncio.create_task(actor.assign(launch))
    await asyncio.sleep(0)
    return task


def test_an_attempt_is_run_once_whoever_asks_again():
    async def act():
        actor = SupervisorActor("supervisor/one")
        first = await _assign(actor, _launch())
        await actor.assign(_launch())
        (supervisor,) = FakeSupervisor.made
        supervisor.end.set_result(True)
        await first
        await actor.assign(_launch())  # it has ended, and may still be read
        assert await actor.read("job", 1, 7, 0.0) == [7]
        assert len(FakeSupervisor.made) == 1
        assert supervisor.name == "supervisor/one"

    asyncio.run(act())


def test_what_is_meant_for_another_attempt_is_not_heard():
    async def act():
        actor = SupervisorActor("supervisor/one")
        await _assign(actor, _launch(attempt=2))
        for key in (("job", 1), ("other", 2)):
            await actor.stop(*key, Reason.TIMEOUT)
            await actor.report(*key, 0, [])
            await actor.until_over(*key)  # it is over, as far as this one knows
            assert await actor.read(*key, 0, 10.0) is None
        await actor.stop("job", 2, Reason.TIMEOUT)
        await actor.report("job", 2, 1, [])
        (supervisor,) = FakeSupervisor.made
        assert supervisor.heard == [Reason.TIMEOUT, (1, [])]

    asyncio.run(act())


def test_one_attempt_follows_another():
    async def act():
        actor = SupervisorActor("supervisor/one")
        for attempt in (1, 2):
            await _assign(actor, _launch(attempt))
            FakeSupervisor.made[-1].end.set_result(True)
            assert await actor.release("job", attempt) is Release.FREE
            assert await actor.read("job", attempt, 0, 0.0) is None

    asyncio.run(act())


def test_one_that_another_supervisor_has_is_left_to_it():
    async def act():
        actor = SupervisorActor("supervisor/one")
        task = await _assign(actor, _launch(1))
        FakeSupervisor.made[0].end.set_result(False)
        await task
        assert await actor.read("job", 1, 0, 0.0) is None
        assert await actor.release("job", 1) is Release.FREE

    asyncio.run(act())


def test_an_attempt_of_another_job_is_not_disturbed_by_a_late_release():
    async def act():
        actor = SupervisorActor("supervisor/one")
        await _assign(actor, _launch(2))
        assert await actor.release("job", 1) is Release.ELSEWHERE
        assert await actor.read("job", 2, 0, 0.0) == [0]

    asyncio.run(act())


def test_one_with_something_left_of_its_attempt_is_spent(monkeypatch):
    async def act():
        hung = SupervisorActor("supervisor/one")
        await _assign(hung, _launch())
        assert await hung.release("job", 1) is Release.SPENT
        failed = SupervisorActor("supervisor/two")
        task = await _assign(failed, _launch())
        FakeSupervisor.made[-1].end.set_exception(OSError("The journal could not be written."))
        with pytest.raises(OSError, match="journal"):
            await task
        assert await failed.release("job", 1) is Release.SPENT
        monkeypatch.setattr(supervisor_actor, "MAX_ATTEMPTS", 1)
        old = SupervisorActor("supervisor/three")
        await _assign(old, _launch())
        FakeSupervisor.made[-1].end.set_result(True)
        assert await old.release("job", 1) is Release.SPENT

    asyncio.run(act())


def test_whoever_lent_ranks_learns_that_they_are_not_needed_any_more():
    async def act():
        actor = SupervisorActor("supervisor/one")
        await _assign(actor, _launch())
        waiting = asyncio.create_task(actor.until_over("job", 1))
        await asyncio.sleep(0)
        assert not waiting.done()
        FakeSupervisor.made[0].over.set()
        await asyncio.wait_for(waiting, 10)

    asyncio.run(act())
