"""The commands of queues, and whose jobs are. A failure names an option that is lost on its way to the service."""

import json

import pytest

from service.domain.queue import Queue, Quota
from tests.fakes import spec_data


def _table(output):
    header, *rows = (line.split() for line in output.splitlines())
    return header, rows


def test_a_queue_is_made_changed_and_removed(service, cli):
    made = cli("queue", "set", "research", "--weight", 3, "--quota", "gpus=8", "--quota-per-owner", "jobs=2")
    assert (made.exit_code, made.stdout.strip()) == (0, "research")
    expected = Queue(name="research", weight=3.0, quota=Quota(gpus=8), quota_per_owner=Quota(jobs=2))
    assert service.store.queues()[1] == expected
    # What is not named stays.
    assert cli("queue", "set", "research", "--quota", "cpus=0.5", "--quota", "gpus=none", "--pause").exit_code == 0
    changed = expected.model_copy(update={"quota": Quota(cpus=0.5), "paused": True})
    assert service.store.queues()[1] == changed
    assert cli("queue", "rm", "research").exit_code == 0
    assert [queue.name for queue in service.store.queues()] == ["default"]
    assert cli("queue", "rm", "research").exit_code == 1


def test_queues_are_listed(service, cli):
    cli("queue", "set", "research", "--quota", "gpus=8")
    service.submit(queue="research")
    header, rows = _table(cli("queue", "ls").stdout)
    assert header[:4] == ["QUEUE", "WEIGHT", "QUEUED", "LIVE"]
    assert [row[:4] for row in rows] == [["default", "1", "0", "0"], ["research", "1", "1", "0"]]
    assert "gpus=8" in rows[1]
    shown = json.loads(cli("queue", "ls", "--format", "json").stdout)["queues"]
    assert [one["queue"]["name"] for one in shown] == ["default", "research"]


@pytest.mark.parametrize("quota", ["tpus=8", "gpus", "gpus=", "gpus=-1", "gpus=half", "cpus=nan"])
def test_a_limit_that_cannot_be_is_a_usage_error(service, cli, quota):
    refused = cli("queue", "set", "research", "--quota", quota)
    assert refused.exit_code == 2
    assert "--quota" in refused.output
    assert len(service.store.queues()) == 1


@pytest.mark.parametrize(
    ("arguments", "at_fault", "remedy"),
    [
        (["Foo"], "QUEUE", "lower-case"),
        (["a" * 64], "QUEUE", "1 to 63"),
        (["research", "--weight", 0], "--weight", "--pause"),
        (["research", "--weight", -1], "--weight", "above 0"),
        (["research", "--weight", "nan"], "--weight", "above 0"),
        (["research", "--weight", 1e7], "--weight", "at most"),
    ],
)
def test_a_name_or_weight_that_cannot_be_is_a_usage_error(service, cli, arguments, at_fault, remedy):
    refused = cli("queue", "set", *arguments)
    assert refused.exit_code == 2
    said = " ".join(refused.output.split())
    assert at_fault in said
    assert remedy in said
    assert len(service.store.queues()) == 1


def test_jobs_are_of_the_user_who_submits_them(service, cli, tmp_path, monkeypatch):
    file = tmp_path / "job.json"
    file.write_text(json.dumps(spec_data()))
    monkeypatch.setenv("SYNCBN_OWNER", "ada@lab")
    job_id = cli("submit", file).stdout.strip()
    assert service.store.get(job_id).owner == "ada@lab"
    monkeypatch.delenv("SYNCBN_OWNER")
    monkeypatch.setenv("LOGNAME", "grace")
    job_id = cli("submit", file).stdout.strip()
    assert service.store.get(job_id).owner == "grace"
