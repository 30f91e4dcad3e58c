"""The one place that joins scheduler to cluster and API to store, through the domain's ports.

Each function is the whole of one process; `python -m service` starts them by name.
"""

import gc
import logging
import os
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime

from service.domain.errors import InvalidSpec, Unavailable
from service.domain.placement import Node, Resources
from service.domain.ports import Cluster
from service.settings import Settings

UNLIMITED = 1 << 62
# A driver that cannot reach its head would try for minutes; whoever started this process starts it again.
CONNECT_TIMEOUT_S = 60.0

logger = logging.getLogger(__name__)


def run_api(settings: Settings, listener: socket.socket | None = None, *, host: str, port: int) -> None:
    """Serve the REST API until told to stop.

    Args:
        settings: of the service; ``token`` is required.
        listener: inherited, bound and listening; connections made while the API restarts wait in its backlog.
        host: address to listen on, where there is no such socket.
        port: port to listen on; likewise.
    """
    from service.api.app import create_app  # noqa: PLC0415 - each process loads only what it runs
    from service.api.server import api_server, bind  # noqa: PLC0415
    from service.api.uploads import Uploads  # noqa: PLC0415
    from service.nudge import Nudge  # noqa: PLC0415
    from service.storage.object_store import ObjectStore  # noqa: PLC0415
    from service.storage.run_files import StoredRunFiles  # noqa: PLC0415
    from service.storage.uploads import StoredUploads  # noqa: PLC0415
    from service.store import SqlStore  # noqa: PLC0415

    _log_to_stderr()
    if not settings.token:
        raise InvalidSpec("SYNCBN_TOKEN is not set: the API answers nobody without a token.")
    store = SqlStore(settings.database)
    storage = ObjectStore(settings.storage)
    app = create_app(
        store=store,
        files=StoredRunFiles(storage),
        uploads=Uploads(
            rows=store,
            files=StoredUploads(storage),
            directory=settings.upload_dir_or_default,
            max_bundle_bytes=settings.max_bundle_bytes,
            max_dataset_bytes=settings.max_dataset_bytes,
        ),
        token=settings.token,
        nudge=Nudge(settings.database),
        capacity=_capacity(settings),
    )
    gc.collect()
    gc.freeze()  # modules and routes stay: to go through them again and again would stop every request meanwhile
    api_server(app).run(sockets=[listener or bind(host, port)])


@contextmanager
def ray_cluster(settings: Settings) -> Iterator[Cluster]:
    """Be a driver of the Ray cluster at ``settings.ray_address``, which is required."""
    from service.cluster.ray_cluster import RayCluster  # noqa: PLC0415
    from service.storage.object_store import ObjectStore  # noqa: PLC0415

    if not settings.ray_address:
        raise InvalidSpec("SYNCBN_RAY_ADDRESS is not set: the scheduler has no cluster.")
    too_late = threading.Timer(CONNECT_TIMEOUT_S, _give_up_connecting, [settings.ray_address])
    too_late.start()
    cluster = RayCluster(
        address=settings.ray_address,
        node_ip=settings.node_ip,
        work_dir=str(settings.node_dir_or_default),
        storage=ObjectStore(settings.storage),
        num_warm_supervisors=settings.warm_supervisors,
        num_warm_ranks=settings.warm_ranks,
    )
    too_late.cancel()
    yield cluster
    cluster.disconnect()


def run_scheduler(
    settings: Settings, connect: Callable[[Settings], AbstractContextManager[Cluster]] = ray_cluster
) -> None:
    """Run the scheduler until told to stop; then stop what runs, in order, so that it is queued again.

    Args:
        settings: of the service.
        connect: gives it a cluster.
    """
    from service.nudge import NudgeListener  # noqa: PLC0415
    from service.scheduler.launches import LaunchFactory  # noqa: PLC0415
    from service.scheduler.leadership import Leadership  # noqa: PLC0415
    from service.scheduler.loop import Scheduler  # noqa: PLC0415
    from service.storage.object_store import ObjectStore  # noqa: PLC0415
    from service.storage.run_files import StoredRunFiles  # noqa: PLC0415
    from service.store import SqlStore  # noqa: PLC0415

    _log_to_stderr()
    stop_asked = False

    def ask_to_stop(*_: object) -> None:
        nonlocal stop_asked
        stop_asked = True

    store = SqlStore(settings.database)
    storage = ObjectStore(settings.storage)
    storage_id = storage.identify()
    leadership = Leadership(
        holder=f"{socket.gethostname()}/{os.getpid()}/{uuid.uuid4().hex[:8]}",  # containers share names and ids
        store=store,
        ttl_s=settings.lease_ttl_s,
    )
    with suppress(Unavailable):  # the loop waits for the database
        leadership.observe()  # what is left of a dead leader's lease passes while the cluster is being connected to
    with connect(settings) as cluster:
        # After ray.init, which sets a handler of its own.
        signal.signal(signal.SIGTERM, ask_to_stop)
        signal.signal(signal.SIGINT, ask_to_stop)
        scheduler = Scheduler(
            leadership=leadership,
            store=store,
            cluster=cluster,
            files=StoredRunFiles(storage),
            make_launch=LaunchFactory(
                store=store,
                storage_url=settings.storage,
                storage_id=storage_id,
                collective_timeout_s=settings.collective_timeout_s,
                start_timeout_s=settings.start_timeout_s,
                prepare_timeout_s=settings.prepare_timeout_s,
                node_cache_bytes=settings.node_cache_bytes,
                max_log_bytes=settings.max_log_bytes,
                stop_grace_s=settings.stop_grace_s,
            ),
            launch_timeout_s=settings.start_timeout_s,
            resize_interval_s=settings.resize_interval_s,
        )
        scheduler.run(NudgeListener(settings.database).wait, lambda: stop_asked)
        scheduler.stop_all(deadline_s=settings.stop_grace_s + settings.lease_ttl_s)


def migrate_database(settings: Settings) -> None:
    """Bring the database's tables up to this version; safe to run by several processes at once."""
    from service.store import migrate  # noqa: PLC0415

    migrate(settings.database)


def last_observed(settings: Settings) -> datetime | None:
    """Return when a scheduler last saw the cluster, by the database's clock; None: never."""
    from service.store import SqlStore  # noqa: PLC0415

    store = SqlStore(settings.database)
    observed_at = store.cluster().observed_at
    store.close()
    return observed_at


def _capacity(settings: Settings) -> tuple[Node, ...] | None:
    """The most the cluster will ever have, as far as the operator said; it counts as one node."""
    cpus, gpus, memory_bytes = settings.max_cpus, settings.max_gpus, settings.max_memory_bytes
    if cpus is None and gpus is None and memory_bytes is None:
        return None
    total = Resources(
        cpus=UNLIMITED if cpus is None else cpus,
        gpus=UNLIMITED if gpus is None else gpus,
        memory_bytes=UNLIMITED if memory_bytes is None else memory_bytes,
    )
    return (Node(id="capacity", address="", total=total),)


def _give_up_connecting(address: str) -> None:
    logger.critical("Ray's head at %s does not answer after %g s", address, CONNECT_TIMEOUT_S)
    os._exit(1)


def _log_to_stderr() -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
