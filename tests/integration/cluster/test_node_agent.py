"""The owner of a node's forkserver, without Ray. A failure means leaked secrets, or an agent that hangs or hides."""

import os
import subprocess
from types import SimpleNamespace

import pytest

from service.cluster import node_agent
from service.cluster.node_agent import NodeAgent
from service.cluster.rank_directory import RankDirectory, RankOwner
from service.storage.layout import launch_marker, log_dir
from service.storage.object_store import ObjectStore
from service.storage.segments import read_sequence
from tests.fakes import wait_for
from tests.integration.cluster.forking import DEADLINE_S, ENTRY, ROOT, Owner


@pytest.fixture
def start_agent(tmp_path, monkeypatch):
    """Starts agents whose processes carry out the tests' orders instead of training."""
    context = SimpleNamespace(get_node_id=lambda: "node-1")
    monkeypatch.setattr(node_agent.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(node_agent, "ENTRY", ENTRY)
    monkeypatch.setattr(node_agent, "PRELOAD", ("json",))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    started = []
    popen = subprocess.Popen

    def remember(*args, **options):
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(node_agent.subprocess, "Popen", remember)
    yield lambda: NodeAgent(str(tmp_path / "work"), num_warm_ranks=0)
    for process in started:
        process.kill()
        process.wait(DEADLINE_S)


def test_no_secret_of_the_service_or_of_ray_reaches_a_training_process(start_agent, tmp_path, monkeypatch):
    for name in ("SYNCBN_TOKEN", "SYNCBN_DATABASE_URL", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("PGPASSWORD", "secret")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("USERS_OWN", "kept")
    monkeypatch.setenv("SYNCBN_PASS_ENVIRONMENT", "OTHER, USERS_OWN")
    socket_name, _ = start_agent().forkserver()
    with Owner(SimpleNamespace(socket_name=socket_name), tmp_path) as owner:
        environment = owner.fork().ask("describe")["environment"]
    assert not [name for name in environment if name.startswith(("SYNCBN_", "RAY_"))]
    assert "secret" not in environment.values()
    assert environment["USERS_OWN"] == "kept"
    assert environment["NCCL_DEBUG"] == "WARN"
    assert environment["OMP_NUM_THREADS"] == "1"


def test_an_agent_ships_what_is_left_of_the_logs_of_killed_ranks(start_agent, tmp_path):
    """Also of those that ran here when this machine was another node, before it was restarted."""
    store = ObjectStore(str(tmp_path / "runs"))
    fields = {"job_id": "job", "attempt": 1, "storage_url": store.url, "storage_id": store.identify()}
    store.create_exclusively(launch_marker("job", 1), b"17")
    ranks = []
    for rank, node in enumerate(("node-1", "an-earlier-node", "node-1")):
        owner = RankOwner(rank=rank, max_log_bytes=1 << 20, **fields)
        ranks.append(RankDirectory(tmp_path / "work" / node, owner))
        ranks[-1].log_path.write_bytes(b"last words of %d\n" % rank)
    for rank in ranks[:2]:
        os.close(rank._hold)  # as the kernel does when an actor is killed
    agent = start_agent()
    wait_for(lambda: not ranks[0].path.exists() and not ranks[1].path.exists())
    assert agent.forkserver()
    assert read_sequence(store, log_dir("job", 1, 0), 0) == b"last words of 0\n"
    assert read_sequence(store, log_dir("job", 1, 1), 0) == b"last words of 1\n"
    assert ranks[2].log_path.read_bytes() == b"last words of 2\n"


def test_a_new_agent_clears_what_an_earlier_one_left(start_agent, tmp_path):
    left = tmp_path / "work" / "node-1" / "job" / "staging"
    left.mkdir(parents=True)
    other_node = tmp_path / "work" / "node-2"
    other_node.mkdir()
    _, work_dir = start_agent().forkserver()
    assert work_dir == str(tmp_path / "work" / "node-1")
    assert os.listdir(work_dir) == ["forkserver.log"]
    assert os.stat(work_dir).st_mode & 0o077 == 0
    assert other_node.exists()


def test_a_forkserver_that_died_is_replaced(start_agent, tmp_path):
    agent = start_agent()
    first, _ = agent.forkserver()
    assert agent.forkserver()[0] == first
    agent._forkserver.kill()
    agent._forkserver.wait(DEADLINE_S)
    second, _ = agent.forkserver()
    assert second != first
    with Owner(SimpleNamespace(socket_name=second), tmp_path) as owner:
        assert owner.fork().ask("describe")["environment"]


def test_a_forkserver_that_does_not_start_is_an_error_with_its_log(start_agent, monkeypatch):
    monkeypatch.setattr(node_agent, "PRELOAD", ("no_such_module",))
    with pytest.raises(RuntimeError, match="No module named 'no_such_module'"):
        start_agent()


def test_a_forkserver_that_says_something_else_is_an_error_and_not_waited_for(start_agent, monkeypatch):
    monkeypatch.setattr(node_agent, "PRELOAD", ("this",))  # the Zen of Python, on standard output
    with pytest.raises(RuntimeError, match="before it was ready"):
        start_agent()
