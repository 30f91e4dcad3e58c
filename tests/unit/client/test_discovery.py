"""Where the client looks for the service, and what it never does with a token."""

import json
from pathlib import Path

import pytest

from service.client.discovery import Endpoint, find_service, is_loopback
from service.client.errors import AuthenticationError, NoService

HERE = "http://127.0.0.1:1234"
ELSEWHERE = "https://gpu.example:8000"


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    (tmp_path / "service.json").write_text(json.dumps({"url": HERE, "pid": 1}))
    (tmp_path / "token").write_text("of-the-file\n")
    return tmp_path


def test_the_data_directory_is_enough(data_dir):
    assert find_service(data_dir=data_dir, environment={}) == Endpoint(url=HERE, token="of-the-file")


def test_what_is_given_goes_before_the_environment_and_that_before_the_directory(data_dir):
    environment = {"SYNCBN_URL": "http://localhost:2", "SYNCBN_TOKEN": "of-the-environment"}
    found = find_service(data_dir=data_dir, environment=environment)
    assert found == Endpoint(url="http://localhost:2", token="of-the-environment")
    found = find_service(data_dir=data_dir, url=HERE + "/", token="given", environment=environment)
    assert found == Endpoint(url=HERE, token="given")
    assert find_service(data_dir=data_dir, environment={"SYNCBN_URL": "", "SYNCBN_TOKEN": ""}).url == HERE


def test_the_token_of_the_service_here_is_not_sent_elsewhere(data_dir):
    with pytest.raises(AuthenticationError, match="SYNCBN_TOKEN"):
        find_service(data_dir=data_dir, url=ELSEWHERE, environment={})
    assert find_service(data_dir=data_dir, url=HERE, environment={}).token == "of-the-file"
    assert find_service(data_dir=data_dir, url=ELSEWHERE, token="given", environment={}).token == "given"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null"])
def test_a_broken_file_says_so(data_dir, content):
    (data_dir / "service.json").write_text(content)
    with pytest.raises(NoService, match=r"service\.json"):
        find_service(data_dir=data_dir, environment={})


def test_nothing_to_find(tmp_path):
    with pytest.raises(NoService, match="syncbn serve"):
        find_service(data_dir=tmp_path, environment={})
    with pytest.raises(AuthenticationError, match="token"):
        find_service(data_dir=tmp_path, url=HERE, environment={})


def test_a_token_is_not_shown():
    assert "secret" not in repr(Endpoint(url=HERE, token="secret"))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:1", True),
        ("http://127.9.9.9", True),
        ("http://localhost", True),
        ("http://[::1]:80", True),
        ("http://127.0.0.1.example", False),
        ("http://localhost.example", False),
        ("http://10.0.0.1", False),
        ("x", False),
    ],
)
def test_loopback(url, expected):
    assert is_loopback(url) is expected
