"""What a job's owner asks for through the client. A failure means a wish that is misread, or heard twice."""

import pytest

from service.client.errors import JobNotFound, RequestRefused
from service.domain.job import JobStatus, Origin
from tests.fakes import spec


@pytest.fixture
def parent(service):
    job = service.submit(workers={"min": 1, "max": 4}, steps=100)
    service.scheduler.start(job.id)
    service.scheduler.checkpoint(job.id, 10, {"model.safetensors": b"weights"})
    return job.id


def test_pause_resume_and_resize(service, client, parent):
    job = client.submit(spec())
    assert client.pause(job.id).status is JobStatus.PAUSED
    assert client.resume(job.id).status is JobStatus.QUEUED
    assert client.pause(parent).pause_requested
    resized = client.resize(parent, 3)
    assert (resized.workers_wanted, resized.resize_requested) == (3, True)
    assert resized == service.store.get(parent)


def test_fork(service, client, parent):
    fork = client.fork(parent, changes={"optimizer": {"learning_rate": 0.5}, "name": "fork"})
    assert fork == service.store.get(fork.id)
    assert fork.forked_from == Origin(job_id=parent, attempt=1, step=10)
    assert (fork.spec.name, fork.spec.optimizer.learning_rate) == ("fork", 0.5)
    assert client.fork(parent, step=10, idempotency_key="k") == client.fork(parent, step=10, idempotency_key="k")
    assert len(service.store.list_jobs().jobs) == 3


def test_a_repeated_request_is_heard_once(service, client, parent, monkeypatch):
    """The answer is lost on its way, and the client asks again."""
    send, lost = client._connection.http.request, []

    def lose_the_first_answer(*arguments, **options):
        response = send(*arguments, **options)
        if not lost:
            lost.append(response)
            response = type(response)(503, json=response.json(), request=response.request)
        return response

    monkeypatch.setattr(client._connection.http, "request", lose_the_first_answer)
    fork = client.fork(parent)
    assert lost[0].json()["id"] == fork.id
    assert len(service.store.list_jobs().jobs) == 2
    lost.clear()
    job = service.submit()
    assert client.pause(job.id).status is JobStatus.PAUSED
    lost.clear()
    assert client.resume(job.id).status is JobStatus.QUEUED, "the second request would be refused"


def test_refusals_name_the_fields(client, parent):
    with pytest.raises(RequestRefused, match="workers: 5 is not within the workers of the job") as caught:
        client.resize(parent, 5)
    assert [problem.field for problem in caught.value.problems] == ["workers"]
    with pytest.raises(RequestRefused, match="precision: cannot change in a fork"):
        client.fork(parent, changes={"precision": "float64"})
    with pytest.raises(RequestRefused, match="nothing to resume"):
        client.resume(parent)
    for ask in (client.pause, client.resume, client.fork):
        with pytest.raises(JobNotFound):
            ask("job-9")


def test_a_plan_tells_of_every_exact_number_of_workers(client):
    plan = client.plan(spec(workers={"min": 2, "max": 3}))
    assert [(world.world_size, world.samples_per_rank, world.groups) for world in plan.worlds] == [
        (3, (6, 5, 5), 1),
        (2, (8, 8), 1),
    ]
