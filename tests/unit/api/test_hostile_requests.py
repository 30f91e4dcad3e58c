"""Whatever a request holds, it is answered with a problem and never with a 500."""

import json
import socket
import time
from contextlib import suppress

import anyio
import pytest

from service.api.body import parse_document
from service.api.limits import MAX_BODY_BYTES, Allowance, BodyLimit
from service.api.problems import BODY_TOO_SLOW, Refused
from service.domain.errors import InvalidSpec
from service.domain.spec import JobSpec, parse_spec
from tests.fakes import FakeService, spec_data

BODIES = {
    "nan": b'{"optimizer": {"learning_rate": NaN}}',
    "infinity": b'{"optimizer": {"learning_rate": -Infinity}}',
    "overflow": b'{"optimizer": {"learning_rate": 1e999}}',
    "thousands of digits": b'{"seed": ' + b"9" * 5000 + b"}",
    "hundreds of digits": b'{"optimizer": {"learning_rate": ' + b"9" * 400 + b"}}",
    "surrogate value": rb'{"name": "\ud800"}',
    "surrogate name": rb'{"\udfff": 1}',
    "surrogate label": rb'{"labels": {"\ud800": "x"}}',
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "closed deep list": b"[" * 40 + b"]" * 40,
    "not utf-8": b'{"name": "\xff"}',
    "utf-16": '{"name": "x"}'.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf{}",
    "nothing": b"",
    "half": b'{"name": ',
    "twice": b'{"name": "a", "name": "b"}',
    "null": b"null",
    "list": b"[]",
    "number": b"1",
    "text": b'"x"',
    "control character": b'{"name": "a\x00b"}',
    "escaped nul": rb'{"name": "a\u0000b"}',
    "form": b"name=x&steps=1",
}


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/jobs/plan"])
@pytest.mark.parametrize("name", BODIES)
def test_a_hostile_body_is_a_problem(service, api, name, path):
    answer = api.post(path, content=BODIES[name])
    assert 400 <= answer.status_code < 500
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["status"] == answer.status_code
    assert not service.store.list_jobs().jobs


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (spec_data(optimizer__learning_rate=float("nan")), "optimizer.learning_rate"),
        (spec_data(optimizer__learning_rate=10**400), "optimizer.learning_rate"),
        (spec_data(labels={"a": ["\ud800"]}), "labels.a.0"),
    ],
)
def test_a_value_that_no_field_can_take_is_named(api, body, field):
    answer = api.post("/v1/jobs", content=json.dumps(body))
    assert answer.status_code == 422
    assert [problem["field"] for problem in answer.json()["errors"]] == [field]


def test_valid_values_in_every_wrong_place():
    fields = [
        *JobSpec.model_fields,
        "batch.size",
        "batch.max_per_rank",
        "model.args",
        "optimizer.name",
        "optimizer.betas",
    ]
    for value in (None, True, -1, 2**62, 1.5, "", "x" * 1000, [], [[]], {}, {"a": {}}):
        for field in fields:
            body = json.dumps(spec_data(**{field.replace(".", "__"): value})).encode()
            with suppress(InvalidSpec):  # what else is raised would be a 500
                parse_spec(parse_document(body).data)


def test_what_was_sent_is_not_echoed_without_end(api):
    answer = api.post("/v1/jobs", json=spec_data(**{"x" * 500_000: 1}))
    assert answer.status_code == 422
    assert len(answer.content) < 10_000
    many = api.post("/v1/jobs", json=spec_data(**{f"x{n}": 1 for n in range(5000)}))
    assert len(many.json()["errors"]) == 100


def test_a_body_that_says_it_is_too_large_is_not_read(service):
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])), timeout=5) as connection:
        connection.sendall(
            b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n",
        )
        assert connection.recv(4096).split(b" ")[1] == b"413"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused(service, api, chunked):
    size = MAX_BODY_BYTES + 1

    def chunks():
        for _ in range(size // 4096 + 1):
            yield b" " * 4096

    answer = api.post("/v1/jobs", content=chunks() if chunked else b" " * size)
    assert answer.status_code == 413
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.headers["Connection"] == "close"
    # The largest that is allowed is read to its end.
    assert api.post("/v1/jobs", content=json.dumps(spec_data()).encode().ljust(MAX_BODY_BYTES)).status_code == 201


def test_a_body_that_does_not_end_is_given_up():
    async def app(scope, receive, send):
        while True:
            await receive()

    async def receive():
        await anyio.sleep(0.02)  # a byte now and then keeps it waiting, but not longer
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def main() -> float:
        started = time.monotonic()
        limited = BodyLimit(app, usual=Allowance(deadline_s=0.1))
        with pytest.raises(Refused) as caught:
            await limited({"type": "http", "headers": [], "path": "/"}, receive, None)
        assert caught.value.problem is BODY_TOO_SLOW
        return time.monotonic() - started

    assert anyio.run(main) < 2


def test_an_upload_may_take_its_time_as_long_as_it_goes_on_arriving():
    async def app(scope, receive, send):
        while (await receive())["more_body"]:
            pass

    def pieces(pauses_s):
        left = list(pauses_s)

        async def receive():
            await anyio.sleep(left.pop(0))
            return {"type": "http.request", "body": b" ", "more_body": bool(left)}

        return receive

    allowed = Allowance(deadline_s=30.0, silence_s=0.2)
    limited = BodyLimit(app, usual=Allowance(deadline_s=0.01), exceptions={("POST", "/v1/bundles"): allowed})
    scope = {"type": "http", "method": "POST", "headers": [], "path": "/v1/bundles"}

    async def main() -> None:
        await limited(scope, pieces([0.02] * 20), None)
        with pytest.raises(Refused) as caught:
            await limited(scope, pieces([0.02, 5.0]), None)
        assert caught.value.problem is BODY_TOO_SLOW

    anyio.run(main)


def test_unknown_routes_and_methods_are_problems(api):
    assert api.get("/v2/jobs").json()["status"] == 404
    assert api.get("/v1/jobs/").json()["status"] == 404
    answer = api.put("/v1/jobs")
    assert answer.status_code == 405
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert "POST" in answer.headers["Allow"] or "GET" in answer.headers["Allow"]


def test_an_unexpected_error_is_a_problem_without_its_details(service, api, caplog):
    service.store.error = RuntimeError("password=hunter2")
    answer = api.get("/v1/jobs")
    assert answer.status_code == 500
    assert answer.json()["type"] == "urn:syncbn:problem:internal"
    assert "hunter2" not in answer.text


def test_a_database_that_is_away_is_503(service: FakeService, api):
    service.store.unavailable = True
    for path in ("/v1/jobs", "/readyz"):
        answer = api.get(path)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert answer.json()["type"] == "urn:syncbn:problem:unavailable"
    assert api.get("/healthz").json() == {"status": "ok"}
    service.store.unavailable = False
    assert api.get("/readyz").json() == {"status": "ready"}
