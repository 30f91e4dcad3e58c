"""A job's feed as server-sent events."""

import json
import threading
import time
from contextlib import ExitStack

import httpx
import pytest
from httpx_sse import connect_sse

from service.domain.journal import Metrics
from tests.contract.store_examples import feed_of
from tests.fakes import FakeService, wait_for


@pytest.fixture
def job(service):
    return service.submit()


def read_all(api: httpx.Client, job_id: str, **headers: str) -> list[tuple[str, str, dict]]:
    with connect_sse(api, "GET", f"/v1/jobs/{job_id}/stream", headers=headers) as source:
        assert source.response.status_code == 200
        return [(message.event, message.id, json.loads(message.data)) for message in source.iter_sse()]


def run_to_end(service: FakeService, job_id: str, num_steps: int = 5) -> None:
    service.scheduler.start(job_id)
    for step in range(1, num_steps + 1):
        service.scheduler.metrics(job_id, step, train_loss=1.0 / step)
    service.scheduler.metrics(job_id, num_steps, eval_accuracy=float("nan"))
    service.scheduler.end(job_id)


def test_a_stream_tells_everything_and_ends(service, api, job):
    run_to_end(service, job.id)
    messages = read_all(api, job.id)
    assert messages[-1][0] == "end"
    assert messages[-1][2]["status"] == "succeeded"
    positions = [int(number) for kind, number, _ in messages if kind != "end"]
    assert positions == list(range(1, len(positions) + 1))
    assert [data["data"]["to"] for kind, _, data in messages if data.get("kind") == "status"] == [
        "queued",
        "starting",
        "running",
        "succeeded",
    ]
    reports = [data for kind, _, data in messages if kind == "metrics"]
    assert [data["step"] for data in reports] == [1, 2, 3, 4, 5, 5]
    assert reports[-1]["values"] == {"eval/accuracy": None}
    assert reports[-1]["nonfinite"] == {"eval/accuracy": "nan"}


def test_a_stream_goes_on_after_any_message(service, api, job):
    run_to_end(service, job.id)
    messages = read_all(api, job.id)
    for place, (_, number, _) in enumerate(messages[:-1]):
        assert read_all(api, job.id, **{"Last-Event-ID": number}) == [
            *messages[place + 1 : -1],
            # The last id stays what it was: `end` has none of its own.
            ("end", messages[-1][1] if place < len(messages) - 2 else "", messages[-1][2]),
        ]
    with connect_sse(api, "GET", f"/v1/jobs/{job.id}/stream?after=3") as source:
        assert next(source.iter_sse()).id == "4"


@pytest.mark.parametrize("header", ["x", "-1", "1.5", "9" * 30, "²"])
def test_a_foreign_last_event_id_is_refused(api, job, header):
    answer = api.get(f"/v1/jobs/{job.id}/stream", headers={b"Last-Event-ID": header.encode()})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "Last-Event-ID"


def test_messages_come_while_the_job_runs(service, api, job):
    with connect_sse(api, "GET", f"/v1/jobs/{job.id}/stream") as source:
        messages = source.iter_sse()
        assert json.loads(next(messages).data)["data"]["to"] == "queued"
        service.scheduler.start(job.id)
        told = (json.loads(message.data) for message in messages)
        statuses = (data["data"]["to"] for data in told if data.get("kind") == "status")
        assert [next(statuses), next(statuses)] == ["starting", "running"]
        service.scheduler.metrics(job.id, 1, train_loss=0.5)
        assert next(told)["values"] == {"train/loss": 0.5}


def test_pages_of_a_long_feed_follow_each_other(service, api, job):
    service.scheduler.start(job.id)
    service.scheduler.report(job.id, *(Metrics.of(step, {"a": 1.0, "b": 2.0}) for step in range(1, 2501)))
    service.scheduler.end(job.id)
    steps = [data["step"] for kind, _, data in read_all(api, job.id) if kind == "metrics"]
    assert steps == list(range(1, 2501))


def test_silence_is_broken_by_heartbeats(service, api, job):
    service.stop()
    service.heartbeat_s = 0.02
    service.start()
    with api.stream("GET", f"/v1/jobs/{job.id}/stream") as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        lines = response.iter_lines()
        assert next(lines).startswith("retry:")
        beats = 0
        for line in lines:
            beats += line == ": heartbeat"
            if beats == 3:
                break


def test_a_database_that_goes_away_does_not_end_a_stream(service, api, job):
    with connect_sse(api, "GET", f"/v1/jobs/{job.id}/stream") as source:
        messages = source.iter_sse()
        next(messages)
        service.store.unavailable = True
        time.sleep(0.05)  # several looks
        service.store.unavailable = False
        service.scheduler.start(job.id)
        assert json.loads(next(messages).data)["data"]["to"] == "starting"


def test_a_shutdown_ends_streams_at_once(service, api, job):
    ended = []

    def read() -> None:
        read_all(api, job.id)
        ended.append(time.monotonic())

    reader = threading.Thread(target=read)
    reader.start()
    wait_for(lambda: bool(service._server.server_state.connections))
    started = time.monotonic()
    service.stop()
    reader.join(timeout=5)
    assert ended
    # The server's grace for answers under way is 1 s; a stream does not use it up.
    assert ended[0] - started < 0.9


def test_metrics_that_share_a_position_with_an_event_come_before_it():
    from service.api.messages import feed_messages
    from service.domain.job import Event, MetricPoint
    from service.domain.journal import utc_now
    from service.domain.ports import Feed

    point = MetricPoint(position=7, attempt=1, step=2, name="a", value=1.0)
    event = Event(position=7, time=utc_now(), kind="checkpoint", attempt=1, reason=None, message="", data={})
    (at, first), (also_at, second) = feed_messages(Feed(events=(event,), points=(point,), position=7))
    assert at == also_at == 7
    assert b"event: metrics" in first
    assert b"id:" not in first
    assert b"id: 7" in second


def test_streams_of_one_job_share_what_is_read_and_each_gets_every_message(service, api, job, monkeypatch):
    """However far back each begins, also where the others are further than what is kept of the feed."""
    monkeypatch.setattr("service.api.feeds.MAX_KEPT_BYTES", 2000)
    service.scheduler.start(job.id)
    started = threading.Barrier(9)
    told: dict[int, list[str]] = {}

    def read(number: int) -> None:
        after = 10 * number
        with connect_sse(api, "GET", f"/v1/jobs/{job.id}/stream?after={after}") as source:
            started.wait(timeout=10)
            told[number] = [message.id for message in source.iter_sse() if message.event != "end"]

    readers = [threading.Thread(target=read, args=[number]) for number in range(8)]
    for reader in readers:
        reader.start()
    started.wait(timeout=10)
    for step in range(1, 201):
        service.scheduler.metrics(job.id, step, train_loss=1.0)
    service.scheduler.end(job.id)
    for reader in readers:
        reader.join(timeout=10)
    last = feed_of(service.store, job.id).position
    assert told == {number: [str(at) for at in range(10 * number + 1, last + 1)] for number in range(8)}


def test_a_stream_from_a_position_that_is_not_there_yet_disturbs_no_other(service, api, job):
    with connect_sse(api, "GET", f"/v1/jobs/{job.id}/stream?after=1000") as early:
        messages = early.iter_sse()
        run_to_end(service, job.id)
        assert [kind for kind, _, _ in read_all(api, job.id)][-1] == "end"
        assert next(messages).event == "end"


def test_one_look_serves_all_streams(service, api, monkeypatch):
    jobs = [service.submit() for _ in range(20)]
    looks = []
    follow = service.store.follow
    monkeypatch.setattr(
        service.store, "follow", lambda after, **limits: (looks.append(len(after)), follow(after, **limits))[1]
    )
    with ExitStack() as stack:
        sources = [stack.enter_context(connect_sse(api, "GET", f"/v1/jobs/{job.id}/stream")) for job in jobs]
        streams = [source.iter_sse() for source in sources]
        assert [next(stream).id for stream in streams] == ["1"] * 20
        wait_for(lambda: 20 in looks)
        for job in jobs:
            service.scheduler.start(job.id)
        assert {next(stream).id for stream in streams} == {"2"}
        # By the number of looks, not of streams: what is taken up at each is everything.
        assert max(looks) == 20


def test_a_fault_of_the_store_ends_streams_so_that_clients_come_back(service, api, job):
    with connect_sse(api, "GET", f"/v1/jobs/{job.id}/stream") as source:
        messages = source.iter_sse()
        next(messages)
        service.store.error = RuntimeError("a fault")
        assert list(messages) == []
    service.store.error = None
    run_to_end(service, job.id)
    assert read_all(api, job.id)[-1][0] == "end"
