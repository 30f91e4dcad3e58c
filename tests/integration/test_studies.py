"""The studies run through a service, on jobs too short for their figures to mean anything.

A failure is a study that no longer fits the service: a field, a metric or a model that it names, or the client.
"""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from service.linux import die_with_parent
from tests.acceptance.embedded_service import EmbeddedServiceProcess

STUDIES = Path(__file__).parents[2] / "examples" / "studies"
NAMES = ("small_batches", "batch_size", "learning_rate", "covariate_shift", "dropout_and_inference")
DRAWN = NAMES[1:]
DEADLINE_S = 180.0

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all studies have written to, which share a service and its queue."""
    folder = tmp_path_factory.mktemp("studies")
    service = EmbeddedServiceProcess(folder / "data", num_cpus=4)
    try:
        options = ["--quick", "--server", service.url, "--token", service.token, "--output", str(folder)]
        studies = {name: start(name, options, folder / f"{name}.out") for name in NAMES}
        for name, study in studies.items():
            assert study.wait(DEADLINE_S) == 0, (folder / f"{name}.out").read_text()
    finally:
        service.stop()
    return folder


def start(name: str, options: list[str], output: Path) -> "subprocess.Popen[bytes]":
    with output.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, str(STUDIES / f"{name}.py"), *options],
            stdout=out,
            stderr=subprocess.STDOUT,
            preexec_fn=partial(die_with_parent, os.getpid(), signal.SIGKILL),
        )


@pytest.mark.parametrize("name", NAMES)
def test_a_study_prints_a_table_and_keeps_its_figures(outputs: Path, name: str) -> None:
    assert "\n| --- |" in (outputs / f"{name}.out").read_text()
    assert json.loads((outputs / f"{name}.json").read_text())["study"] == name


@pytest.mark.parametrize("name", DRAWN)
def test_a_study_draws_a_plot_that_a_page_can_carry(outputs: Path, name: str) -> None:
    plot = (outputs / f"{name}.png").read_bytes()
    assert plot.startswith(b"\x89PNG")
    assert len(plot) <= 150 * 1024


def test_four_ranks_begin_as_one_process_does_and_local_statistics_do_not(outputs: Path) -> None:
    results = json.loads((outputs / "small_batches.json").read_text())["results"]
    for found in results.values():
        one, sync, local = (
            found["train/loss of step 1"][trial]
            for trial in ("one process, the whole batch", "4 ranks, synchronized", "4 ranks, each its own statistics")
        )
        # The same sums in another order, in float32; a loss here is near 2.
        assert sync == pytest.approx(one, abs=1e-5)
        assert local != pytest.approx(one, abs=1e-3)


def test_batch_norm_computes_the_same_for_one_sample_as_for_many(outputs: Path) -> None:
    compared = json.loads((outputs / "dropout_and_inference.json").read_text())["one_against_64"]
    for found in compared.values():
        assert found["norm_layers"] == 0
        # Outputs are near 1; convolutions and matrix products of another shape add in another order.
        assert found["float32"] < 1e-5
        assert found["float64"] < 1e-13
