"""The one place that joins scheduler to cluster and API to store, through the domain's ports.

Each function is the whole of one process; `python -m service` starts them by name.
"""

import logging
import os
import signal
import socket
import sys

from service.domain.errors import InvalidSpec
from service.domain.placement import Node, Resources
from service.settings import Settings

logger = logging.getLogger(__name__)


def run_api(settings: Settings, listener: socket.socket) -> None:
    """Serve the REST API until told to stop.

    Args:
        settings: of the service; ``token`` is required.
        listener: bound and listening; connections made while the API restarts wait in its backlog.
    """
    from service.api.app import create_app  # noqa: PLC0415 - each process loads only what it runs
    from service.api.server import api_server  # noqa: PLC0415
    from service.nudge import Nudge  # noqa: PLC0415
    from service.storage.object_store import ObjectStore  # noqa: PLC0415
    from service.storage.run_files import StoredRunFiles  # noqa: PLC0415
    from service.store import SqlStore  # noqa: PLC0415

    _log_to_stderr()
    if not settings.token:
        raise InvalidSpec("SYNCBN_TOKEN is not set: the API answers nobody without a token.")
    app = create_app(
        store=SqlStore(settings.database),
        files=StoredRunFiles(ObjectStore(settings.storage)),
        token=settings.token,
        nudge=Nudge(settings.database),
        capacity=_capacity(settings),
    )
    api_server(app).run(sockets=[listener])


def run_scheduler(settings: Settings) -> None:
    """Run the scheduler until told to stop; then stop what runs, in order, so that it is queued again.

    Args:
        settings: of the service; ``ray_address`` is required.
    """
    from service.cluster.ray_cluster import RayCluster  # noqa: PLC0415
    from service.nudge import NudgeListener  # noqa: PLC0415
    from service.scheduler.launches import LaunchFactory  # noqa: PLC0415
    from service.scheduler.loop import Scheduler  # noqa: PLC0415
    from service.storage.object_store import ObjectStore  # noqa: PLC0415
    from service.storage.run_files import StoredRunFiles  # noqa: PLC0415
    from service.store import SqlStore  # noqa: PLC0415

    _log_to_stderr()
    if not settings.ray_address:
        raise InvalidSpec("SYNCBN_RAY_ADDRESS is not set: the scheduler has no cluster.")
    stop_asked = False

    def ask_to_stop(*_: object) -> None:
        nonlocal stop_asked
        stop_asked = True

    store = SqlStore(settings.database)
    storage = ObjectStore(settings.storage)
    storage.probe()
    cluster = RayCluster(
        address=settings.ray_address, node_ip=settings.node_ip, work_dir=str(settings.node_dir_or_default)
    )
    # After ray.init, which sets a handler of its own.
    signal.signal(signal.SIGTERM, ask_to_stop)
    signal.signal(signal.SIGINT, ask_to_stop)
    scheduler = Scheduler(
        holder=f"{socket.gethostname()}/{os.getpid()}",
        store=store,
        cluster=cluster,
        files=StoredRunFiles(storage),
        make_launch=LaunchFactory(
            store=store,
            storage_url=settings.storage,
            collective_timeout_s=settings.collective_timeout_s,
            start_timeout_s=settings.start_timeout_s,
            stop_grace_s=settings.stop_grace_s,
        ),
        lease_ttl_s=settings.lease_ttl_s,
        launch_timeout_s=settings.start_timeout_s,
    )
    scheduler.run(NudgeListener(settings.database).wait, lambda: stop_asked)
    scheduler.stop_all(deadline_s=settings.stop_grace_s + settings.lease_ttl_s)
    cluster.disconnect()


def migrate_database(settings: Settings) -> None:
    """Bring the database's tables up to this version; safe to run by several processes at once."""
    from service.store import migrate  # noqa: PLC0415

    migrate(settings.database)


def _capacity(settings: Settings) -> tuple[Node, ...] | None:
    """The most the cluster will ever have, where the operator said so; it counts as one node."""
    if settings.max_cpus is None:
        return None
    total = Resources(
        cpus=settings.max_cpus, gpus=settings.max_gpus or 0, memory_bytes=settings.max_memory_bytes or 1 << 62
    )
    return (Node(id="capacity", address="", total=total),)


def _log_to_stderr() -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
