"""No route but health answers without the token."""

from collections.abc import Iterator

import httpx
import pytest
from starlette.routing import Route

from service.api.app import create_app
from service.api.auth import PUBLIC_PATHS
from tests.fake_uploads import fake_uploads
from tests.fakes import FakeJobStore, FakeRunFiles, FakeService


@pytest.fixture
def stranger(service: FakeService) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, trust_env=False, verify=False) as client:
        yield client


def all_routes(api: httpx.Client) -> list[tuple[str, str]]:
    schema = api.get("/openapi.json").json()
    listed = [(method.upper(), path) for path, methods in schema["paths"].items() for method in methods]
    return [*listed, ("GET", "/openapi.json")]


def test_every_route_but_health_refuses_a_request_without_a_token(service, api, stranger):
    routes = all_routes(api)
    assert len(routes) >= 15
    for method, path in routes:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {service.token}"}):
            url = path.format(job_id="job-1", step=1, name="x", sha256="0" * 64)
            # Whatever the body is: it is not looked at before the token.
            content = b"{" if method == "POST" else None
            answer = stranger.request(method, url, headers=headers, content=content)
            if path in PUBLIC_PATHS:
                assert answer.status_code == 200
                continue
            assert answer.status_code == 401, (method, path)
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")
            assert answer.headers["Content-Type"] == "application/problem+json"
            assert "Authorization: Bearer" in answer.json()["detail"]


def test_openapi_lists_every_route_of_the_app():
    app = create_app(store=FakeJobStore(), files=FakeRunFiles(), uploads=fake_uploads(), token="t")
    flat: list[Route] = []
    waiting = list(app.routes)
    while waiting:
        route = waiting.pop()
        inner = getattr(route, "routes", None) or getattr(getattr(route, "original_router", None), "routes", None)
        if inner:
            waiting.extend(inner)
        else:
            flat.append(route)
    undocumented = [route.path for route in flat if not getattr(route, "include_in_schema", True)]
    assert undocumented == ["/openapi.json"]


@pytest.mark.parametrize("header", [b"Bearer \xff\xfe", b"Bearer", b"", b"Bearer a b", "Bearer ключ".encode()])
def test_strange_tokens_are_refused(stranger, header):
    assert stranger.get("/v1/jobs", headers={b"Authorization": header}).status_code == 401


def test_a_token_beyond_ascii_works(service, stranger):
    service.stop()
    service.token = "schlüssel"
    service.start()
    headers = {b"Authorization": b"Bearer " + service.token.encode()}
    assert stranger.get("/v1/jobs", headers=headers).status_code == 200


def test_an_app_without_a_token_is_not_built():
    with pytest.raises(ValueError, match="token"):
        create_app(store=FakeJobStore(), files=FakeRunFiles(), uploads=fake_uploads(), token=" ")


def test_docs_pages_are_off(api):
    for path in ("/docs", "/redoc", "/docs/oauth2-redirect"):
        assert api.get(path).status_code == 404


def test_openapi_is_whole(api):
    schema = api.get("/openapi.json").json()

    def references(node: object) -> list[str]:
        if isinstance(node, dict):
            own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
            return own + [ref for value in node.values() for ref in references(value)]
        return [ref for item in node for ref in references(item)] if isinstance(node, list) else []

    for reference in references(schema):
        place = schema
        for part in reference.removeprefix("#/").split("/"):
            place = place[part]
    assert "steps" not in schema["components"]["schemas"]["JobSpec"]["required"]
    for methods in schema["paths"].values():
        for operation in methods.values():
            assert "application/problem+json" in operation["responses"]["default"]["content"]
