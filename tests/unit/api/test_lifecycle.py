"""Pausing, resuming, resizing and forking through REST. A failure names a wish that is refused, doubled or misread."""

import pytest

from service.domain.job import JobStatus, Outcome, Reason
from service.domain.placement import Node, Resources
from tests.fakes import spec_data

ELASTIC = {"workers": {"min": 1, "max": 4}}
FILES = {"model.safetensors": b"weights"}


def _running(service, **changes):
    job = service.submit(**changes)
    service.scheduler.start(job.id)
    return job.id


def _with_checkpoints(service, *steps, **changes):
    job_id = _running(service, **{"steps": 100, **changes})
    for step in steps:
        service.scheduler.checkpoint(job_id, step, FILES)
    return job_id


def _problem(answer):
    assert answer.headers["Content-Type"] == "application/problem+json"
    return answer.status_code, answer.json()["type"].rpartition(":")[2]


def _fields(answer):
    return [problem["field"] for problem in answer.json()["errors"]]


def test_pause_and_resume(service, api):
    job = service.submit()
    answer = api.post(f"/v1/jobs/{job.id}/pause")
    assert (answer.status_code, answer.json()["status"]) == (202, "paused")
    assert api.post(f"/v1/jobs/{job.id}/pause").status_code == 202
    answer = api.post(f"/v1/jobs/{job.id}/resume")
    assert (answer.status_code, answer.json()["status"], answer.json()["reason"]) == (202, "queued", "resumed")
    assert service.nudges == 3

    running = _running(service)
    answer = api.post(f"/v1/jobs/{running}/pause")
    assert (answer.status_code, answer.json()["pause_requested"]) == (202, True)
    assert _problem(api.post(f"/v1/jobs/{running}/resume")) == (409, "invalid-transition")
    service.scheduler.stop(running, Reason.PAUSE_REQUESTED)
    assert service.scheduler.end(running).status is JobStatus.SUCCEEDED
    answer = api.post(f"/v1/jobs/{running}/resume")
    assert _problem(answer) == (409, "invalid-transition")
    assert "Fork it with more steps" in answer.json()["detail"]
    assert _problem(api.post(f"/v1/jobs/{running}/pause")) == (409, "invalid-transition")


def test_a_key_names_one_wish_for_one_job(service, api):
    first, second = service.submit(**ELASTIC), service.submit(**ELASTIC)
    headers = {"Idempotency-Key": "one"}
    for job in (first, second):
        assert api.post(f"/v1/jobs/{job.id}/pause", headers=headers).json()["status"] == "paused"
        assert api.post(f"/v1/jobs/{job.id}/resume", headers=headers).json()["status"] == "queued"
        assert api.post(f"/v1/jobs/{job.id}/pause", headers=headers).json()["status"] == "queued"
        assert api.post(f"/v1/jobs/{job.id}/resume", headers=headers).status_code == 202
        path = f"/v1/jobs/{job.id}/resize"
        assert api.post(path, json={"workers": 2}, headers=headers).json()["workers_wanted"] == 2
        assert _problem(api.post(path, json={"workers": 3}, headers=headers)) == (422, "idempotency-conflict")


def test_a_repeated_wish_says_so(service, api):
    job = service.submit(**ELASTIC)
    headers = {"Idempotency-Key": "one"}
    for action, body in (("pause", None), ("resume", None), ("resize", {"workers": 2}), ("cancel", None)):
        path = f"/v1/jobs/{job.id}/{action}"
        first, again = (api.post(path, json=body, headers=headers) for _ in range(2))
        assert "Idempotent-Replayed" not in first.headers
        assert (again.status_code, again.headers["Idempotent-Replayed"]) == (202, "true"), action
        assert again.json() == first.json()


def test_resize(service, api):
    job_id = _running(service, **ELASTIC)
    answer = api.post(f"/v1/jobs/{job_id}/resize", json={"workers": 2})
    assert answer.status_code == 202
    assert (answer.json()["workers_wanted"], answer.json()["resize_requested"]) == (2, True)
    assert service.nudges == 1
    service.scheduler.stop(job_id)
    assert _problem(api.post(f"/v1/jobs/{job_id}/resize", json={"workers": 2})) == (409, "invalid-transition")


@pytest.mark.parametrize(
    ("changes", "workers", "part"),
    [
        (ELASTIC, 5, "Use one of 4, 3, 2, 1"),
        ({"workers": {"min": 1, "max": 8}, "batch": {"size": 4}}, 5, "Use one of 4, 3, 2, 1"),
        ({"workers": 2}, 1, "fork it with other workers"),
    ],
)
def test_a_number_of_workers_that_the_job_cannot_have_is_refused(service, api, changes, workers, part):
    job = service.submit(**changes)
    answer = api.post(f"/v1/jobs/{job.id}/resize", json={"workers": workers})
    assert _problem(answer) == (422, "invalid-spec")
    assert _fields(answer) == ["workers"]
    assert part in answer.json()["errors"][0]["message"]
    assert service.store.get(job.id).workers_wanted is None


@pytest.mark.parametrize(
    ("action", "body", "fields"),
    [
        ("resize", {}, ["workers"]),
        ("resize", {"workers": "2"}, ["workers"]),
        ("resize", {"workers": True}, ["workers"]),
        ("resize", {"workers": 0}, ["workers"]),
        ("resize", {"workers": 2, "soon": True}, ["soon"]),
        ("fork", {"step": -1}, ["step"]),
        ("fork", {"step": "1"}, ["step"]),
        ("fork", {"changes": []}, ["changes"]),
        ("fork", {"change": {}}, ["change"]),
        ("fork", [], [""]),
    ],
)
def test_a_body_that_makes_no_sense_is_refused(service, api, action, body, fields):
    job_id = _with_checkpoints(service, 10, **ELASTIC)
    answer = api.post(f"/v1/jobs/{job_id}/{action}", json=body)
    assert _problem(answer) == (422, "invalid-request")
    assert _fields(answer) == fields
    assert len(service.store.list_jobs().jobs) == 1


@pytest.mark.parametrize("path", ["a" * 201, ".".join("a" * 20), "", "a..b", ".a"])
def test_a_path_that_leads_nowhere_is_refused(service, api, path):
    job_id = _with_checkpoints(service, 10)
    answer = api.post(f"/v1/jobs/{job_id}/fork", json={"changes": {path: 1}})
    assert _problem(answer) == (422, "invalid-request")


def test_fork(service, api):
    job_id = _with_checkpoints(service, 10, 20)
    changes = {"name": "fork", "optimizer.learning_rate": 0.01, "batch": {"size": 32}}
    answer = api.post(f"/v1/jobs/{job_id}/fork", json={"changes": changes})
    assert answer.status_code == 201
    fork = answer.json()
    assert answer.headers["Location"] == f"/v1/jobs/{fork['id']}"
    assert fork["forked_from"] == {"job_id": job_id, "attempt": 1, "step": 20}
    assert (fork["status"], fork["step"], fork["spec"]["name"]) == ("queued", 20, "fork")
    assert (fork["spec"]["optimizer"]["learning_rate"], fork["spec"]["batch"]["size"]) == (0.01, 32)
    assert service.nudges == 1
    earlier = api.post(f"/v1/jobs/{job_id}/fork", json={"step": 10}).json()
    assert (earlier["forked_from"]["step"], earlier["spec"]) == (
        10,
        service.store.get(job_id).spec.model_dump(mode="json"),
    )


def test_each_owner_has_a_fork_of_his_own_for_a_key(service, api):
    job_id = _with_checkpoints(service, 10)
    forks = [
        api.post(f"/v1/jobs/{job_id}/fork", json={}, headers={"Idempotency-Key": "one", "Syncbn-Owner": owner}).json()
        for owner in ("ada", "grace", "ada")
    ]
    assert [fork["owner"] for fork in forks] == ["ada", "grace", "ada"]
    assert forks[0]["id"] == forks[2]["id"] != forks[1]["id"]


def test_a_fork_is_made_once_for_its_key_whatever_became_of_its_parent(service, api):
    job_id = _with_checkpoints(service, 10)
    headers = {"Idempotency-Key": "one"}
    first = api.post(f"/v1/jobs/{job_id}/fork", json={}, headers=headers)
    service.scheduler.checkpoint(job_id, 100, FILES)  # nothing is left to do from there
    again = api.post(f"/v1/jobs/{job_id}/fork", json={}, headers=headers)
    assert (again.status_code, again.json()) == (201, first.json())
    assert again.headers["Idempotent-Replayed"] == "true"
    other = api.post(f"/v1/jobs/{job_id}/fork", json={"step": 10}, headers=headers)
    assert _problem(other) == (422, "idempotency-conflict")
    assert len(service.store.list_jobs().jobs) == 2
    assert service.nudges == 1


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({"step": 15}, ["step"]),
        ({"changes": {"optimizer.name": "adamw"}}, ["optimizer.name"]),
        ({"changes": {"precision": "float64", "model.args.hidden_sizes": [4]}}, ["model.args", "precision"]),
        ({"changes": {"optimizer.learning_rate": -1}}, ["optimizer.learning_rate"]),
        ({"changes": {"steps": 20}}, ["steps"]),
        ({"changes": {"code.bundle": "0" * 64}}, ["code.bundle"]),
    ],
)
def test_a_fork_that_cannot_be_is_refused(service, api, body, fields):
    job_id = _with_checkpoints(service, 10, 20)
    answer = api.post(f"/v1/jobs/{job_id}/fork", json=body)
    assert _problem(answer) == (422, "invalid-spec")
    assert _fields(answer) == fields
    assert len(service.store.list_jobs().jobs) == 1


def test_a_job_without_a_checkpoint_has_nothing_to_fork_from(service, api):
    answer = api.post(f"/v1/jobs/{_running(service)}/fork", json={})
    assert _problem(answer) == (409, "invalid-transition")


def test_a_fork_that_can_never_fit_is_refused(service, api):
    job_id = _with_checkpoints(service, 10)
    service.stop()
    service.capacity = [Node(id="n1", address="", total=Resources(cpus=2.0))]
    service.start()
    answer = api.post(f"/v1/jobs/{job_id}/fork", json={"changes": {"workers": 3}})
    assert _problem(answer) == (422, "invalid-spec")
    assert _fields(answer) == ["workers"]
    assert api.post(f"/v1/jobs/{job_id}/fork", json={"changes": {"workers": {"min": 2, "max": 8}}}).status_code == 201


def test_an_unknown_job_is_not_found(api):
    for action, body in (("pause", None), ("resume", None), ("resize", {"workers": 1}), ("fork", {})):
        assert _problem(api.post(f"/v1/jobs/job-9/{action}", json=body)) == (404, "not-found")


def test_the_log_of_a_paused_job_has_ended(service, api):
    job_id = _running(service)
    assert api.get(f"/v1/jobs/{job_id}/logs").headers["Log-Ended"] == "false"
    api.post(f"/v1/jobs/{job_id}/pause")
    service.scheduler.stop(job_id, Reason.PAUSE_REQUESTED)
    lease = service.scheduler._lease()
    service.store.seal_attempt(lease, job_id, 1, outcome=Outcome.STOPPED, reason=Reason.PAUSE_REQUESTED, failure=None)
    assert service.store.get(job_id).status is JobStatus.PAUSED
    assert api.get(f"/v1/jobs/{job_id}/logs").headers["Log-Ended"] == "true"


def test_a_plan_tells_of_every_exact_number_of_workers(api):
    batch = {"size": 16, "normalization_size": 8, "max_per_rank": 4}
    plan = api.post("/v1/jobs/plan", json=spec_data(workers={"min": 1, "max": 5}, batch=batch)).json()
    assert [world["world_size"] for world in plan["worlds"]] == [5, 4, 3, 2]
    assert plan["worlds"][1] == {
        "world_size": 4,
        "samples_per_rank": [4, 4, 4, 4],
        "num_micro_steps": 1,
        "groups": 2,
    }
    assert plan["world_size"] == 5
    assert plan["resources"]["cpus"] == 5.0
    (only,) = api.post("/v1/jobs/plan", json=spec_data(workers=2)).json()["worlds"]
    assert only == {"world_size": 2, "samples_per_rank": [8, 8], "num_micro_steps": 1, "groups": 1}
