"""Cancel, pause, resume, resize and fork on the command line: what they print, and what they end with."""

import json

import pytest
import yaml

from tests.fakes import spec_data


@pytest.fixture
def parent(service):
    job = service.submit(workers={"min": 1, "max": 4}, steps=100)
    service.scheduler.start(job.id)
    for step in (10, 20):
        service.scheduler.checkpoint(job.id, step, {"model.safetensors": b"weights"})
    return job.id


def test_wishes_are_told_as_they_stand(service, cli, parent):
    job = service.submit()
    assert cli("pause", job.id).stdout == f"{job.id} paused\n"
    assert cli("resume", job.id).stdout == f"{job.id} queued\n"
    assert cli("resize", parent, 2).stdout == f"{parent} running (resize to 2 requested)\n"
    assert cli("pause", parent).stdout == f"{parent} running (pause requested, resize to 2 requested)\n"
    assert cli("cancel", job.id).stdout == f"{job.id} cancelled\n"
    shown = " ".join(cli("get", parent).stdout.split())
    assert "workers 1–4 workers wanted 2" in shown


def test_fork_prints_the_id_of_the_new_job(service, cli, parent):
    result = cli("fork", parent)
    assert result.exit_code == 0, result.stderr
    fork = service.store.get(result.stdout.strip())
    assert fork.forked_from.step == 20
    assert "syncbn watch" in result.stderr
    assert f"forked from step 20 of {parent}" in " ".join(cli("get", fork.id).stdout.split())


def test_fork_with_changes(service, cli, parent):
    result = cli(
        "fork", parent, "--step", 10, "--set", "optimizer.learning_rate=1e-4", "--set", "workers={min: 2, max: 3}",
        "--set", "labels.team.x=vision", "--name", "slow", "--format", "json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    fork = service.store.get(json.loads(result.stdout)["id"])
    assert (fork.forked_from.step, fork.spec.name, fork.spec.optimizer.learning_rate) == (10, "slow", 1e-4)
    assert (fork.spec.workers.min, fork.spec.workers.max, fork.spec.labels) == (2, 3, {"team.x": "vision"})


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (("fork", "JOB", "--set", "precision=float64"), 2, "precision: cannot change in a fork"),
        (("fork", "JOB", "--step", 15), 2, "step: there is no checkpoint of step 15"),
        (("fork", "JOB", "--set", "steps"), 2, "field=value"),
        (("fork", "JOB", "--set", "name=2024-01-01"), 2, "name: 2024-01-01 is read as date"),
        (("fork", "JOB", "--set", "labels={a: !!binary aGk=}"), 2, "labels: "),
        (("fork", "JOB", "--set", "optimizer.learning_rate=.nan"), 2, "optimizer.learning_rate: "),
        (("resize", "JOB", 9), 2, "workers: 9 is not within the workers of the job, 1 to 4"),
        (("resize", "JOB", "many"), 2, "valid integer"),
        (("resize", "JOB", 0), 2, "greater than or equal to 1"),
        (("resume", "JOB"), 1, "nothing to resume"),
        (("pause", "job-9"), 1, "no job 'job-9'"),
    ],
)
def test_what_cannot_be_done_ends_with_a_reason_and_a_code(cli, parent, arguments, code, part):
    result = cli(*(parent if argument == "JOB" else argument for argument in arguments))
    assert result.exit_code == code
    assert part in result.stderr
    assert result.stdout == ""


def test_a_dry_run_tells_of_other_numbers_of_workers(cli, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(spec_data(workers={"min": 1, "max": 3})))
    assert " ".join(cli("submit", path, "--dry-run").stdout.split()).startswith("workers 3 or also 2, 1 samples")
