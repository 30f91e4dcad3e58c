"""A rank that stands still without dying, and a Ray cluster that loses its head, while a job trains.

A failure means a gang that waits for ever, an effect that is told as the cause, an API that depends on Ray, or an
attempt that runs beside the one before it.
"""

from collections.abc import Iterator

import pytest

from tests.acceptance.embedded_service import EmbeddedServiceProcess
from tests.acceptance.faults import IMPATIENT, kill_a_part_of_ray, stop_a_rank

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServiceProcess]:
    running = EmbeddedServiceProcess(tmp_path_factory.mktemp("impatient") / "data", environment=IMPATIENT)
    yield running
    assert running.stop() == 0


def test_a_stopped_rank_is_named_and_killed_and_the_job_goes_on(impatient: EmbeddedServiceProcess) -> None:
    stop_a_rank(impatient, num_workers=2, victim=1, num_steps=150)


def test_the_api_and_the_job_outlive_the_head_of_ray(impatient: EmbeddedServiceProcess) -> None:
    # Steps take 10 ms or so; whatever the machine, it is not through before the head is killed.
    kill_a_part_of_ray(impatient, victim="gcs_server", num_steps=1000)
