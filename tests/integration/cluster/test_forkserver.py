"""The forkserver as a real process. A failure means training processes that outlive, outnumber or miss their owners."""

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from service.cluster.fork_client import ForkedProcess, ForkRefused
from service.linux import group_is_alive, group_runs
from tests.integration.cluster.forking import DEADLINE_S, Owner, Server, Watch


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("forkserver")) as server:
        yield server


@pytest.fixture
def owner(shared_server, tmp_path):
    with Owner(shared_server, tmp_path) as owner:
        yield owner


@pytest.fixture
def only_owner(tmp_path):
    """With a forkserver of its own, to count what it holds or to kill it."""
    with Server(tmp_path) as server, Owner(server, tmp_path) as owner:
        yield owner


@pytest.fixture
def lingering(tmp_path):
    """Keeps a dead process's group from ending until it is let go."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    class Lingering:
        def hold(self, forked):
            forked.ask("linger", fifo=str(fifo))

        def let_go(self):
            os.close(os.open(fifo, os.O_WRONLY))

    yield Lingering()
    with suppress(OSError):  # nobody lingers any more
        os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))


def test_a_process_is_forked_into_a_session_of_its_own(owner):
    forked = owner.fork(task='{"naïve": 1}')
    found = forked.ask("describe")
    assert found["pid"] == found["group"] == found["session"] == forked.pid
    assert found["parent_pid"] == owner.server.pid
    assert found["task_json"] == '{"naïve": 1}'
    # Out of memory ends a training process before anything that watches over one.
    assert found["oom_score_adj"] == 1000


def test_a_task_may_be_larger_than_any_packet(owner):
    task = json.dumps({"text": "x" * (3 << 20)})
    assert owner.fork(task=task).ask("describe")["task_json"] == task


def test_output_of_the_process_and_of_its_helpers_goes_to_the_log(owner):
    forked = owner.fork()
    forked.ask("say", text="hello")
    assert forked.log_path.read_text() == "hello\nHELLO\nfrom a helper: hello\n"
    assert forked.log_path.stat().st_mode & 0o077 == 0


def test_a_log_is_appended_to(owner):
    Path(owner.request().log_path).write_text("before\n")
    forked = owner.fork()
    forked.ask("say", text="hello")
    assert forked.log_path.read_text().startswith("before\nhello\n")


def test_a_process_inherits_its_output_and_its_channel_and_nothing_else(owner):
    others = [owner.fork(rank=rank) for rank in range(1, 4)]
    forked = owner.fork()
    found = {int(number): target for number, target in forked.ask("describe")["descriptors"].items()}
    log = str(forked.log_path)
    assert {number: found.pop(number) for number in (0, 1, 2)} == {0: "/dev/null", 1: log, 2: log}
    assert found.pop(3).startswith("socket:")
    assert "/fences/" in found.pop(5)
    assert found == {}
    assert all(other.ask("describe")["pid"] == other.pid for other in others)


def test_the_rendezvous_arrives_as_descriptor_4(owner):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        forked = owner.fork(rendezvous=listener)
        address = listener.getsockname()
    assert set(forked.ask("describe")["descriptors"]) == {"0", "1", "2", "3", "4", "5"}
    forked.order("meet", fd=4)
    with socket.create_connection(address, timeout=DEADLINE_S) as connection:
        assert connection.recv(16) == b"hello"


def test_the_environment_is_the_forkservers_with_what_was_asked_for(tmp_path):
    with Server(tmp_path, KEPT="kept", CHANGED="before") as server, Owner(server, tmp_path) as owner:
        forked = owner.fork(environment={"CUDA_VISIBLE_DEVICES": "2,3", "CHANGED": "after"})
        found = forked.ask("describe")["environment"]
        other = owner.fork(rank=1).ask("describe")["environment"]
    assert (found["KEPT"], found["CHANGED"], found["CUDA_VISIBLE_DEVICES"]) == ("kept", "after", "2,3")
    assert (other["CHANGED"], "CUDA_VISIBLE_DEVICES" in other) == ("before", False)


@pytest.mark.parametrize(
    ("order", "status"),
    [
        ({"do": "return", "status": 0}, 0),
        ({"do": "return", "status": 7}, 7),
        ({"do": "leave", "status": 0}, 1),  # an exception like any other: only returning 0 is success
        ({"do": "fail"}, 1),
        ({"do": "die", "signal_number": signal.SIGTERM}, -signal.SIGTERM),
        ({"do": "die", "signal_number": signal.SIGSEGV}, -signal.SIGSEGV),
        ({"do": "die", "signal_number": signal.SIGKILL}, -signal.SIGKILL),
        ({"do": "die", "signal_number": signal.SIGRTMIN + 5}, -(signal.SIGRTMIN + 5)),
    ],
)
def test_the_exit_status_is_reported(owner, order, status):
    forked = owner.fork()
    forked.order(**order)
    assert forked.process.exit_status() == status
    assert not group_is_alive(forked.pid)


def test_an_exception_leaves_its_traceback_in_the_log(owner):
    forked = owner.fork()
    forked.order("fail")
    forked.process.exit_status()
    assert "RuntimeError: as ordered" in forked.log_path.read_text()


def test_a_status_may_be_awaited_for_longer_than_a_fork_may_take(owner):
    forked = owner.fork(timeout_s=0.3)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(forked.process.exit_status)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.5)
        assert not waiting.done()
        forked.order("return", status=3)
        assert waiting.result(timeout=DEADLINE_S) == 3


@pytest.mark.parametrize("how", ["close", "kill"])
def test_letting_go_kills_the_process_and_its_helpers(owner, how):
    forked = owner.fork()
    helper = Watch(forked.ask("spawn"))
    getattr(forked.process, how)()
    forked.watch.wait()
    helper.wait()
    helper.close()


def test_a_killed_process_is_reported_like_any_other(owner):
    forked = owner.fork()
    forked.process.kill()
    assert forked.process.exit_status() == -signal.SIGKILL


def test_helpers_end_with_their_process(owner):
    forked = owner.fork()
    helper = Watch(forked.ask("spawn"))
    forked.order("return", status=0)
    assert forked.process.exit_status() == 0
    assert helper.is_over()  # by now, not some time later
    assert not group_is_alive(forked.pid)
    helper.close()


@pytest.mark.parametrize("order", [None, {"do": "return", "status": 5}])
def test_the_report_comes_only_after_the_whole_group_is_gone(owner, lingering, order):
    forked = owner.fork()
    lingering.hold(forked)
    if order is None:
        forked.process.kill()
    else:
        forked.order(**order)
    forked.watch.wait()
    assert group_is_alive(forked.pid)
    # Fifteen times as often as the forkserver looks.
    assert not forked.is_reported(timeout_s=0.3)
    lingering.let_go()
    assert forked.process.exit_status() == (-signal.SIGKILL if order is None else 5)
    assert not group_is_alive(forked.pid)


def test_a_killed_forkserver_takes_its_processes_along(only_owner):
    processes = [only_owner.fork(rank=rank) for rank in range(3)]
    only_owner.server.process.kill()
    for forked in processes:
        forked.watch.wait()
        assert forked.process.exit_status() == -signal.SIGKILL


def test_helpers_of_a_killed_forkservers_process_end_when_its_owner_asks(only_owner):
    forked = only_owner.fork()
    helper = Watch(forked.ask("spawn"))
    only_owner.server.process.kill()
    assert forked.process.exit_status() == -signal.SIGKILL
    helper.wait()
    helper.close()


CLIENT = """
import signal, socket, sys
from service.cluster.fork_client import ForkedProcess
from service.cluster.forkserver import ForkRequest
ours, theirs = socket.socketpair()
process = ForkedProcess(
    socket_name=sys.argv[1], request=ForkRequest.model_validate_json(sys.argv[2]), task_json="{}",
    descriptors=[theirs.fileno()], timeout_s=20.0,
)
print(process.pid, flush=True)
signal.pause()
"""


def test_a_killed_owner_takes_its_process_along(owner):
    command = [sys.executable, "-c", CLIENT, owner.server.socket_name, owner.request().model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        watch = Watch(int(owner.stdout.readline()))
        assert not watch.is_over()
        owner.kill()
        watch.wait()
        watch.close()


def test_a_stopped_owner_keeps_its_process(owner):
    """Unreachable is not dead: only the end of the connection counts."""
    command = [sys.executable, "-c", CLIENT, owner.server.socket_name, owner.request().model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        watch = Watch(int(owner.stdout.readline()))
        owner.send_signal(signal.SIGSTOP)
        assert not watch.is_over(timeout_s=0.2)
        owner.kill()
        watch.wait()
        watch.close()


def test_the_ranks_of_an_attempt_and_other_jobs_live_side_by_side(owner):
    processes = [
        owner.fork(rank=0, devices=("gpu:0",)),
        owner.fork(rank=1, devices=("gpu:1",)),
        owner.fork(job="other", devices=("gpu:2",)),
        owner.fork(job="third"),
        owner.fork(job="fourth"),
    ]
    for forked in processes:
        assert forked.ask("describe")["pid"] == forked.pid


def test_a_later_attempt_starts_once_every_process_of_the_earlier_one_is_gone(owner):
    earlier = [owner.fork(attempt=1, rank=rank) for rank in range(2)]
    helper = Watch(earlier[0].ask("spawn"))
    other = owner.fork(job="other", attempt=1)
    later = owner.fork(attempt=2)
    assert helper.is_over()
    for forked in earlier:
        assert not group_is_alive(forked.pid)
        assert forked.process.exit_status() == -signal.SIGKILL
    assert later.ask("describe")["pid"] == later.pid
    assert other.ask("describe")["pid"] == other.pid
    helper.close()


def test_a_later_attempt_waits_for_a_group_that_lingers(owner, lingering):
    earlier = owner.fork(attempt=1)
    lingering.hold(earlier)
    with ThreadPoolExecutor(1) as pool:
        later = pool.submit(owner.fork, attempt=2)
        earlier.watch.wait()
        with pytest.raises(TimeoutError):
            later.result(timeout=0.3)
        lingering.let_go()
        assert later.result(timeout=DEADLINE_S).ask("describe")["parent_pid"] == owner.server.pid


def test_an_owner_that_will_not_wait_any_longer_is_forgotten(only_owner, lingering):
    earlier = only_owner.fork(attempt=1)
    lingering.hold(earlier)
    with pytest.raises(ForkRefused, match="rank 3"):
        only_owner.fork(attempt=2, rank=3, timeout_s=0.3)
    lingering.let_go()
    earlier.process.exit_status()
    again = only_owner.fork(attempt=2)
    # Had the one that gave up been forked after all, this would be its sibling.
    assert only_owner.server.forked_pids() == [again.pid]


def test_an_earlier_attempt_is_refused_even_after_the_later_one_has_ended(owner):
    later = owner.fork(attempt=2)
    with pytest.raises(ForkRefused, match="later attempt"):
        owner.fork(attempt=1)
    assert later.ask("describe")["pid"] == later.pid
    later.order("return", status=0)
    later.process.exit_status()
    with pytest.raises(ForkRefused, match="later attempt"):
        owner.fork(attempt=1)
    owner.fork(job="other", attempt=1)


def test_an_earlier_attempt_that_waits_does_not_end_the_later_one(owner, lingering):
    holder = owner.fork(job="holder", devices=("gpu:0",))
    lingering.hold(holder)
    with ThreadPoolExecutor(1) as pool:
        earlier = pool.submit(owner.fork, attempt=1, devices=("gpu:0",))
        holder.watch.wait()  # so the forkserver has its request
        later = owner.fork(attempt=2, devices=("gpu:1",))
        lingering.let_go()
        with pytest.raises(ForkRefused, match="later attempt"):
            earlier.result(timeout=DEADLINE_S)
    assert later.ask("describe")["pid"] == later.pid


def test_a_device_has_one_holder(owner):
    holder = owner.fork(job="earlier", devices=("gpu:0", "gpu:1"))
    neighbour = owner.fork(job="neighbour", devices=("gpu:2",))
    owner.fork(job="later", devices=("gpu:1",))
    assert not group_is_alive(holder.pid)
    assert neighbour.ask("describe")["pid"] == neighbour.pid


@pytest.fixture
def successor(only_owner, tmp_path):
    """A forkserver that takes another's place on the same machine, and has heard nothing of it."""
    with Server(tmp_path) as server, only_owner.moved_to(server) as owner:
        yield owner


@pytest.mark.parametrize("attempt", [1, 2])
def test_a_device_that_an_orphan_of_another_forkserver_holds_is_waited_for(only_owner, successor, attempt):
    orphan = only_owner.fork(job="earlier", devices=("gpu:0", "gpu:1"))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(successor.fork, job="later", attempt=attempt, devices=("gpu:1",))
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.3)
        assert not orphan.watch.is_over()
        assert successor.fork(job="neighbour", devices=("gpu:2",)).ask("describe")
        orphan.process.kill()
        assert waiting.result(timeout=DEADLINE_S).ask("describe")["parent_pid"] == successor.server.pid
    assert not group_runs(orphan.pid)


def test_a_later_attempt_waits_for_an_earlier_one_of_another_forkserver(only_owner, successor):
    earlier = only_owner.fork(attempt=1)
    with ThreadPoolExecutor(1) as pool:
        later = pool.submit(successor.fork, attempt=2)
        with pytest.raises(TimeoutError):
            later.result(timeout=0.3)
        only_owner.server.process.kill()
        assert later.result(timeout=DEADLINE_S).ask("describe")
    assert earlier.watch.is_over()


def test_an_earlier_attempt_is_refused_while_another_forkserver_runs_the_later_one(only_owner, successor):
    later = only_owner.fork(attempt=2)
    with pytest.raises(ForkRefused, match="later attempt"):
        successor.fork(attempt=1)
    assert later.ask("describe")["pid"] == later.pid


def test_the_ranks_of_an_attempt_may_have_several_forkservers_on_one_machine(only_owner, successor):
    assert only_owner.fork(rank=0).ask("describe")
    assert successor.fork(rank=1).ask("describe")


def test_a_successor_waits_for_helpers_too(only_owner, successor, lingering):
    """The leader is gone, and so is its lock; what is left of its group may still hold a device."""
    earlier = only_owner.fork(job="earlier", devices=("gpu:0",))
    lingering.hold(earlier)
    only_owner.server.process.kill()
    earlier.watch.wait()
    with ThreadPoolExecutor(1) as pool:
        later = pool.submit(successor.fork, job="later", devices=("gpu:0",))
        with pytest.raises(TimeoutError):
            later.result(timeout=0.3)
        lingering.let_go()
        assert later.result(timeout=DEADLINE_S).ask("describe")
    assert not group_runs(earlier.pid)  # nobody may be there to reap it


def test_helpers_end_though_owner_and_forkserver_were_killed_at_once(only_owner):
    command = [sys.executable, "-c", CLIENT, only_owner.server.socket_name, only_owner.request().model_dump_json()]
    helper = Watch(only_owner.fork(rank=1).ask("spawn"))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        watch = Watch(int(owner.stdout.readline()))
        owner.kill()
        only_owner.server.process.kill()
        for ended in (watch, helper):
            ended.wait()
            ended.close()


def test_a_reaper_that_was_killed_is_replaced_and_knows_what_there_is(only_owner):
    forked = only_owner.fork()
    helper = Watch(forked.ask("spawn"))
    reaper = Watch(only_owner.server.reaper_pid())
    os.kill(reaper.pid, signal.SIGKILL)
    reaper.wait()
    assert forked.ask("describe")["pid"] == forked.pid
    only_owner.fork(job="another")  # whoever forks has a reaper
    assert only_owner.server.reaper_pid() != reaper.pid
    only_owner.server.process.kill()
    helper.wait()
    helper.close()
    reaper.close()


def test_what_is_no_longer_held_leaves_no_file(only_owner, successor, tmp_path):
    for rank in range(3):
        forked = only_owner.fork(job=f"job-{rank}", devices=(f"gpu:{rank}",))
        forked.order("return", status=0)
        forked.process.exit_status()
    only_owner.fork(job="last")
    successor.fork(job="another")
    assert len(list((tmp_path / "fences").iterdir())) == 2


@pytest.mark.parametrize("packet", [b"{}", b"no json", b"x" * 70_000], ids=["empty", "text", "too-long"])
def test_a_request_that_is_none_harms_nobody(owner, packet):
    bystander = owner.fork()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(DEADLINE_S)
        connection.connect("\0" + owner.server.socket_name)
        connection.send(packet)
        assert "error" in json.loads(connection.recv(1 << 16))
        assert connection.recv(16) == b""
    assert bystander.ask("describe")["pid"] == bystander.pid


def test_an_owner_that_hangs_up_without_a_word_harms_nobody(owner):
    for _ in range(3):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect("\0" + owner.server.socket_name)
    assert owner.fork().ask("describe")["parent_pid"] == owner.server.pid


def test_without_a_forkserver_the_refusal_says_so(owner):
    process = {"request": owner.request(rank=5), "task_json": "{}", "descriptors": [0], "timeout_s": 5.0}
    with pytest.raises(ForkRefused, match=r"rank 5: .*refused"):
        ForkedProcess(socket_name="syncbn-test-nobody", **process)


def test_two_hundred_quick_forks_leave_no_process_and_no_descriptor(only_owner):
    only_owner.fork().close()
    before = only_owner.server.num_descriptors()
    mine = len(os.listdir("/proc/self/fd"))
    for number in range(200):
        forked = only_owner.fork(attempt=number + 1)
        if number % 2:
            forked.order("return", status=0)
            assert forked.process.exit_status() == 0
        forked.close()
    last = only_owner.fork(attempt=1000)  # starts once all earlier ones are gone
    assert only_owner.server.forked_pids() == [last.pid]
    last.order("return", status=0)
    last.process.exit_status()
    last.close()
    assert len(os.listdir("/proc/self/fd")) <= mine
    # Its own end of the last connection is closed right after the report.
    only_owner.fork(job="probe").ask("describe")
    assert only_owner.server.num_descriptors() <= before + 1
