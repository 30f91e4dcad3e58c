"""The client against the API over a fake store, on a real socket."""

import pickle
import threading
import time
from functools import partial

import httpx
import pytest

from service.api.log_search import search_logs
from service.api.routes import logs as logs_route
from service.client.client import Client
from service.client.errors import (
    AuthenticationError,
    ClientError,
    DownloadFailed,
    JobNotFound,
    NoService,
    RequestRefused,
    ServiceFailed,
    ServiceUnreachable,
    UnexpectedAnswer,
    WaitTimeout,
)
from service.domain.errors import FieldProblem, Unavailable
from service.domain.job import JobStatus, Outcome, Reason
from service.domain.placement import Node, Resources
from service.domain.spec import JobSpec
from tests.contract.store_examples import feed_of
from tests.fakes import FakeService, spec


def later(action, after_s: float = 0.2) -> threading.Timer:
    timer = threading.Timer(after_s, action)
    timer.start()
    return timer


def test_jobs_come_back_as_the_domain_has_them(service, client):
    job = client.submit(spec(labels={"team": "vision"}))
    assert job == service.store.get(job.id) == client.get(job.id)
    other = client.submit(spec(name="other"))
    assert client.list_jobs().jobs == (other, job)
    assert client.list_jobs(labels=[("team", "vision")]).jobs == (job,)
    assert client.list_jobs(name="other", statuses=[JobStatus.QUEUED]).jobs == (other,)
    page = client.list_jobs(limit=1)
    assert client.list_jobs(limit=1, cursor=page.next_cursor).jobs == (job,)
    assert client.cancel(job.id).status is JobStatus.CANCELLED
    service.scheduler.start(other.id)
    assert client.attempts(other.id) == service.store.attempts(other.id)
    assert client.events(other.id, after=1) == service.store.events(other.id, after=1)


def test_plan_and_cluster(service, client):
    plan = client.plan(spec(workers=3))
    assert (plan.samples_per_rank, plan.num_micro_steps, plan.num_steps, plan.fits) == ((6, 5, 5), 1, 10, None)
    assert plan.resources == Resources(cpus=3.0)
    assert isinstance(plan.spec, JobSpec)
    node = Node(id="n", address="10.0.0.1", total=Resources(cpus=2.0, gpus=1, memory_bytes=3))
    service.store.record_nodes(service.scheduler._lease(), [node])
    assert client.cluster() == service.store.cluster()
    assert client.plan(spec(workers=3)).fits is False


def test_a_long_curve_comes_rolled_up(service, client):
    job = service.submit()
    service.scheduler.start(job.id)
    for step in range(1, 9):
        service.scheduler.metrics(job.id, step, train_loss=float(step))
    loss = client.metrics(job.id, max_points=2)["train/loss"]
    assert (loss.steps, loss.values) == ((1, 8), (4.0, 8.0))
    assert loss.rollup is not None
    assert (loss.rollup.bucket_steps, loss.rollup.max) == (8, (7.0, 8.0))
    assert client.metrics(job.id, after_step=3, to_step=5)["train/loss"].steps == (4, 5)


def test_metrics(service, client):
    job = service.submit()
    service.scheduler.start(job.id)
    service.scheduler.metrics(job.id, 1, train_loss=float("inf"))
    series = client.metrics(job.id, names=["train/loss"])["train/loss"]
    assert (series.steps, series.values, series.nonfinite) == ((1,), (None,), {1: "inf"})


def test_refusals_are_errors_that_say_what_to_do(service, client):
    with pytest.raises(JobNotFound, match="no job 'job-9'"):
        client.get("job-9")
    with pytest.raises(JobNotFound):
        client.get("../../healthz?x=#")
    job = service.submit()
    service.scheduler.start(job.id)
    service.scheduler.end(job.id)
    with pytest.raises(RequestRefused, match="already succeeded") as refused:
        client.cancel(job.id)
    assert refused.value.status == 409
    with pytest.raises(RequestRefused) as refused:
        client.list_jobs(limit=1000)
    assert [problem.field for problem in refused.value.problems] == ["limit"]
    assert "limit: " in str(refused.value)
    with Client(service.url, "wrong") as stranger, pytest.raises(AuthenticationError, match="SYNCBN_TOKEN"):
        stranger.get(job.id)
    service.store.error = RuntimeError("boom")
    with pytest.raises(ServiceFailed):
        client.get(job.id)


def test_errors_survive_pickling():
    error = RequestRefused("m", 422, "t", (FieldProblem(field="a", message="b"),))
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.status, again.problems) == (str(error), 422, error.problems)
    assert str(pickle.loads(pickle.dumps(NoService("x")))) == "x"


@pytest.mark.parametrize("url", ["", "x", "ftp://x", "http://", "http://[", "/v1"])
def test_a_url_must_be_one(url):
    with pytest.raises(NoService):
        Client(url, "token")


@pytest.mark.parametrize("token", ["", "a b", "a\nb"])
def test_a_token_must_be_one(token):
    with pytest.raises(AuthenticationError) as error:
        Client("http://127.0.0.1:1", token)
    assert not token or token not in str(error.value)


def test_the_job_is_submitted_once_though_the_answer_was_lost(service, client, monkeypatch):
    send = httpx.HTTPTransport.handle_request
    lost = []

    def lose_the_first(transport, request):
        response = send(transport, request)
        if not lost:
            response.close()
            lost.append(request)
            raise httpx.ReadError("connection reset")
        return response

    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", lose_the_first)
    job = client.submit(spec())
    assert lost
    assert service.store.list_jobs().jobs == (job,)


def test_a_database_that_comes_back_is_waited_for(service, client):
    service.store.unavailable = True
    timer = later(lambda: setattr(service.store, "unavailable", False))
    job = client.submit(spec())
    timer.join()
    assert service.store.list_jobs().jobs == (job,)


def test_a_service_that_stays_away_is_an_error(service):
    service.store.unavailable = True
    with Client(service.url, service.token, retry_for_s=0.2) as client:
        with pytest.raises(ServiceUnreachable, match="does not answer"):
            client.submit(spec())
        service.stop()
        started = time.monotonic()
        with pytest.raises(ServiceUnreachable, match="syncbn serve"):
            client.list_jobs()
        assert time.monotonic() - started < 3


def test_a_stranger_that_answers_is_noticed(service, monkeypatch):
    monkeypatch.setattr(
        httpx.HTTPTransport, "handle_request", lambda self, request: httpx.Response(404, text="<html>", request=request)
    )
    with Client(service.url, service.token) as client, pytest.raises(UnexpectedAnswer, match="not this service"):
        client.list_jobs()
    monkeypatch.setattr(
        httpx.HTTPTransport, "handle_request", lambda self, request: httpx.Response(200, json={"a": 1}, request=request)
    )
    with Client(service.url, service.token) as client:
        for call in (client.list_jobs, client.cluster, lambda: client.get("x"), lambda: client.log("x")):
            with pytest.raises(UnexpectedAnswer):
                call()


def test_wait(service, client):
    job = service.submit()
    with pytest.raises(WaitTimeout, match="still queued"):
        client.wait(job.id, timeout_s=0.05)
    timer = later(lambda: service.store.request_cancel(job.id))
    assert client.wait(job.id, timeout_s=10).status is JobStatus.CANCELLED
    timer.join()


def test_wait_outlasts_a_restart(service):
    job = service.submit()
    service.stop()

    def come_back() -> None:
        service.start()
        service.store.request_cancel(job.id)

    timer = later(come_back)
    with Client(service.url, service.token, retry_for_s=0.01) as client:
        assert client.wait(job.id).status is JobStatus.CANCELLED
    timer.join()


def test_search_goes_on_until_everything_was_searched(service, client, monkeypatch):
    monkeypatch.setattr(logs_route, "search_logs", partial(search_logs, budget_s=0.0))
    job = service.submit(workers=2)
    service.scheduler.start(job.id)
    for rank in range(2):
        service.files.logs[job.id, 1, rank] = b"loss\nother\n" * 3
    found = list(client.search_log(job.id, "LOSS", ignore_case=True))
    assert [(match.attempt, match.rank, match.offset) for match in found] == [
        (1, rank, offset) for rank in range(2) for offset in (0, 11, 22)
    ]
    assert [match.offset for match in client.search_log(job.id, "^lo", regex=True, rank=1, attempt="all")] == [
        0,
        11,
        22,
    ]
    assert list(client.search_log(job.id, "^lo")) == []


def test_all_ranks_are_followed_through_attempts(service, client):
    job = service.submit(workers=2)
    service.scheduler.start(job.id)
    service.files.logs[job.id, 1, 0] = b"1/0\n"
    service.files.logs[job.id, 1, 1] = b"1/1\n"
    chunks = client.follow_logs(job.id)
    first = [next(chunks), next(chunks)]
    assert [(chunk.rank, chunk.content) for chunk in first] == [(0, b"1/0\n"), (1, b"1/1\n")]
    service.scheduler.end(job.id, Outcome.LOST, Reason.RANK_LOST)
    service.scheduler.start(job.id)
    service.files.logs[job.id, 2, 1] = b"2/1\n"
    service.scheduler.end(job.id)
    assert [(chunk.attempt, chunk.rank, chunk.content) for chunk in chunks] == [(2, 1, b"2/1\n")]
    assert [chunk.content for chunk in client.follow_logs(job.id, attempt=1)] == [b"1/0\n", b"1/1\n"]


def test_log_and_follow(service, client):
    job = service.submit()
    assert client.log(job.id).attempt == 0
    service.scheduler.start(job.id)
    key = (job.id, 1, 0)
    service.files.logs[key] = b"one\ntwo\n"
    assert client.log(job.id, tail=1).content == b"two\n"
    assert client.log(job.id, offset=1, limit=2).content == b"ne"

    def go_on() -> None:
        service.files.logs[key] += b"three\n"
        service.scheduler.end(job.id, Outcome.LOST, Reason.RANK_LOST)
        service.scheduler.start(job.id)
        service.files.logs[job.id, 2, 0] = b"again\n"
        service.scheduler.end(job.id)

    timer = later(go_on)
    chunks = list(client.follow_log(job.id, offset=4))
    timer.join()
    assert b"".join(chunk.content for chunk in chunks) == b"two\nthree\nagain\n"
    assert {chunk.attempt for chunk in chunks} == {1, 2}
    assert b"".join(chunk.content for chunk in client.follow_log(job.id, attempt=1)) == b"one\ntwo\nthree\n"


def run_slowly(service: FakeService, job_id: str, num_steps: int, pause_s: float) -> None:
    service.scheduler.start(job_id)
    for step in range(1, num_steps + 1):
        service.scheduler.metrics(job_id, step, train_loss=1 / step, train_accuracy=0.5)
        time.sleep(pause_s)
    service.scheduler.end(job_id)


def test_stream(service, client):
    job = service.submit()
    run_slowly(service, job.id, 3, 0)
    items = list(client.stream(job.id))
    feed = feed_of(service.store, job.id)
    assert sorted(items, key=lambda item: item.position) == items
    assert [item for item in items if item in feed.events] == list(feed.events)
    assert [item for item in items if item in feed.points] == list(feed.points)
    assert len(items) == len(feed.events) + len(feed.points)
    after = feed.events[-1].position - 1
    assert list(client.stream(job.id, after=after)) == [feed.events[-1]]


def test_a_stream_outlasts_restarts_without_a_gap(service, client):
    job = service.submit()
    runner = threading.Thread(target=run_slowly, args=(service, job.id, 40, 0.02))
    runner.start()
    items = []
    restarts = 0
    for item in client.stream(job.id):
        items.append(item)
        if restarts < 2 and len(items) > 20 * (restarts + 1):
            restarts += 1
            service.stop()
            service.start()
    runner.join()
    feed = feed_of(service.store, job.id)
    everything = sorted([*feed.events, *feed.points], key=lambda item: (item.position, getattr(item, "name", "")))
    assert restarts == 2
    assert items == everything


def test_a_stream_of_a_service_that_is_gone_ends_with_an_error(service):
    job = service.submit()
    with Client(service.url, service.token, reconnect_for_s=0.3) as client:
        items = client.stream(job.id)
        next(items)
        service.stop()
        with pytest.raises(ServiceUnreachable):
            next(items)


def test_a_stream_finds_a_service_that_moved(service):
    other = FakeService()
    job = service.submit()
    other.store = service.store

    def locate():
        from service.client.discovery import Endpoint

        return Endpoint(url=other.url, token=other.token)

    told = []
    with Client(service.url, service.token, locate=locate, on_interruption=lambda: told.append(1)) as client:
        items = client.stream(job.id)
        next(items)
        other.start()
        service.stop()
        service.store.request_cancel(job.id)
        try:
            assert [item.position for item in items] == [2]
            assert client.get(job.id).status is JobStatus.CANCELLED
        finally:
            other.stop()
    assert told


def test_a_stream_of_a_job_that_is_not_there(service, client):
    with pytest.raises(JobNotFound):
        next(client.stream("job-9"))
    service.store.unavailable = True
    with Client(service.url, service.token, reconnect_for_s=0.1) as hasty, pytest.raises(ClientError):
        next(hasty.stream("job-1"))


WEIGHTS = bytes(range(256)) * 9000  # more than two blocks


@pytest.fixture
def trained(service):
    job = service.submit()
    service.scheduler.start(job.id)
    service.scheduler.checkpoint(job.id, 5, {"model.safetensors": b"old"})
    service.scheduler.checkpoint(job.id, 10, {"model.safetensors": WEIGHTS, "training_state.pt": b""})
    return job


def test_download(client, trained, tmp_path):
    seen = []
    checkpoint = client.download(trained.id, to=tmp_path / "a" / "b", on_bytes=seen.append)
    assert checkpoint.step == 10
    assert {path.name: path.read_bytes() for path in (tmp_path / "a" / "b").iterdir()} == {
        "model.safetensors": WEIGHTS,
        "training_state.pt": b"",
        "manifest.json": b'{"format": 1}',
    }
    assert sum(seen) == len(WEIGHTS) + len(b'{"format": 1}')
    # What is there and right is left alone.
    seen.clear()
    client.download(trained.id, to=tmp_path / "a" / "b", on_bytes=seen.append)
    assert seen == []
    assert client.download(trained.id, to=tmp_path / "old", step=5).step == 5
    assert (tmp_path / "old" / "model.safetensors").read_bytes() == b"old"
    with pytest.raises(JobNotFound, match="step 7"):
        client.download(trained.id, to=tmp_path, step=7)


@pytest.mark.parametrize(("there", "fetched"), [(WEIGHTS[:100_000], len(WEIGHTS) - 100_000), (WEIGHTS, 0)])
def test_a_download_goes_on_where_it_stopped(client, trained, tmp_path, there, fetched):
    sha256 = client.checkpoints(trained.id)[-1].files[0].sha256
    (tmp_path / f".model.safetensors.{sha256[:16]}.part").write_bytes(there)
    seen = []
    client.download(trained.id, to=tmp_path, on_bytes=seen.append)
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS
    assert sum(seen) == fetched + len(b'{"format": 1}')


@pytest.mark.parametrize("there", [b"x" * 100_000, b"x" * (len(WEIGHTS) + 1)])
def test_a_spoilt_part_is_fetched_anew(client, trained, tmp_path, there):
    sha256 = client.checkpoints(trained.id)[-1].files[0].sha256
    (tmp_path / f".model.safetensors.{sha256[:16]}.part").write_bytes(there)
    client.download(trained.id, to=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "training_state.pt",
    ]
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_bit_flip_is_not_kept(service, client, trained, tmp_path):
    path = f"{service.store.checkpoints(trained.id)[-1].path}/model.safetensors"
    flipped = bytearray(WEIGHTS)
    flipped[12345] ^= 1
    service.files.files[path] = bytes(flipped)
    with pytest.raises(DownloadFailed, match="SHA-256"):
        client.download(trained.id, to=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_download_outlasts_a_restart(service, client, trained, tmp_path, monkeypatch):
    read = service.files.read
    broken = []

    def break_once(path: str, start: int, stop: int) -> bytes:
        if start > 0 and not broken:
            broken.append(start)
            raise Unavailable("gone")  # after the answer has begun: the connection breaks off
        return read(path, start, stop)

    monkeypatch.setattr(service.files, "read", break_once)
    client.download(trained.id, to=tmp_path)
    assert broken
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "a/b", "..", "", "a\\b", "a\nb"])
def test_a_name_that_leads_elsewhere_is_not_written(service, client, tmp_path, name):
    job = service.submit()
    service.scheduler.start(job.id)
    service.scheduler.checkpoint(job.id, 1, {name: b"x"})
    with pytest.raises(DownloadFailed, match="plain name"):
        client.download(job.id, to=tmp_path / "inner")
    assert [path.name for path in tmp_path.rglob("*")] == ["inner"]
