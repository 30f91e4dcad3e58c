"""One embedded service for the tests that do not break it; every test leaves the machine as it found it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.acceptance.embedded_service import EmbeddedServiceProcess, wait_until


def _left_on_the_machine() -> set[Path]:
    # Ray's own default session directory would be /tmp/ray.
    shared_memory = {path for path in Path("/dev/shm").iterdir() if not path.name.startswith("PostgreSQL.")}
    return shared_memory | set(Path("/tmp").glob("ray"))


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServiceProcess]:
    before = _left_on_the_machine()
    running = EmbeddedServiceProcess(tmp_path_factory.mktemp("service") / "data")
    yield running
    assert running.stop() == 0
    assert _left_on_the_machine() <= before


@pytest.fixture(autouse=True)
def no_training_process_outlives_its_test() -> Iterator[None]:
    """Every service of these tests is a descendant of this process, and so are its ranks."""
    yield
    wait_until(lambda: not _ranks(), 10, lambda: f"left behind: {_ranks()}")


def _ranks() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name().startswith("syncbn-rank-") and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.fixture
def start_service(tmp_path: Path) -> Iterator[Callable[[], EmbeddedServiceProcess]]:
    """Starts services on one data directory, one after another; none of them outlives the test."""
    started: list[EmbeddedServiceProcess] = []

    def start() -> EmbeddedServiceProcess:
        started.append(EmbeddedServiceProcess(tmp_path / "data"))
        return started[-1]

    yield start
    for running in reversed(started):
        running.stop()


@pytest.fixture
def clean_machine() -> Iterator[None]:
    before = _left_on_the_machine()
    yield
    assert _left_on_the_machine() <= before
