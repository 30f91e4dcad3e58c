"""The guard of a Ray head. A failure means processes of Ray that outlive a service that was killed."""

import os
import signal
import subprocess
import sys

import pytest

from service.cluster.head_guard import guard_command
from tests.integration.cluster.forking import DEADLINE_S, Watch

# Starts a guard, and tells its process id.
SERVICE = """
import subprocess, sys, time
from service.cluster.head_guard import guard_command
print(subprocess.Popen(guard_command(sys.argv[1:])).pid, flush=True)
time.sleep(1000)
"""
# A head, its child, and an agent in a session of its own that has lost its parent.
HEAD = "sleep 1000 & (setsid sleep 1000 & echo $!); echo $!; echo $$; trap '' TERM; wait"


def run(command, **options):
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


def test_nothing_outlives_a_service_that_was_killed():
    with run([sys.executable, "-c", SERVICE, "sh", "-c", HEAD]) as service:
        watches = [Watch(int(service.stdout.readline())) for _ in range(4)]
        assert not any(watch.is_over() for watch in watches)
        service.kill()
        for watch in watches:
            watch.wait()
            watch.close()


def test_the_head_ends_with_its_guard():
    with run(guard_command(["sh", "-c", "echo $$; exec sleep 1000"])) as guard:
        head = Watch(int(guard.stdout.readline()))
        guard.kill()
        head.wait()
        head.close()


@pytest.mark.parametrize(("head", "status"), [("exit 7", 7), ("kill -KILL $$", 128 + signal.SIGKILL)])
def test_the_guard_ends_as_its_head_does(head, status):
    assert subprocess.run(guard_command(["sh", "-c", head]), check=False, timeout=DEADLINE_S).returncode == status


def test_the_head_is_asked_to_stop_and_is_not_hurried():
    head = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), sys.exit(5)));"
    head += "print('ready', flush=True); time.sleep(1000)"
    with run(guard_command([sys.executable, "-c", head])) as guard:
        assert guard.stdout.readline() == "ready\n"
        os.kill(guard.pid, signal.SIGTERM)
        assert guard.wait(DEADLINE_S) == 5
