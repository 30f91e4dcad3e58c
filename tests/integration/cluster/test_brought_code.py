"""Code and data that a job brings, from run storage to a forked rank. A failure means ranks of a node that fetch or
install more than once, code that sees secrets, or a refusal that does not reach the job."""

import hashlib
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from service.cluster import node_agent, rank_actor
from service.cluster.node_agent import NodeAgent
from service.cluster.preparation import Preparation
from service.cluster.rank_actor import RankActor
from service.domain.errors import UserCodeRefused
from service.domain.ports import Launch
from service.domain.rank_protocol import RankTask
from service.domain.uploads import NewUpload, UploadKind
from service.storage.layout import log_dir
from service.storage.node_cache import NodeCache
from service.storage.object_store import ObjectStore
from service.storage.segments import read_sequence
from service.storage.uploads import StoredUploads
from tests.archives import make_zip
from tests.fakes import spec
from tests.integration.cluster.forking import DEADLINE_S, ENTRY, ROOT, Owner
from tests.unit.cluster.test_requirements import wheel

SECRETS = ("SYNCBN_TOKEN", "SYNCBN_DATABASE_URL", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "AWS_SECRET_ACCESS_KEY")
RANK = 1  # not the first, which would listen for others
SPY = b"""
import os, subprocess, sys
from pathlib import Path
import tiny

def look():
    child = subprocess.run([sys.executable, "-c", "import os; print(os.environ)"], capture_output=True, text=True)
    return {
        "own": dict(os.environ),
        "own_file": Path("/proc/self/environ").read_text(),
        "parents_file": Path(f"/proc/{os.getppid()}/environ").read_text(),
        "childs": child.stdout,
        "tiny": tiny.where,
        "where": __file__,
    }
"""


@pytest.fixture
def store(tmp_path):
    store = ObjectStore(str(tmp_path / "runs"))
    store.identify()
    return store


@pytest.fixture
def bring(store):
    """Uploads a bundle or a file of data."""

    def keep(files, name=None):
        content = make_zip(files)
        kind = UploadKind.BUNDLE if name is None else UploadKind.DATASET
        sha256 = hashlib.sha256(content).hexdigest()
        new = NewUpload(kind=kind, sha256=sha256, name=name or "", size_bytes=0, entries=None, owner="token")
        with tempfile.TemporaryFile() as file:
            file.write(content)
            file.flush()
            StoredUploads(store).keep(new, file)
        return sha256

    return keep


@pytest.fixture
def launch_of(store):
    def launch(**changes):
        return Launch(
            job_id="job",
            attempt=1,
            spec=spec(**changes),
            node_ids=("node-1",),
            storage_url=store.url,
            storage_id=store.identify(),
            checkpoints=(),
            collective_timeout_s=1.0,
            start_timeout_s=DEADLINE_S,
            stop_grace_s=1.0,
        )

    return launch


@pytest.fixture
def agent(tmp_path, monkeypatch):
    """A node's agent whose environment is full of secrets; its processes carry out the tests' orders."""
    monkeypatch.setattr(node_agent.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node-1"))
    monkeypatch.setattr(node_agent, "ENTRY", ENTRY)
    monkeypatch.setattr(node_agent, "PRELOAD", ("json",))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in SECRETS:
        monkeypatch.setenv(name, "s3cret")
    started = []
    popen = subprocess.Popen

    def remember(*args, **options):
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(node_agent.subprocess, "Popen", remember)
    agent = NodeAgent(str(tmp_path / "work"), num_warm_ranks=0)
    monkeypatch.setattr(node_agent.subprocess, "Popen", popen)
    yield agent
    for process in started:
        process.kill()
        process.wait(DEADLINE_S)


@pytest.fixture
def make_actor(agent, monkeypatch):
    """Makes rank actors as Ray would, without Ray."""
    monkeypatch.setattr(rank_actor.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(RankActor, "_find_forkserver", lambda self: agent.forkserver())
    return RankActor


def tiny_wheel(tmp_path):
    return wheel(tmp_path / "wheels").read_bytes()


def with_requirements(tmp_path, **files):
    return {
        "spy.py": SPY,
        "requirements.txt": b"--no-index\n--find-links wheels\ntiny\n",
        "wheels/tiny-1.0-py3-none-any.whl": tiny_wheel(tmp_path),
        **files,
    }


def test_ranks_of_a_node_share_one_bundle_and_one_installation(store, bring, launch_of, tmp_path):
    data = bring({"a.npy": b"x"}, name="data.npz")
    dataset = {"factory": "builtin:npz", "args": {"path": f"upload:{data}"}}
    code = {"bundle": bring(with_requirements(tmp_path)), "requirements": True}
    launch = launch_of(code=code, dataset=dataset)

    def prepare(rank):
        with (tmp_path / f"{rank}.log").open("ab") as log:
            return Preparation.fetch(launch, store, tmp_path / "cache", log)

    with ThreadPoolExecutor(4) as pool:
        prepared = list(pool.map(prepare, range(4)))
    assert len({(one.code_dir, one.packages_dir, *one.uploads.items()) for one in prepared}) == 1
    # One of them ran pip.
    assert sum("Successfully installed tiny-1.0" in path.read_text() for path in tmp_path.glob("*.log")) == 1
    first = prepared[0]
    assert (first.code_dir / "spy.py").exists()
    assert (first.packages_dir / "tiny.py").exists()
    assert first.uploads[data].name == "data.npz"
    # What is in use stays, whatever comes; what nobody uses goes.
    small = NodeCache(tmp_path / "cache", max_bytes=1)
    small.claim("bundles", "other", lambda content: (content / "f").write_bytes(b"xx")).close()
    assert first.code_dir.exists()
    assert first.packages_dir.exists()
    for one in prepared:
        one.close()
    small.claim("bundles", "another", lambda content: (content / "f").write_bytes(b"xx")).close()
    assert not first.code_dir.exists()
    assert not first.packages_dir.exists()


def test_brought_code_sees_no_secret_of_the_service_of_ray_or_of_storage(bring, launch_of, make_actor, agent, tmp_path):
    launch = launch_of(code={"bundle": bring(with_requirements(tmp_path)), "requirements": True})
    actor = make_actor()
    actor.prepare(launch, RANK, None)
    brought = actor._preparation
    task = RankTask(
        job_id="job", attempt=1, spec=launch.spec, rank=0, world_size=1, rendezvous_host="", rendezvous_port=1,
        rendezvous_fd=None, interface=None, num_threads=1, staging_dir="", resume_dir=None, collective_timeout_s=1,
        code_dir=str(brought.code_dir), packages_dir=str(brought.packages_dir),
    )  # fmt: skip
    socket_name, work_dir = agent.forkserver()
    with Owner(SimpleNamespace(socket_name=socket_name), tmp_path) as owner:
        forked = owner.fork(task=task.model_dump_json(), environment={"PYTHONDONTWRITEBYTECODE": "1"})
        seen = forked.ask("bring", module="spy", function="look")
    assert seen["where"].startswith(work_dir)
    assert seen["tiny"] == "wheel"
    assert not [name for name in seen["own"] if name.startswith(("SYNCBN_", "RAY_", "AWS_"))]
    assert "s3cret" not in str(seen)
    # The agent's own environment has them: they were there to be seen.
    assert os.environ["SYNCBN_TOKEN"] == "s3cret"
    # Nothing was written beside the code: another rank takes it as it is.
    assert not list(brought.code_dir.rglob("__pycache__"))
    actor._directory.remove()
    other = make_actor()
    other.prepare(launch, RANK, None)
    assert other._preparation.code_dir == brought.code_dir


@pytest.mark.parametrize(
    ("files", "requirements", "part"),
    [
        ({"mine.py": b""}, True, "no requirements.txt"),
        ({"mine.py": b"", "requirements.txt": b"-e .\n"}, True, "Line 1 of the bundle's requirements.txt"),
        ({"requirements.txt": b"--no-index\nabsent-thing\n"}, True, "cannot be installed"),
    ],
)
def test_a_refusal_names_the_remedy_and_its_log_is_kept(bring, launch_of, make_actor, store, files, requirements, part):
    launch = launch_of(code={"bundle": bring(files), "requirements": requirements})
    with pytest.raises(UserCodeRefused, match=part):
        make_actor().prepare(launch, RANK, None)
    log = read_sequence(store, log_dir("job", 1, RANK), 0).decode()
    assert ("ERROR: " in log) == (part == "cannot be installed")


def test_what_could_not_be_installed_this_time_is_no_refusal_and_its_log_is_kept(
    bring, launch_of, make_actor, store, monkeypatch
):
    monkeypatch.setenv("SYNCBN_PASS_ENVIRONMENT", "PIP_RETRIES")
    monkeypatch.setenv("PIP_RETRIES", "0")
    # A name that no network resolves.
    lines = b"--index-url https://index.invalid/simple\ntiny\n"
    launch = launch_of(code={"bundle": bring({"requirements.txt": lines}), "requirements": True})
    with pytest.raises(OSError, match="cannot be installed"):
        make_actor().prepare(launch, RANK, None)
    assert "ERROR: " in read_sequence(store, log_dir("job", 1, RANK), 0).decode()


def test_a_bundle_that_is_gone_is_a_refusal(launch_of, make_actor):
    with pytest.raises(UserCodeRefused, match="syncbn bundle"):
        make_actor().prepare(launch_of(code={"bundle": "0" * 64}), RANK, None)


def test_a_job_that_brings_nothing_is_prepared_at_once(launch_of, make_actor, agent):
    actor = make_actor()
    actor.prepare(launch_of(), RANK, None)
    assert (actor._preparation.code_dir, actor._preparation.packages_dir, actor._preparation.uploads) == (
        None,
        None,
        {},
    )
    assert "cache" not in os.listdir(agent.forkserver()[1])
