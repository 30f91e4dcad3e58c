"""Ranks that are stopped, of every world and place, and every process of Ray's own killed under a job."""

from collections.abc import Callable, Iterator

import pytest

from tests.acceptance.embedded_service import EmbeddedServiceProcess
from tests.acceptance.faults import (
    COLLECTIVE_TIMEOUT_S,
    IMPATIENT,
    NAMING_S,
    RECOVERY_S,
    kill_a_part_of_ray,
    stop_a_rank,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServiceProcess]:
    running = EmbeddedServiceProcess(tmp_path_factory.mktemp("impatient") / "data", environment=IMPATIENT)
    yield running
    assert running.stop() == 0


@pytest.mark.parametrize(("num_workers", "victim"), [(1, 0), (2, 0), (3, 0), (3, 1), (3, 2)])
def test_a_stopped_rank(
    impatient: EmbeddedServiceProcess,
    num_workers: int,
    victim: int,
    record_property: Callable[[str, object], None],
) -> None:
    record_property("owed", f"named within {COLLECTIVE_TIMEOUT_S + NAMING_S:g} s and killed; the job goes on")
    noticed_s = stop_a_rank(impatient, num_workers=num_workers, victim=victim, num_steps=150)
    record_property("seen", f"named after {noticed_s:.1f} s")


@pytest.mark.parametrize("victim", ["ray", "gcs_server", "raylet"])
def test_a_part_of_ray(
    impatient: EmbeddedServiceProcess, victim: str, record_property: Callable[[str, object], None]
) -> None:
    record_property("owed", f"the API answers all the while; the job runs again within {RECOVERY_S:g} s")
    recovered_s, num_answers = kill_a_part_of_ray(impatient, victim=victim, num_steps=1000)
    record_property("seen", f"{num_answers} answers, 0 failures; running again after {recovered_s:.1f} s")
