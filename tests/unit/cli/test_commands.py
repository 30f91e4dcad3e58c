"""The commands against the API over a fake store."""

import json
import re
import threading
from pathlib import Path

import pytest
import yaml

from service.cli.output import inert, one_line
from service.domain.job import Failure, Outcome, Reason
from tests.fakes import spec_data, wait_for

EXAMPLE = Path(__file__).parents[3] / "examples" / "digits.yaml"


@pytest.fixture
def job_file(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(spec_data()))
    return path


def test_submit_prints_the_id(service, cli, job_file):
    for arguments in (("submit", job_file), ("submit", "-f", job_file), ("submit", "--file", job_file)):
        result = cli(*arguments)
        assert result.exit_code == 0
        assert result.stdout.strip() == service.store.list_jobs().jobs[0].id
        assert "syncbn watch" in result.stderr
    result = cli("submit", "-", input=job_file.read_text())
    assert result.exit_code == 0
    assert len(service.store.list_jobs().jobs) == 4
    assert json.loads(cli("submit", job_file, "--format", "json").stdout)["status"] == "queued"


def test_submit_with_changes(service, cli, job_file):
    result = cli(
        "submit", job_file, "--set", "batch.size=32", "--set", "labels.team=vision", "--set", "optimizer={name: adamw}",
        "--set", "optimizer.learning_rate=1e-4", "--set", "name=new",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    spec = service.store.list_jobs().jobs[0].spec
    assert (spec.batch.size, spec.labels, spec.name) == (32, {"team": "vision"}, "new")
    assert (spec.optimizer.name, spec.optimizer.learning_rate) == ("adamw", 1e-4)


@pytest.mark.parametrize(
    ("text", "arguments", "part"),
    [
        ("name: [", (), "is not YAML"),
        ("name: a\nname: b", (), "'name' is given twice"),
        ("- a", (), "mapping"),
        ("", (), "mapping"),
        ("a: !!python/object:os.system {}", (), "is not YAML"),
        ("\x00", (), "is not YAML"),
        (yaml.safe_dump(spec_data(batch__size=0)), (), "batch.size: "),
        (yaml.safe_dump(spec_data(batch__sise=1)), (), "batch.sise: unknown field"),
        (yaml.safe_dump(spec_data(optimizer={"name": "sgd", "learning_rate": float("nan")})), (), "finite"),
        (yaml.safe_dump(spec_data()), ("--set", "steps"), "field=value"),
        (yaml.safe_dump(spec_data()), ("--set", "steps=["), "not YAML"),
        (yaml.safe_dump(spec_data()), ("--set", "name.x=1"), "has no fields"),
        (yaml.safe_dump(spec_data()), ("--set", ".x=1"), "field=value"),
    ],
)
def test_a_job_that_is_wrong_is_refused_before_any_request(service, cli, job_file, text, arguments, part):
    service.store.error = AssertionError("a request was made")
    job_file.write_text(text)
    result = cli("submit", job_file, *arguments)
    assert result.exit_code == 2
    assert part in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_files_that_cannot_be_read(cli, tmp_path):
    assert cli("submit", tmp_path / "none.yaml").exit_code == 2
    assert cli("submit", tmp_path).exit_code == 2
    assert cli("submit").exit_code == 2
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert cli("submit", tmp_path / "binary").exit_code == 2


def test_dry_run(service, cli):
    result = cli("submit", EXAMPLE, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "4 + 4 + 4 + 4" in result.stdout
    assert "unknown: The scheduler has not seen the cluster yet." in result.stdout
    plan = json.loads(cli("submit", EXAMPLE, "--dry-run", "--set", "workers=5", "--format", "json").stdout)
    assert plan["samples_per_rank"] == [4, 3, 3, 3, 3]
    assert not service.store.list_jobs().jobs


def test_the_example_is_what_it_says():
    data = yaml.safe_load(EXAMPLE.read_text())
    assert (data["workers"], data["steps"], data["batch"]) == (4, 350, {"size": 16, "max_per_rank": 4})


def test_ls_and_get(service, cli):
    red = service.submit(name="red", labels={"team": "a"})
    blue = service.submit(name="blue")
    service.scheduler.start(blue.id)
    lines = cli("ls").stdout.splitlines()
    assert lines[0].split() == ["ID", "NAME", "OWNER", "QUEUE", "STATUS", "STEP", "WORKERS", "CREATED"]
    assert [line.split()[:6] for line in lines[1:]] == [
        [blue.id, "blue", "default", "default", "running", "0/10"],
        [red.id, "red", "default", "default", "queued", "0/10"],
    ]
    assert [job["id"] for job in json.loads(cli("ls", "--status", "queued", "--format", "json").stdout)["jobs"]] == [
        red.id
    ]
    assert "blue" not in cli("ls", "--label", "team=a").stdout
    assert "red" not in cli("ls", "--name", "blue").stdout
    assert "red" not in cli("ls", "--owner", "ada").stdout
    assert "red" not in cli("ls", "--queue", "research").stdout
    first = cli("ls", "--limit", 1)
    assert red.id in cli("ls", "--cursor", first.stderr.split()[-1]).stdout
    assert cli("ls", "--status", "done").exit_code == 2
    assert cli("ls", "--label", "team").exit_code == 2
    assert cli("ls", "--limit", 501).exit_code == 2

    shown = cli("get", blue.id)
    assert shown.exit_code == 0
    assert "16, 16 normalized together" in shown.stdout
    assert "ATTEMPT" in shown.stdout
    assert json.loads(cli("get", red.id, "--format", "json").stdout)["spec"]["labels"] == {"team": "a"}


def test_long_curves_are_shown_rolled_up(service, cli):
    job = service.submit()
    service.scheduler.start(job.id)
    for step in range(1, 9):
        service.scheduler.metrics(job.id, step, train_loss=float(step))
    rows = cli("metrics", job.id, "--max-points", 2).stdout.splitlines()[1:]
    assert [[float(cell) for cell in row.split()] for row in rows] == [[1, 4], [8, 8]]
    series = json.loads(cli("metrics", job.id, "--max-points", 2, "--format", "json").stdout)["series"]
    assert series["train/loss"]["rollup"]["bucket_steps"] == 8


def test_metrics(service, cli):
    job = service.submit()
    service.scheduler.start(job.id)
    service.scheduler.metrics(job.id, 1, train_loss=0.25, train_accuracy=0.5)
    service.scheduler.metrics(job.id, 2, train_loss=float("nan"))
    assert [line.split() for line in cli("metrics", job.id).stdout.splitlines()] == [
        ["STEP", "train/accuracy", "train/loss"],
        ["1", "0.5", "0.25"],
        ["2", "-", "nan"],
    ]
    assert cli("metrics", job.id, "--name", "train/loss", "--tail", 1).stdout.split() == [
        "STEP",
        "train/loss",
        "2",
        "nan",
    ]
    series = json.loads(cli("metrics", job.id, "--format", "json").stdout)["series"]
    assert series["train/loss"]["values"] == [0.25, None]


def test_get_tells_of_retries(service, cli):
    job = service.submit(workers=2, retry__budget=3, retry__backoff_s=60.0)
    for reason in (Reason.NODE_LOST, Reason.RANK_LOST):
        service.scheduler.start(job.id)
        service.scheduler.metrics(job.id, 7, train_loss=0.5)
        service.scheduler.end(job.id, Outcome.LOST, reason)
    shown = cli("get", job.id).stdout
    assert "Waits 60 s before retry 2 of 3 (rank_lost)." in shown
    assert "2 of 3 used" in shown
    assert re.search(r"next retry +not before 20", shown)
    assert re.search(r"^2 +sealed +2 +lost +rank_lost +- +7 ", shown, re.MULTILINE)


def test_logs(service, cli):
    job = service.submit(workers=2)
    assert cli("logs", job.id).stdout == ""
    service.scheduler.start(job.id)
    service.files.logs[job.id, 1, 0] = b"zero\n" * 300_000 + "ü\n".encode()  # more than one part
    service.files.logs[job.id, 1, 1] = b"one\n"
    assert cli("logs", job.id).stdout == "zero\n" * 300_000 + "ü\n"
    assert cli("logs", job.id, "--tail", 1).stdout == "ü\n"
    assert cli("logs", job.id, "--rank", 1).stdout == "one\n"
    assert cli("logs", job.id, "--rank", 2).exit_code == 1
    for wrong in (("--rank", "x"), ("--rank", -1), ("--attempt", 0), ("--attempt", "all"), ("--regex",)):
        assert cli("logs", job.id, *wrong).exit_code == 2, wrong
    assert cli("logs", job.id, "--tail", 1, "--rank", "all").stdout == "rank 0| ü\nrank 1| one\n"
    found = cli("logs", job.id, "--search", "E$", "--regex", "-i", "--rank", 1)
    assert (found.exit_code, found.stdout) == (0, "rank 1| one\n")
    assert cli("logs", job.id, "--search", "o", "--attempt", "all").stdout.endswith("\nattempt 1 rank 1| one\n")
    assert "No line contains 'two'" in cli("logs", job.id, "--search", "two").stderr
    assert cli("logs", job.id, "--search", "two", "-f").exit_code == 2
    service.scheduler.end(job.id)
    assert cli("logs", job.id, "-f", "--tail", 2).stdout == "zero\nü\n"
    assert cli("logs", job.id, "-f", "--attempt", 1, "--rank", 1).stdout == "one\n"
    lines = cli("logs", job.id, "-f", "--rank", "all").stdout.splitlines()
    assert sorted(lines) == ["rank 0| zero"] * 300_000 + ["rank 0| ü", "rank 1| one"]


def test_checkpoints_and_download(service, cli, tmp_path):
    job = service.submit()
    service.scheduler.start(job.id)
    assert cli("download", job.id).exit_code == 1
    service.scheduler.checkpoint(job.id, 5, {"model.safetensors": b"five"}, eval_accuracy=0.5)
    service.scheduler.checkpoint(job.id, 10, {"model.safetensors": b"ten"}, eval_accuracy=0.75)
    lines = cli("checkpoints", job.id).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["STEP", "5", "10"]
    assert "0.75" in lines[2]
    assert [
        one["step"] for one in json.loads(cli("checkpoints", job.id, "--format", "json").stdout)["checkpoints"]
    ] == [5, 10]

    result = cli("download", job.id)
    assert result.exit_code == 0
    assert result.stdout.strip() == f"{job.id}-step-10"
    assert (tmp_path / f"{job.id}-step-10" / "model.safetensors").read_bytes() == b"ten"
    assert "load_file" in result.stderr
    assert cli("download", job.id, "--step", 5, "--to", tmp_path / "x").exit_code == 0
    assert (tmp_path / "x" / "model.safetensors").read_bytes() == b"five"
    (tmp_path / "file").write_text("")
    result = cli("download", job.id, "--to", tmp_path / "file")
    assert result.exit_code == 1
    assert "Error: " in result.stderr


def test_cancel(service, cli):
    job = service.submit()
    assert cli("cancel", job.id).stdout == f"{job.id} cancelled\n"
    running = service.submit()
    service.scheduler.start(running.id)
    assert "cancel requested" in cli("cancel", running.id).stdout


def end(service, outcome, reason, failure=None):
    job = service.submit(name="net")
    service.scheduler.start(job.id)
    for step in range(1, 11):
        service.scheduler.metrics(job.id, step, train_loss=1 / step, train_accuracy=0.5)
    service.scheduler.metrics(job.id, 10, eval_loss=0.1, eval_accuracy=0.9871)
    service.scheduler.checkpoint(job.id, 10, {"model.safetensors": b"x"}, eval_loss=0.1, eval_accuracy=0.9871)
    if outcome is Outcome.STOPPED:
        service.store.request_cancel(job.id)
        service.scheduler.stop(job.id)
    service.scheduler.end(job.id, outcome, reason, failure)
    return job


def test_watch_to_success(service, cli):
    job = end(service, Outcome.SUCCEEDED, Reason.COMPLETED)
    result = cli("watch", job.id)
    assert result.exit_code == 0
    lines = result.stderr.splitlines()
    assert [line.split()[1].rstrip(":") for line in lines if line[0] != " "] == [
        "queued",
        "starting",
        "running",
        "succeeded",
    ]
    assert sum("train" not in line and "loss" in line and "evaluation" not in line for line in lines) == 10
    assert "step 1/10 (10 %)  loss 1, accuracy 0.5" in result.stderr
    assert "evaluation: step 10/10 (100 %)  loss 0.1, accuracy 0.9871" in result.stderr
    assert "\x1b" not in result.output
    path = service.store.checkpoints(job.id)[0].path
    tested = "test accuracy  0.9871 (step 10)"
    for part in (tested, path, f"syncbn download {job.id} --step 10", "safetensors.torch.load_file("):
        assert part in result.stdout


def test_watch_to_failure_and_cancellation(service, cli):
    failure = Failure(rank=3, error_type="ValueError", message="bad \x1b[31mlabel")
    failed = end(service, Outcome.FAILED, Reason.USER_ERROR, failure)
    result = cli("watch", failed.id)
    assert result.exit_code == 3
    assert "rank 3: ValueError: bad label" in result.stdout
    assert f"syncbn logs {failed.id} --rank 3" in result.stdout
    cancelled = end(service, Outcome.STOPPED, Reason.CANCEL_REQUESTED)
    assert cli("watch", cancelled.id).exit_code == 5


def test_a_job_that_is_resumed_at_its_end_is_watched_on(service, cli, monkeypatch):
    from service.client.client import Client

    job = end(service, Outcome.FAILED, Reason.USER_ERROR, Failure(rank=0, error_type="ValueError", message="bad"))
    real = Client.stream

    def stream(self, job_id, *, after=0):
        yield from real(self, job_id, after=after)
        if after == 0:  # between the end of the stream and the next look at the job
            service.store.resume(job_id)
        else:
            assert service.store.get(job_id).status.is_terminal

    monkeypatch.setattr(Client, "stream", stream)
    started = threading.Event()

    def go_on():
        wait_for(lambda: service.store.get(job.id).status == "queued", timeout_s=20)
        service.scheduler.start(job.id)
        service.scheduler.end(job.id)
        started.set()

    thread = threading.Thread(target=go_on)
    thread.start()
    result = cli("watch", job.id)
    thread.join()
    assert started.is_set()
    assert result.exit_code == 0, result.output
    assert result.stderr.count("failed:") == 1
    assert "succeeded" in result.stderr


def test_errors_have_exit_codes(service, cli, job_file, monkeypatch):
    assert cli("get", "job-9").exit_code == 1
    assert cli("nothing").exit_code == 2
    assert cli("ls", "--nothing").exit_code == 2
    result = cli("--token", "s3cret-wrong", "ls")
    assert result.exit_code == 4
    assert "s3cret" not in result.output
    # The common options may also follow the command.
    assert cli("ls", "--token", "wrong").exit_code == 4
    assert cli("ls", "--token=wrong").exit_code == 4
    assert cli("ls", "--token").exit_code == 2
    monkeypatch.delenv("SYNCBN_URL")
    result = cli("ls")
    assert result.exit_code == 1
    assert "syncbn serve" in result.stderr
    assert cli("ls", "--url", service.url).exit_code == 0
    assert cli("ls", "--url", "nonsense").exit_code == 1


def test_the_data_directory_says_where_the_service_is(service, cli, tmp_path, monkeypatch):
    monkeypatch.delenv("SYNCBN_URL")
    monkeypatch.delenv("SYNCBN_TOKEN")
    for name in ("data", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "service.json").write_text(json.dumps({"url": service.url, "pid": 1}))
        (tmp_path / name / "token").write_text(service.token if name == "other" else "wrong")
    assert cli("ls").exit_code == 4
    assert cli("ls", "--data-dir", tmp_path / "other").exit_code == 0


def test_a_job_that_never_fits_is_a_usage_error(service, cli, job_file):
    from service.domain.placement import Node, Resources

    service.stop()
    service.capacity = [Node(id="n", address="a", total=Resources(cpus=2.0))]
    service.start()
    result = cli("submit", job_file, "--set", "workers=3")
    assert result.exit_code == 2
    assert "workers: " in result.stderr


def test_help_is_plain(cli):
    for arguments in (("--help",), ("submit", "--help"), ("serve", "--help"), ()):
        result = cli(*arguments)
        assert "Usage:" in result.output
        assert "\x1b" not in result.output


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain\n\ttext", "plain\n\ttext"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07x", "x"),
        ("\x1b]52;c;aGk=\x1b\\x", "x"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1bcx", "x"),
        ("\x9b31mx", "31mx"),
        ("a\rb\r\nc\x08\x00\x7f", "a\nb\nc"),
        ("\u202egnp.exe", "gnp.exe"),
        ("[bold]as it is[/bold]", "[bold]as it is[/bold]"),
        ("\x1b", ""),
    ],
)
def test_printed_text_is_inert(text, expected):
    assert inert(text) == expected


def test_text_on_one_line():
    assert one_line("a\nb\t\x1b[1mc ") == "a b c"
