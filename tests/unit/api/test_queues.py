"""Queues and owners through REST. A failure names a setting that is lost, or a refusal that does not say why."""

import pytest

from service.domain.queue import Queue, Quota
from tests.fakes import spec_data

RESEARCH = {"weight": 2.5, "quota": {"gpus": 8}, "quota_per_owner": {"jobs": 1, "cpus": 0.5}, "paused": True}


def _fields(answer, status=422):
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    return [problem["field"] for problem in answer.json().get("errors", [])]


def test_a_queue_is_made_and_changed(service, api):
    answer = api.put("/v1/queues/research", json=RESEARCH)
    assert answer.status_code == 201
    shown = answer.json()
    assert (shown["name"], shown["weight"], shown["paused"]) == ("research", 2.5, True)
    assert (shown["quota"]["gpus"], shown["quota"]["cpus"]) == (8, None)
    assert (shown["num_queued"], shown["num_live"], shown["usage_s"]) == (0, 0, 0.0)
    assert service.nudges == 1
    assert api.get("/v1/queues/research").json() == shown

    changed = api.put("/v1/queues/research", json={"weight": 1})
    assert changed.status_code == 200
    assert service.store.queues()[1] == Queue(name="research", weight=1.0, quota=Quota(), paused=False)
    assert [queue["name"] for queue in api.get("/v1/queues").json()["queues"]] == ["default", "research"]


def test_a_queue_is_removed(service, api):
    api.put("/v1/queues/research", json={})
    job = service.submit(queue="research")
    assert _fields(api.delete("/v1/queues/research"), 409) == []
    service.store.request_cancel(job.id)
    assert api.delete("/v1/queues/research").status_code == 204
    assert _fields(api.get("/v1/queues/research"), 404) == []
    assert _fields(api.delete("/v1/queues/research"), 404) == []
    assert _fields(api.delete("/v1/queues/default"), 409) == []


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"weight": 0}, "weight"),
        ({"weight": "much"}, "weight"),
        ({"quota": {"gpus": -1}}, "quota.gpus"),
        ({"quota": {"tpus": 1}}, "quota.tpus"),
        ({"quota_per_owner": {"jobs": 1.5}}, "quota_per_owner.jobs"),
        ({"name": "other"}, "name"),
        ({"paused": None}, "paused"),
    ],
)
def test_settings_that_cannot_be_are_refused(service, api, body, field):
    assert _fields(api.put("/v1/queues/research", json=body)) == [field]
    assert len(service.store.queues()) == 1


@pytest.mark.parametrize("name", ["Research", "-a", "a" * 64, "a b", "a.b"])
def test_a_name_that_cannot_be_is_refused(api, name):
    assert _fields(api.put(f"/v1/queues/{name}", json={})) == ["name"]


def test_a_job_waits_in_its_queue(service, api):
    assert _fields(api.post("/v1/jobs", json=spec_data(queue="research"))) == ["queue"]
    api.put("/v1/queues/research", json={})
    job_id = api.post("/v1/jobs", json=spec_data(queue="research")).json()["id"]
    service.submit()
    listed = api.get("/v1/jobs", params={"queue": "research"}).json()["jobs"]
    assert [job["id"] for job in listed] == [job_id]


def test_a_job_has_an_owner(service, api):
    answer = api.post("/v1/jobs", json=spec_data(), headers={"Syncbn-Owner": "ada@lab"})
    assert answer.json()["owner"] == "ada@lab"
    assert api.post("/v1/jobs", json=spec_data()).json()["owner"] == "default"
    listed = api.get("/v1/jobs", params={"owner": "ada@lab"}).json()["jobs"]
    assert [job["id"] for job in listed] == [answer.json()["id"]]
    for owner in ("", "-ada", "a" * 65, "ada lovelace"):
        refused = api.post("/v1/jobs", json=spec_data(), headers={"Syncbn-Owner": owner})
        assert _fields(refused) == ["Syncbn-Owner"]


def test_a_job_that_comes_after_none_is_refused(service, api):
    first = service.submit()
    assert _fields(api.post("/v1/jobs", json=spec_data(after=[first.id, "job-9999"]))) == ["after.1"]
    assert _fields(api.post("/v1/jobs", json=spec_data(after=[first.id, first.id]))) == ["after"]
    assert api.post("/v1/jobs", json=spec_data(after=[first.id])).status_code == 201
