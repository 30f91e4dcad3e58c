"""What only a process of its own can show: signals, terminals, pipes and start-up."""

import json
import os
import pty
import subprocess
import sys
import threading
import time

import yaml

from tests.fakes import spec_data, wait_for


def test_no_command_loads_torch_or_ray_and_help_loads_little():
    code = (
        "import sys, json\n"
        "import service.cli.main\n"
        "from typer.testing import CliRunner\n"
        "CliRunner().invoke(service.cli.main.app, ['submit', '--help'])\n"
        "heavy = ('torch', 'ray', 'httpx', 'service.domain.spec', 'rich', 'fastapi')\n"
        "print(json.dumps([name for name in heavy if name in sys.modules]))"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(result.stdout) == []


def test_submit_and_watch_across_a_restart_of_the_api(service, processes, tmp_path):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec_data(steps=20)))
    process = processes.start("submit", "job.yaml", "--watch")
    wait_for(lambda: bool(service.store.list_jobs().jobs), timeout_s=30)
    job = service.store.list_jobs().jobs[0]
    service.scheduler.start(job.id)
    for step in range(1, 21):
        service.scheduler.metrics(job.id, step, train_loss=1 / step)
        if step == 8:
            service.stop()
            time.sleep(0.3)
            service.start()
    service.scheduler.end(job.id)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    assert stdout.splitlines()[0] == job.id
    told = [line.split()[1] for line in stderr.splitlines() if line.startswith("   ")]
    assert told == [f"{step}/20" for step in range(2, 21, 2)]


def test_the_module_runs_as_a_program(service, processes):
    job = service.submit()
    service.scheduler.start(job.id)
    service.scheduler.checkpoint(job.id, 5, {"model.safetensors": b"five"}, eval_accuracy=0.5)
    process = processes.start("checkpoints", job.id)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    assert "0.5000" in stdout


def test_ctrl_c_detaches(service, processes):
    job = service.submit()
    process = processes.start("watch", job.id)
    first = process.stderr.readline()
    assert "queued" in first
    processes.interrupt_when(process, lambda: True)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"syncbn watch {job.id}" in stderr
    assert "Traceback" not in stderr
    assert service.store.get(job.id).status == "queued"


def test_a_watch_has_a_deadline(service, processes):
    job = service.submit()
    started = time.monotonic()
    process = processes.start("watch", job.id, "--timeout", "0.5")
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 124
    assert "goes on" in stderr
    assert time.monotonic() - started < 20


def test_a_terminal_gets_a_bar_and_no_color_gets_lines(service, processes):
    job = service.submit(name="net")
    service.scheduler.start(job.id)
    service.scheduler.metrics(job.id, 5, train_loss=0.25)

    def on_a_terminal(**environment: str) -> str:
        controller, terminal = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "service.cli.main", "watch", job.id, "--timeout", "0.5"],
            stdout=subprocess.PIPE,
            stderr=terminal,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "120", **environment},
        )
        os.close(terminal)
        seen = b""
        reader = threading.Thread(target=process.communicate)
        reader.start()
        while True:
            try:
                piece = os.read(controller, 4096)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            seen += piece
        reader.join()
        os.close(controller)
        assert process.returncode == 124
        return seen.decode()

    bar = on_a_terminal()
    assert "5/10" in bar
    assert "loss 0.25" in bar
    assert "\x1b[" in bar
    lines = on_a_terminal(NO_COLOR="1")
    assert "step 5/10 (50 %)  loss 0.25" in lines
    assert "\x1b" not in lines


def test_a_reader_that_leaves_ends_the_command_quietly(service, processes):
    job = service.submit()
    service.scheduler.start(job.id)
    service.files.logs[job.id, 1, 0] = b"line\n" * 500_000
    process = processes.start("logs", job.id)
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(timeout=30) != 0
    assert "Traceback" not in stderr


def test_follow_ends_with_the_job(service, processes):
    job = service.submit()
    process = processes.start("logs", job.id, "-f")
    service.scheduler.start(job.id)
    service.files.logs[job.id, 1, 0] = b"first\n"
    assert process.stdout.readline() == "first\n"
    service.files.logs[job.id, 1, 0] += b"last\n"
    service.scheduler.end(job.id)
    stdout, _ = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (0, "last\n")
