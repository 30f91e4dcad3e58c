"""Submitting, listing, looking at, cancelling and planning jobs."""

import pytest

from service.domain.job import JobStatus
from service.domain.journal import Launched, Running
from service.domain.placement import Node, Resources
from service.domain.spec import parse_spec
from tests.contract.store_examples import records
from tests.fakes import FakeService, spec_data

CAPACITY = [Node(id="n1", address="10.0.0.1", total=Resources(cpus=4.0, gpus=1, memory_bytes=2**30))]


@pytest.fixture
def small(service: FakeService) -> FakeService:
    service.stop()
    service.capacity = CAPACITY
    service.start()
    return service


def test_submit_stores_a_job_and_nudges(service, api):
    answer = api.post("/v1/jobs", json=spec_data())
    assert answer.status_code == 201
    job = answer.json()
    assert answer.headers["Location"] == f"/v1/jobs/{job['id']}"
    assert "Idempotent-Replayed" not in answer.headers
    assert service.nudges == 1
    assert api.get(answer.headers["Location"]).json() == job
    assert job["status"] == "queued"
    assert job["spec"]["model"]["args"]["hidden_sizes"] == [128, 128]  # the default, written out


def test_a_lost_nudge_does_not_lose_the_answer(service, api, monkeypatch):
    def broken() -> None:
        raise OSError("nobody listens")

    monkeypatch.setattr(service, "_nudge", broken)
    service.stop()
    service.start()
    assert api.post("/v1/jobs", json=spec_data()).status_code == 201


def test_an_idempotency_key_names_one_job(service, api):
    headers = {"Idempotency-Key": "one"}
    first = api.post("/v1/jobs", json=spec_data(), headers=headers)
    # The same document, written differently.
    again = api.post("/v1/jobs", json=dict(reversed(spec_data().items())), headers=headers)
    assert (again.status_code, again.json()) == (201, first.json())
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.headers["Location"] == first.headers["Location"]
    other = api.post("/v1/jobs", json=spec_data(steps=11), headers=headers)
    assert other.status_code == 422
    assert other.json()["type"] == "urn:syncbn:problem:idempotency-conflict"
    assert len(service.store.list_jobs().jobs) == 1
    assert service.nudges == 1


def test_two_owners_may_use_the_same_idempotency_key(service, api):
    answers = {}
    for owner in ("ada", "token", "grace"):
        headers = {"Idempotency-Key": "one", "Syncbn-Owner": owner}
        answers[owner] = api.post("/v1/jobs", json=spec_data(), headers=headers).json()
        assert answers[owner]["owner"] == owner
        again = api.post("/v1/jobs", json=spec_data(), headers=headers)
        assert (again.json(), again.headers["Idempotent-Replayed"]) == (answers[owner], "true")
    assert len({job["id"] for job in answers.values()}) == 3
    assert {owner for owner, _, _ in service.store._keys} == {"token/ada", "token/token", "token/grace"}


def test_keys_that_name_no_owner_are_known_as_ever(service, api):
    for headers in ({}, {"Syncbn-Owner": "default"}):
        api.post("/v1/jobs", json=spec_data(), headers={"Idempotency-Key": "one", **headers})
    assert list(service.store._keys) == [("token", "POST /v1/jobs", "one")]


def test_a_repeated_request_is_answered_as_the_first_was_whatever_would_be_refused_by_now(small, api):
    headers = {"Idempotency-Key": "one"}
    first = api.post("/v1/jobs", json=spec_data(workers=2), headers=headers)
    assert first.status_code == 201
    small.stop()
    small.capacity = [Node(id="n1", address="", total=Resources(cpus=1.0))]
    small.start()
    again = api.post("/v1/jobs", json=spec_data(workers=2), headers=headers)
    assert (again.status_code, again.json()) == (201, first.json())
    assert again.headers["Idempotent-Replayed"] == "true"
    assert api.post("/v1/jobs", json=spec_data(workers=2)).status_code == 422


@pytest.mark.parametrize("key", ["", "a" * 256, "tab\there", b"\xe9"])
def test_a_key_must_be_short_and_printable(service, api, key):
    answer = api.post("/v1/jobs", json=spec_data(), headers={"Idempotency-Key": key})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "Idempotency-Key"
    assert not service.store.list_jobs().jobs


@pytest.mark.parametrize(
    ("changes", "field", "part"),
    [
        ({"bogus": 1}, "bogus", "unknown field"),
        ({"batch__max_per_rank": 4}, "batch.max_per_rank", "Use 4 worker(s)"),
        ({"optimizer": {"name": "adamw", "learning_rate": -1}}, "optimizer.learning_rate", "greater than 0"),
        ({"model__factory": "builtin:mpl"}, "model.factory", "Did you mean builtin:mlp"),
        ({"model__args": {"hidden_sizes": [0]}}, "model.args.hidden_sizes.0", "greater than or equal to 1"),
        ({"steps": None}, "steps", "either steps or epochs"),
        ({"name": None}, "name", "string"),
    ],
)
def test_a_bad_field_is_named_as_the_user_wrote_it(api, changes, field, part):
    for path in ("/v1/jobs", "/v1/jobs/plan"):
        answer = api.post(path, json=spec_data(**changes))
        assert answer.status_code == 422
        assert answer.json()["type"] == "urn:syncbn:problem:invalid-spec"
        (problem,) = answer.json()["errors"]
        assert problem["field"] == field
        assert part in problem["message"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"workers": 5}, "workers"),
        ({"resources__cpus_per_rank": 5}, "resources.cpus_per_rank"),
        ({"resources__gpus_per_rank": 2}, "resources.gpus_per_rank"),
        ({"resources__memory_bytes_per_rank": 2**31}, "resources.memory_bytes_per_rank"),
        ({"resources": {"cpus_per_rank": 5, "gpus_per_rank": 2}}, "resources"),
    ],
)
def test_a_job_that_can_never_fit_is_refused(small, api, changes, field):
    answer = api.post("/v1/jobs", json=spec_data(**changes))
    assert answer.status_code == 422
    assert [problem["field"] for problem in answer.json()["errors"]] == [field]
    assert not small.store.list_jobs().jobs
    plan = api.post("/v1/jobs/plan", json=spec_data(**changes)).json()
    assert plan["fits"] is False
    assert "refused" in plan["reason"]


def test_plan_says_how_a_job_would_run_and_starts_nothing(service, api):
    data = spec_data(workers=3, batch={"size": 16, "normalization_size": 8}, steps=None, epochs=2)
    answer = api.post("/v1/jobs/plan", json=data)
    assert answer.status_code == 200
    plan = answer.json()
    assert plan["world_size"] == 3
    assert plan["samples_per_rank"] == [3, 3, 2]
    assert plan["num_micro_steps"] == 2
    assert plan["num_steps"] == 2 * (1438 // 16)
    assert plan["resources"] == {"cpus": 3.0, "gpus": 0, "memory_bytes": 0}
    assert (plan["fits"], plan["reason"]) == (None, "The scheduler has not seen the cluster yet.")
    service.store.record_nodes(service.scheduler._lease(), CAPACITY)
    plan = api.post("/v1/jobs/plan", json=data).json()
    assert plan["fits"] is True
    assert plan["start"] == {"now": True, "message": None, "position": None, "in_s": 0.0}
    waits = api.post("/v1/jobs/plan", json={**data, "workers": 5}).json()
    assert waits["fits"] is False
    assert "wait" in waits["reason"]
    assert not service.store.list_jobs().jobs
    assert service.nudges == 0


def test_plan_says_why_a_job_would_wait_and_for_how_long(service, api):
    lease = service.scheduler._lease()
    service.store.record_nodes(lease, CAPACITY)
    num_cpus = int(sum(node.total.cpus for node in CAPACITY))
    running, _ = service.store.submit(parse_spec(spec_data(workers=num_cpus, expected_s=600)))
    service.store.create_attempt(lease, running.id, node_ids=[CAPACITY[0].id] * num_cpus)
    ahead, _ = service.store.submit(parse_spec(spec_data(workers=2, expected_s=60)))
    start = api.post("/v1/jobs/plan", json=spec_data(workers=num_cpus)).json()["start"]
    assert (start["now"], start["position"]) == (False, 2)
    assert start["message"] == f"Needs {num_cpus} × (1 CPU) at once; 0 free. 2nd in queue default."
    # The store dates the attempt a moment before the cluster was seen, or after.
    assert start["in_s"] == pytest.approx(660, abs=30)
    assert service.store.get(ahead.id).message == "Waits to be placed.", "nothing is started or told"


def test_plan_refuses_what_submitting_refuses(service, api):
    other = service.submit()
    service.store.record_nodes(service.scheduler._lease(), CAPACITY)
    for changes in ({"queue": "nosuch"}, {"after": [other.id, "job-nope"]}):
        refusals = [api.post(path, json=spec_data(**changes)) for path in ("/v1/jobs", "/v1/jobs/plan")]
        assert [answer.status_code for answer in refusals] == [422, 422]
        submitted, planned = (answer.json() for answer in refusals)
        assert planned["errors"] == submitted["errors"] != []
    assert [job.id for job in service.store.list_jobs().jobs] == [other.id]


def test_plan_says_what_keeps_a_job_from_starting_whatever_is_free(service, api):
    first = service.submit()
    service.store.record_nodes(service.scheduler._lease(), CAPACITY)
    start = api.post("/v1/jobs/plan", json=spec_data(after=[first.id])).json()["start"]
    message = f"Waits for the success of 1 job(s): {first.id}."
    assert start == {"now": False, "message": message, "position": None, "in_s": None}
    start = api.post("/v1/jobs/plan", json=spec_data(hold=True)).json()["start"]
    assert (start["now"], start["in_s"]) == (False, None)
    assert "Resume it" in start["message"]


def test_plan_reckons_with_jobs_that_are_resized(service, api):
    lease = service.scheduler._lease()
    service.store.record_nodes(lease, CAPACITY)
    node_id, num_cpus = CAPACITY[0].id, int(sum(node.total.cpus for node in CAPACITY))
    elastic = service.submit(workers={"min": 1, "max": num_cpus}, batch={"size": 16 * num_cpus}, expected_s=1000)
    service.store.create_attempt(lease, elastic.id, node_ids=[node_id])
    service.store.ingest(lease, elastic.id, 1, records(Launched(supervisor_pid=1), Running(num_steps=1000)))
    service.store.mark_resizing(lease, elastic.id, 1, node_ids=[node_id] * num_cpus, message="Asked to stop.")
    start = api.post("/v1/jobs/plan", json=spec_data(workers=num_cpus)).json()["start"]
    # What took its one worker so long takes the others a part of it.
    assert start["in_s"] == pytest.approx(1000 / num_cpus, rel=0.1)


def test_list_pages_newest_first(service, api):
    ids = [service.submit(name=f"job{n}").id for n in range(5)]
    seen, cursor = [], None
    while True:
        page = api.get("/v1/jobs", params={"limit": 2, **({"cursor": cursor} if cursor else {})}).json()
        seen += [job["id"] for job in page["jobs"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
        service.submit(name="later")  # a page does not move under the reader
    assert seen == ids[::-1]


def test_list_filters(service, api):
    red = service.submit(name="red", labels={"team": "vision", "x": "1"})
    blue = service.submit(name="blue", labels={"team": "vision"})
    service.store.request_cancel(blue.id)

    def ids(query: str) -> list[str]:
        return [job["id"] for job in api.get(f"/v1/jobs?{query}").json()["jobs"]]

    assert ids("") == [blue.id, red.id]
    assert ids("status=queued") == [red.id]
    assert ids("status=queued&status=cancelled") == [blue.id, red.id]
    assert ids("name=blue") == [blue.id]
    assert ids("label=team=vision&label=x=1") == [red.id]
    assert ids("label=team=") == []


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=501", "limit"),
        ("limit=" + "9" * 5000, "limit"),
        ("limit=NaN", "limit"),
        ("status=done", "status.0"),
        ("label=team", "label.0"),
        ("name=%00", "name"),
        ("nmae=x", "nmae"),
        ("cursor=%00", "cursor"),
    ],
)
def test_a_bad_query_is_refused(api, query, field):
    answer = api.get(f"/v1/jobs?{query}")
    assert answer.status_code == 422
    assert [problem["field"] for problem in answer.json()["errors"]] == [field]


def test_a_foreign_cursor_is_refused(api):
    answer = api.get("/v1/jobs", params={"cursor": "abc"})
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:syncbn:problem:invalid-cursor")


@pytest.mark.parametrize(
    "job_id", ["job-9", "plan", "%00", "..%2f..", "a" * 500, "\ud800".encode("utf-8", "surrogatepass")]
)
def test_an_unknown_job_is_not_found(api, job_id):
    job_id = job_id if isinstance(job_id, str) else "%ed%a0%80"
    for path in ("", "/attempts", "/events", "/metrics", "/logs", "/checkpoints", "/stream", "/checkpoints/1/files/x"):
        answer = api.get(f"/v1/jobs/{job_id}{path}")
        assert answer.status_code == 404, path
        assert answer.json()["type"] == "urn:syncbn:problem:not-found"
    assert api.post(f"/v1/jobs/{job_id}/cancel").status_code == 404


def test_cancel(service, api):
    job = service.submit()
    answer = api.post(f"/v1/jobs/{job.id}/cancel", headers={"Idempotency-Key": "k"})
    assert (answer.status_code, answer.json()["status"]) == (202, "cancelled")
    assert service.nudges == 1
    assert api.post(f"/v1/jobs/{job.id}/cancel", headers={"Idempotency-Key": "k"}).status_code == 202

    running = service.submit()
    service.scheduler.start(running.id)
    for _ in range(2):
        answer = api.post(f"/v1/jobs/{running.id}/cancel")
        assert (answer.status_code, answer.json()["cancel_requested"]) == (202, True)

    done = service.submit()
    service.scheduler.start(done.id)
    service.scheduler.end(done.id)
    answer = api.post(f"/v1/jobs/{done.id}/cancel")
    assert (answer.status_code, answer.json()["type"]) == (409, "urn:syncbn:problem:invalid-transition")
    assert service.store.get(done.id).status is JobStatus.SUCCEEDED


def test_cluster(service, api):
    assert api.get("/v1/cluster").json()["observed_at"] is None
    service.store.record_nodes(service.scheduler._lease(), CAPACITY)
    shown = api.get("/v1/cluster").json()
    total = {"cpus": 4.0, "gpus": 1, "memory_bytes": 2**30}
    assert shown["nodes"] == [{"id": "n1", "address": "10.0.0.1", "total": total}]
    assert shown["total"] == total
    assert shown["observed_at"] is not None
