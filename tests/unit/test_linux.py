"""What ties processes to their owners. A failure means processes that nobody owns."""

import os
import select
import signal
import subprocess
import sys

import pytest

from service.linux import die_with_parent, group_is_alive, group_runs, process_state

DEADLINE_S = 20.0

PARENT = """
import os, subprocess, sys, time
from functools import partial
from service.linux import die_with_parent
child = subprocess.Popen([{command}], preexec_fn=partial(die_with_parent, os.getpid()))
print(child.pid, flush=True)
time.sleep(1000)
"""


def _is_over(pidfd):
    return bool(select.select([pidfd], [], [], DEADLINE_S)[0])


def test_a_child_ends_with_its_parent_even_after_an_exec():
    code = PARENT.format(command='"sleep", "1000"')
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
        assert _is_over(pidfd)
        os.close(pidfd)


def test_a_child_whose_parent_was_gone_before_ends_at_once():
    pid = os.fork()
    if pid == 0:
        try:
            die_with_parent(1 if os.getppid() != 1 else 2)  # somebody else
        finally:
            os._exit(42)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def test_a_child_of_a_living_parent_goes_on():
    parent_pid = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            die_with_parent(parent_pid)
        finally:
            os._exit(42)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42


def test_a_subreaper_adopts_what_its_children_leave_behind():
    code = """
import os, subprocess, sys
from service.linux import become_subreaper
become_subreaper()
shell = subprocess.Popen(["sh", "-c", "sleep 1000 & echo $!"], stdout=subprocess.PIPE, text=True)
orphan = int(shell.stdout.readline())
shell.wait()
with open(f"/proc/{orphan}/stat") as stat:
    parent = int(stat.read().rpartition(")")[2].split()[1])
os.kill(orphan, 9)
assert parent == os.getpid(), parent
assert os.waitpid(-1, 0)[0] == orphan
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr


def test_a_group_is_alive_until_its_last_member_is_gone_and_buried():
    leader = subprocess.Popen(["sh", "-c", "sleep 1000 & echo $!; wait"], stdout=subprocess.PIPE, process_group=0)
    member = int(leader.stdout.readline())
    assert group_is_alive(leader.pid)
    os.kill(leader.pid, signal.SIGKILL)
    leader.wait(DEADLINE_S)
    assert group_is_alive(leader.pid)
    pidfd = os.pidfd_open(member)
    os.kill(member, signal.SIGKILL)
    assert _is_over(pidfd)
    os.close(pidfd)
    leader.stdout.close()


def test_a_group_that_never_was_is_not_alive():
    done = subprocess.Popen(["true"], process_group=0)
    done.wait(DEADLINE_S)
    assert not group_is_alive(done.pid)


def test_a_group_of_which_only_the_dead_are_left_does_not_run():
    with subprocess.Popen(["sleep", "1000"], process_group=0) as leader:
        assert group_runs(leader.pid)
        leader.kill()
        os.waitid(os.P_PID, leader.pid, os.WEXITED | os.WNOWAIT)
        assert group_is_alive(leader.pid)
        assert not group_runs(leader.pid)
    assert not group_runs(leader.pid)


def test_a_group_of_a_dead_leader_and_a_living_member_runs():
    leader = subprocess.Popen(["sh", "-c", "sleep 1000 & exit"], process_group=0)
    os.waitid(os.P_PID, leader.pid, os.WEXITED | os.WNOWAIT)
    assert group_runs(leader.pid)
    os.killpg(leader.pid, signal.SIGKILL)
    leader.wait(DEADLINE_S)


def test_a_refused_request_to_the_kernel_is_an_error():
    with pytest.raises(OSError, match="Invalid argument"):
        die_with_parent(os.getppid(), signal_number=1000)


def test_the_state_of_a_process_is_the_kernels():
    # Its name would mislead whoever splits at the first parenthesis.
    child = subprocess.Popen(
        ["sh", "-c", "printf ') T (' > /proc/self/comm; echo; exec 3>&1; read line"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    child.stdout.read(1)
    os.kill(child.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    assert process_state(child.pid) == "T"
    os.kill(child.pid, signal.SIGCONT)
    os.waitid(os.P_PID, child.pid, os.WCONTINUED)
    assert process_state(child.pid) in ("R", "S")
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process_state(child.pid) is None, "one that waits to be buried has ended"
    child.communicate()
    assert process_state(child.pid) is None
