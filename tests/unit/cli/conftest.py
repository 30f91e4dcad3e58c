import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from service.cli.main import app
from tests.fakes import FakeService, running_services, service, wait_for

__all__ = ["running_services", "service"]


@pytest.fixture(autouse=True)
def own_environment(service: FakeService, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SYNCBN_URL", service.url)
    monkeypatch.setenv("SYNCBN_TOKEN", service.token)
    monkeypatch.setenv("SYNCBN_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def cli() -> Callable[..., Result]:
    """Run a command in this process."""
    return lambda *arguments, **options: CliRunner().invoke(app, [str(one) for one in arguments], **options)


class Processes:
    """Commands in processes of their own."""

    def __init__(self) -> None:
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "service.cli.main", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.started.append(process)
        return process

    def interrupt_when(self, process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
        wait_for(condition, timeout_s=30)
        process.send_signal(signal.SIGINT)


@pytest.fixture
def processes() -> Iterator[Processes]:
    processes = Processes()
    yield processes
    for process in processes.started:
        if process.poll() is None:
            process.kill()
        process.communicate()
