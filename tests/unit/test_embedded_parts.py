"""Parts of ``syncbn serve`` without Ray. A failure means a service that starts twice, leaks secrets or gives up."""

import os
import select
import signal
import stat
import subprocess
import sys
import time

import pytest

from service import child as child_module
from service import embedded
from service.child import Child
from service.cluster.head import head_address, head_command, ray_environment
from service.domain.errors import Unavailable

DEADLINE_S = 20.0


@pytest.fixture
def child(tmp_path):
    child = Child("worker", tmp_path / "worker.log")
    yield child
    if child.pid is not None:
        child.send(signal.SIGKILL)
        os.kill(child.pid, signal.SIGKILL)  # should it not lead a group of its own
        os.waitpid(child.pid, 0)


def _shell(child, script, environment=None, **options):
    child.start(["sh", "-c", script], environment or {}, **options)


def _wait(child):
    """Wait as the one loop does that reaps every child; return its exit status."""
    pidfd = os.pidfd_open(child.pid)
    assert select.select([pidfd], [], [], DEADLINE_S)[0]
    os.close(pidfd)
    status = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
    child.ended(status)
    return status


def test_a_child_runs_with_its_environment_and_its_output_in_a_log(child, tmp_path, monkeypatch):
    monkeypatch.setenv("INHERITED", "yes")
    (tmp_path / "worker.log").write_text("before\n")
    _shell(child, 'echo "$INHERITED $ADDED"; echo wrong >&2; cat', {"ADDED": "too"})
    assert _wait(child) == 0
    assert (tmp_path / "worker.log").read_text() == "before\nyes too\nwrong\n"
    assert child.pid is None


def test_a_child_has_a_session_of_its_own(child):
    """So that Ctrl-C reaches ``serve`` alone."""
    _shell(child, "sleep 1000")
    assert os.getsid(child.pid) == child.pid != os.getsid(0)


def test_a_child_inherits_only_the_descriptors_that_it_is_given(child, tmp_path):
    read_end, write_end = os.pipe()
    _shell(child, f"echo given > /proc/self/fd/{write_end}", pass_fds=[write_end])
    assert _wait(child) == 0
    assert os.read(read_end, 16) == b"given\n"
    _shell(child, f"echo not given > /proc/self/fd/{write_end}")
    assert _wait(child) != 0
    os.close(read_end)
    os.close(write_end)


def test_a_signal_goes_to_the_child_and_a_kill_to_its_group(child):
    _shell(child, "exec sleep 1000")
    child.send(signal.SIGTERM)
    assert _wait(child) == -signal.SIGTERM
    child.send(signal.SIGTERM)  # nobody is there
    assert child.pid is None
    read_end, write_end = os.pipe()
    # Helpers hold the pipe open; its end shows that they are gone too.
    _shell(child, "sleep 1000 & sleep 1000", pass_fds=[write_end])
    os.close(write_end)
    child.send(signal.SIGKILL)
    assert _wait(child) == -signal.SIGKILL
    assert select.select([read_end], [], [], DEADLINE_S)[0]
    assert os.read(read_end, 1) == b""
    os.close(read_end)


def test_a_child_ends_with_the_service_whatever_ended_it(tmp_path):
    code = """
import sys, time
from pathlib import Path
from service.child import Child
child = Child("worker", Path(sys.argv[1]))
child.start(["sleep", "1000"], {})
print(child.pid, flush=True)
time.sleep(1000)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as service:
        pidfd = os.pidfd_open(int(service.stdout.readline()))
        service.kill()
        assert select.select([pidfd], [], [], DEADLINE_S)[0]
        os.close(pidfd)


def test_what_ends_is_started_at_once_and_then_ever_later(child, monkeypatch, caplog):
    now = 1000.0
    monkeypatch.setattr(child_module.time, "monotonic", lambda: now)
    delays = []
    for _ in range(8):
        child._started_at = now
        child.ended(1)
        delays.append(child.start_not_before - now)
    assert delays[0] == 0.0
    assert delays == sorted(delays)
    assert 0 < delays[1] <= 1.0
    assert delays[-1] == child_module.MAX_BACKOFF_S
    assert "worker ended with status 1" in caplog.text
    # One that ran for a while is started at once again.
    child._started_at, now = now, now + child_module.STABLE_S + 1
    child.ended(1)
    assert child.start_not_before == now


def test_a_child_that_fails_all_night_does_not_end_the_service(child):
    for _ in range(3000):
        child._started_at = time.monotonic()
        child.ended(1)
    assert child.start_not_before <= time.monotonic() + child_module.MAX_BACKOFF_S


def test_a_data_directory_serves_one_service(tmp_path):
    first = embedded._lock(tmp_path / "lock")
    with pytest.raises(Unavailable, match=r"Another service uses .*--data-dir"):
        embedded._lock(tmp_path / "lock")
    first.close()
    embedded._lock(tmp_path / "lock").close()


def test_a_lock_ends_with_its_process(tmp_path):
    code = "import sys; from pathlib import Path; from service.embedded import _lock; kept = _lock(Path(sys.argv[1]))"
    code += "; print('locked', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(Unavailable):
            embedded._lock(tmp_path / "lock")
        other.kill()
        other.wait(DEADLINE_S)
        embedded._lock(tmp_path / "lock").close()


def test_a_token_is_made_once_and_only_its_owner_reads_it(tmp_path):
    path = tmp_path / "token"
    token = embedded._read_or_make_token(path)
    assert len(token) >= 32
    assert embedded._read_or_make_token(path) == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert embedded._read_or_make_token(tmp_path / "other") != token


def test_a_secret_is_written_over_what_a_crash_left(tmp_path):
    (tmp_path / ".secret.partial").write_text("half")
    (tmp_path / "secret").write_text("old")
    embedded._write_secret(tmp_path / "secret", "new")
    assert (tmp_path / "secret").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["secret"]


def test_a_session_directory_is_short_and_replaces_the_one_of_a_killed_service(tmp_path):
    first = embedded._session_dir(tmp_path)
    (first / "left behind").write_text("x")
    second = embedded._session_dir(tmp_path)
    assert not first.exists()
    assert second.is_dir()
    # Ray's sockets lie some 60 bytes below it; a Unix socket's path has at most 107.
    assert len(str(second)) < 40
    assert (tmp_path / "ray-session").read_text() == str(second)
    second.rmdir()


def test_the_head_declares_what_it_was_told_and_stays_on_loopback(tmp_path):
    command = head_command(temp_dir=tmp_path, num_cpus=7, num_gpus=2, memory_bytes=5)
    assert {"--head", "--block", "--port=0", "--node-ip-address=127.0.0.1", "--num-cpus=7", "--memory=5"} <= set(
        command
    )
    assert {"--include-dashboard=false", "--num-gpus=2"} <= set(command)
    environment = ray_environment(tmp_path / "token")
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "token")


def test_the_address_of_a_head_is_known_once_it_runs(tmp_path):
    assert head_address(tmp_path) is None
    (tmp_path / "ray_current_cluster").write_text("")
    assert head_address(tmp_path) is None
    (tmp_path / "ray_current_cluster").write_text("127.0.0.1:6379\n")
    assert head_address(tmp_path) == "127.0.0.1:6379"
