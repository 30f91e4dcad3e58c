import shutil
from concurrent.futures import Future

import pytest
from hypothesis import HealthCheck, settings

from service.domain.job import JobStatus
from service.domain.ports import Lease
from service.domain.spec import parse_spec
from service.scheduler import follower, loop, sweeper
from service.scheduler.launches import LaunchFactory
from service.scheduler.leadership import Leadership
from service.scheduler.loop import Scheduler
from service.storage.object_store import ObjectStore
from service.storage.run_files import StoredRunFiles
from service.store import SqlStore, migrate
from tests.fake_cluster import FakeCluster

# Examples take milliseconds; what takes longer is a busy machine.
settings.register_profile("busy-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy-machine")


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("scheduler") / "migrated.sqlite"
    migrate(f"sqlite:///{path}")
    return path


class House:
    """A real database, real files and a cluster that a test moves; schedulers are stepped one iteration at a time."""

    def __init__(self, directory, migrated_file):
        shutil.copy(migrated_file, directory / "service.sqlite")
        self.store = SqlStore(f"sqlite:///{directory / 'service.sqlite'}")
        self.storage = ObjectStore(str(directory / "runs"))
        self.files = StoredRunFiles(self.storage)
        self.cluster = FakeCluster(self.storage)

    def scheduler(
        self, holder="first", *, store=None, files=None, lease_ttl_s=60.0, launch_timeout_s=60.0, resize_interval_s=0.0
    ):
        store = store or self.store
        return Scheduler(
            leadership=Leadership(holder=holder, store=store, ttl_s=lease_ttl_s),
            store=store,
            cluster=self.cluster,
            files=files or self.files,
            make_launch=LaunchFactory(
                store=store,
                storage_url=self.storage.url,
                storage_id=self.storage.identify(),
                collective_timeout_s=1.0,
                start_timeout_s=2.0,
                stop_grace_s=3.0,
            ),
            launch_timeout_s=launch_timeout_s,
            resize_interval_s=resize_interval_s,
        )

    def lease(self):
        """The lease of whoever leads."""
        state = self.store.read_lease()
        assert state.holder is not None
        return Lease(holder=state.holder, epoch=state.epoch)

    def submit(self, **changes):
        """Return the id of a new job."""
        data = {
            "name": "digits",
            "model": {"factory": "builtin:mlp"},
            "dataset": {"factory": "builtin:digits"},
            "batch": {"size": 16},
            "steps": 100,
        }
        retry = {"backoff_s": 0.0, **changes.pop("retry", {})}  # no test waits for a pause that it does not look at
        return self.store.submit(parse_spec({**data, **changes, "retry": retry}))[0].id

    def start(self, scheduler, **changes):
        """Return the id of a job whose first attempt runs."""
        job_id = self.submit(**changes)
        scheduler.step()
        self.cluster.run(job_id, 1)
        scheduler.step()
        assert self.store.get(job_id).status is JobStatus.RUNNING
        return job_id

    def status(self, job_id):
        job = self.store.get(job_id)
        return job.status, job.reason


class InlineExecutor:
    """Does at once what a thread would do some time."""

    def __init__(self, **_):
        pass

    def submit(self, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, **_):
        pass


@pytest.fixture
def house(tmp_path, migrated_file, monkeypatch):
    monkeypatch.setattr(sweeper, "ThreadPoolExecutor", InlineExecutor)
    # Every iteration looks at the nodes and repeats what may have been lost.
    monkeypatch.setattr(loop, "NODES_INTERVAL_S", 0.0)
    monkeypatch.setattr(follower, "STOP_REPEAT_S", 0.0)
    house = House(tmp_path, migrated_file)
    yield house
    house.store.close()


@pytest.fixture
def scheduler(house):
    return house.scheduler()
