"""Attempts, events, training curves and logs."""

import pytest

from service.domain.job import Outcome, Reason
from service.domain.journal import Metrics, Resumed


@pytest.fixture
def job(service):
    return service.submit(workers=2)


def test_attempts_and_events(service, api, job):
    service.scheduler.start(job.id)
    service.scheduler.end(job.id, Outcome.LOST, Reason.RANK_LOST)
    service.scheduler.start(job.id)
    attempts = api.get(f"/v1/jobs/{job.id}/attempts").json()["attempts"]
    assert [(one["number"], one["status"], one["reason"]) for one in attempts] == [
        (1, "sealed", "rank_lost"),
        (2, "running", None),
    ]
    everything = api.get(f"/v1/jobs/{job.id}/events").json()
    statuses = [event["data"]["to"] for event in everything["events"] if event["kind"] == "status"]
    assert statuses == ["queued", "starting", "running", "queued", "starting", "running"]
    page = api.get(f"/v1/jobs/{job.id}/events", params={"limit": 2}).json()
    rest = api.get(f"/v1/jobs/{job.id}/events", params={"after": page["next_after"]}).json()
    assert page["events"] + rest["events"] == everything["events"]
    assert api.get(f"/v1/jobs/{job.id}/events", params={"after": 999}).json() == {"events": [], "next_after": 999}


def test_metrics_are_columns(service, api, job):
    service.scheduler.start(job.id)
    service.scheduler.metrics(job.id, 1, train_loss=0.5, train_accuracy=0.25)
    service.scheduler.metrics(job.id, 2, train_loss=float("nan"))
    service.scheduler.metrics(job.id, 3, train_loss=float("-inf"))
    series = api.get(f"/v1/jobs/{job.id}/metrics").json()["series"]
    assert series["train/loss"] == {
        "steps": [1, 2, 3],
        "values": [0.5, None, None],
        "attempts": [1, 1, 1],
        "nonfinite": {"2": "nan", "3": "-inf"},
    }
    assert set(series) == {"train/loss", "train/accuracy"}

    def only(**params):
        return api.get(f"/v1/jobs/{job.id}/metrics", params=params).json()["series"]

    assert set(only(name="train/accuracy")) == {"train/accuracy"}
    assert set(only(name=["train/accuracy", "train/loss"])) == {"train/accuracy", "train/loss"}
    assert only(after_step=2)["train/loss"]["steps"] == [3]
    assert only(name="nothing") == {}


def test_metrics_after_a_resume_show_each_step_once(service, api, job):
    service.scheduler.start(job.id)
    for step in (1, 2, 3):
        service.scheduler.metrics(job.id, step, train_loss=float(step))
    service.scheduler.end(job.id, Outcome.LOST, Reason.NODE_LOST)
    service.scheduler.start(job.id)
    service.scheduler.report(job.id, Resumed(step=1), Metrics.of(2, {"train/loss": 20.0}))
    loss = api.get(f"/v1/jobs/{job.id}/metrics").json()["series"]["train/loss"]
    assert (loss["steps"], loss["values"], loss["attempts"]) == ([1, 2], [1.0, 20.0], [1, 2])


def test_logs_before_the_first_attempt_are_empty(api, job):
    answer = api.get(f"/v1/jobs/{job.id}/logs")
    assert (answer.status_code, answer.content) == (200, b"")
    assert (answer.headers["Log-Attempt"], answer.headers["Log-Ended"]) == ("0", "false")


def test_logs_in_parts(service, api, job):
    service.scheduler.start(job.id)
    service.files.logs[job.id, 1, 1] = "héllo\nworld\n".encode()

    def log(**params):
        return api.get(f"/v1/jobs/{job.id}/logs", params={"rank": 1, **params})

    whole = log()
    assert whole.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert whole.text == "héllo\nworld\n"
    assert (whole.headers["Log-Attempt"], whole.headers["Log-Size"], whole.headers["Log-Ended"]) == ("1", "13", "false")
    read, offset = b"", 0
    while part := log(offset=offset, limit=5).content:
        read += part
        offset += len(part)
    assert read == whole.content
    assert log(offset=13).headers["Log-Next-Offset"] == "13"
    assert log(offset=10**6).headers["Log-Next-Offset"] == str(10**6)
    tail = log(tail=1)
    assert (tail.text, tail.headers["Log-Next-Offset"]) == ("world\n", "13")
    assert log(tail=100).content == whole.content
    assert log(offset=1, tail=1).json()["errors"][0]["field"] == "tail"
    assert api.get(f"/v1/jobs/{job.id}/logs").content == b""  # rank 0 printed nothing


def test_logs_that_are_not_kept_whole(service, api, job):
    service.scheduler.start(job.id)
    service.files.logs[job.id, 1, 0] = b"old\nnew\nnewer\n"
    service.files.log_starts[job.id, 1, 0] = 4

    def log(**params):
        answer = api.get(f"/v1/jobs/{job.id}/logs", params=params)
        return answer.text, answer.headers["Log-Start-Offset"], answer.headers["Log-Next-Offset"]

    assert log() == ("new\nnewer\n", "4", "14")
    assert log(offset=2, limit=4) == ("new\n", "4", "8")
    assert log(offset=8) == ("newer\n", "8", "14")
    assert log(tail=1) == ("newer\n", "8", "14")
    assert log(tail=9) == ("new\nnewer\n", "4", "14")


def test_logs_of_an_earlier_attempt(service, api, job):
    service.scheduler.start(job.id)
    service.files.logs[job.id, 1, 0] = b"first\n"
    service.scheduler.end(job.id, Outcome.LOST, Reason.RANK_LOST)
    assert api.get(f"/v1/jobs/{job.id}/logs").headers["Log-Ended"] == "true"
    service.scheduler.start(job.id)
    service.files.logs[job.id, 2, 0] = b"second\n"
    assert api.get(f"/v1/jobs/{job.id}/logs").text == "second\n"
    earlier = api.get(f"/v1/jobs/{job.id}/logs", params={"attempt": 1})
    assert (earlier.text, earlier.headers["Log-Ended"]) == ("first\n", "true")
    assert api.get(f"/v1/jobs/{job.id}/logs", params={"attempt": 3}).status_code == 404
    assert api.get(f"/v1/jobs/{job.id}/logs", params={"rank": 2}).status_code == 404
    assert api.get(f"/v1/jobs/{job.id}/logs", params={"rank": -1}).status_code == 422


def test_a_long_curve_is_rolled_up_to_what_is_asked_for(service, api, job):
    service.scheduler.start(job.id)
    service.scheduler.report(job.id, *(Metrics.of(step, {"train/loss": float(step)}) for step in range(1, 33)))
    service.scheduler.metrics(job.id, 33, train_loss=float("nan"))

    def loss(**params: int) -> dict:
        return api.get(f"/v1/jobs/{job.id}/metrics", params=params).json()["series"]["train/loss"]

    assert loss(max_points=3) == {
        "steps": [1, 16, 32],
        "values": [8.0, 23.5, 32.0],
        "attempts": [1, 1, 1],
        "nonfinite": {"32": "nan"},
        "rollup": {
            "bucket_steps": 16,
            "last_steps": [15, 31, 33],
            "counts": [15, 16, 1],
            "nonfinite_counts": [0, 0, 1],
            "min": [1.0, 16.0, 32.0],
            "max": [15.0, 31.0, 32.0],
            "last": [15.0, 31.0, None],
        },
    }
    near = loss(max_points=4, from_step=5, to_step=8)
    assert (near["steps"], near["rollup"]["bucket_steps"]) == ([5, 6, 7, 8], 1)
    exact = loss(from_step=5, to_step=8)
    assert exact == {"steps": [5, 6, 7, 8], "values": [5.0, 6.0, 7.0, 8.0], "attempts": [1] * 4, "nonfinite": {}}
    assert loss(after_step=31)["steps"] == [32, 33]


@pytest.mark.parametrize("params", [{"max_points": 1}, {"max_points": 10_001}, {"to_step": -1}, {"from_step": "x"}])
def test_a_range_or_resolution_that_makes_no_sense_is_refused(api, job, params):
    answer = api.get(f"/v1/jobs/{job.id}/metrics", params=params)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == next(iter(params))
