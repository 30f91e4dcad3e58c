"""A job whose newest checkpoint was damaged, or cannot be written.

A failure means that damage reaches the training, that a job falls further back than it has to, or that a disk that is
full for a while costs more than the checkpoints that did not fit.
"""

import asyncio
import random
from pathlib import Path

import pytest

from service.cluster.supervisor import Supervisor
from service.domain.job import Checkpoint
from service.domain.journal import CheckpointQuarantined, Warned, utc_now
from service.domain.ports import Launch
from service.domain.rank_protocol import Staged
from service.storage.checkpoints import fetch_checkpoint, publish_checkpoint
from service.storage.manifest import verify_directory
from service.storage.object_store import ObjectStore
from tests.integration.training.gang import JOB_ID, MLP, Gang, job_spec, run_job


@pytest.fixture(scope="module")
def spec():
    return job_spec(model=MLP, precision="float64", steps=12, checkpoint={"every_steps": 5})


@pytest.fixture(scope="module")
def undisturbed(spec, tmp_path_factory):
    return run_job(spec, world_size=2, staging_dir=tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(params=["local", "s3"])
def storage_url(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "runs")
    return f"s3://{request.getfixturevalue('s3_server').bucket}/{tmp_path.name}"


def _committed(report):
    return Checkpoint(
        job_id=JOB_ID,
        attempt=1,
        step=report.step,
        path=report.path,
        manifest_sha256=report.manifest_sha256,
        files=report.files,
        metrics=report.metrics,
        created_at=utc_now(),
    )


@pytest.mark.parametrize("name", ["model.safetensors", "training_state.pt", "manifest.json"])
def test_a_damaged_checkpoint_is_quarantined_and_the_one_before_gives_the_same_result(
    spec, undisturbed, storage_url, tmp_path, name
):
    store = ObjectStore(storage_url)
    five, ten = (
        _committed(publish_checkpoint(store, JOB_ID, 1, step, undisturbed.staged_dirs[step])) for step in (5, 10)
    )
    content = bytearray(store.read(f"{ten.path}/{name}"))
    content[random.Random(name).randrange(len(content))] ^= 4
    store.write(f"{ten.path}/{name}", bytes(content))

    launch = Launch(
        job_id=JOB_ID,
        attempt=2,
        spec=spec,
        node_ids=("a", "a"),
        storage_url=storage_url,
        storage_id=store.identify(),
        checkpoints=(ten, five),
        collective_timeout_s=1.0,
        start_timeout_s=1.0,
        stop_grace_s=1.0,
    )
    supervisor = Supervisor(launch, "supervisor/one")
    chosen = asyncio.run(supervisor._choose_checkpoint())
    assert chosen == five
    (record,) = asyncio.run(supervisor.read(0, 0.0))
    assert isinstance(record.report, CheckpointQuarantined)
    assert record.report.step == 10

    directory = fetch_checkpoint(store, chosen, tmp_path / "cache")
    resumed = run_job(spec, world_size=2, staging_dir=tmp_path / "resumed", resume_dir=directory)
    assert resumed.curve("train/loss") == undisturbed.curve("train/loss")[5:]
    weights = [(run.staged_dirs[12] / "model.safetensors").read_bytes() for run in (resumed, undisturbed)]
    assert weights[0] == weights[1]


class _Disk:
    """Where checkpoints are staged; it can stop taking anything."""

    def __init__(self, staging_dir: Path) -> None:
        self._staging, self._aside = staging_dir / "staging", staging_dir / "aside"

    def refuse(self) -> None:
        self._staging.rename(self._aside)
        self._staging.write_text("not a directory")

    def accept(self) -> None:
        self._staging.unlink()
        self._aside.rename(self._staging)


def _job(on_failure):
    return job_spec(model=MLP, steps=10**6, checkpoint={"every_steps": 3, "on_failure": on_failure})


def test_a_disk_that_refuses_for_a_while_costs_the_checkpoints_of_that_while(tmp_path):
    disk = _Disk(tmp_path)
    with Gang(_job("continue"), world_size=2, staging_dir=tmp_path) as gang:
        rank = gang.ranks[0]
        gang.wait_for(lambda: rank.of(Staged))
        disk.refuse()
        gang.wait_for(lambda: rank.of(Warned))
        warning = rank.of(Warned)[0].message
        good = rank.of(Staged)[-1]
        disk.accept()
        verify_directory(Path(good.directory))
        gang.wait_for(lambda: rank.of(Staged)[-1].step > good.step)
        gang.request_stop(0)
        ranks = gang.wait_for_the_end()
    assert "could not be written below" in warning
    assert "Training goes on" in warning
    assert [(rank.exit_status, rank.finished.stopped) for rank in ranks] == [(0, True)] * 2
    assert ranks[0].of(Staged)[-1].step == ranks[0].finished.step
    for directory in ranks[0].staged_dirs.values():
        verify_directory(directory)


def test_a_job_that_needs_its_checkpoints_ends_without_one(tmp_path):
    disk = _Disk(tmp_path)
    with Gang(_job("stop"), world_size=2, staging_dir=tmp_path) as gang:
        rank = gang.ranks[0]
        gang.wait_for(lambda: rank.of(Staged))
        disk.refuse()
        ranks = gang.wait_for_the_end()
    assert ranks[0].exit_status == 1
    assert (ranks[0].errored.cause, ranks[0].errored.error_type) == ("checkpoint", "CheckpointFailed")
    assert ranks[1].errored.cause == "collective"
