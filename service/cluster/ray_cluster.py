"""The cluster as the scheduler sees it; implements ``service.domain.ports.Cluster`` on Ray Core."""

import logging
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from service.cluster.launch_marker import read_launch_marker
from service.cluster.names import NAMESPACE, is_supervisor_name, node_agent_name
from service.cluster.node_agent import NodeAgent
from service.cluster.supervisor_pool import NamedSupervisor, SupervisorPool
from service.domain.errors import ServiceError, Unavailable
from service.domain.job import Reason
from service.domain.journal import JournalRecord
from service.domain.placement import Node, Resources
from service.domain.ports import JournalPage, Launch, SupervisorState
from service.storage.object_store import ObjectStore

# How long a read may rest with a supervisor that has nothing new, and how long the scheduler looks for the answer.
REST_S = 5.0
LOOK_S = 0.02
# A supervisor that has not answered for this much longer than it may rest cannot be reached.
PATIENCE_S = 10.0
MARKER_READERS = 16
# How long an attempt may take to arrive at the supervisor that it was given to. Ray keeps no order between calls: a
# question may overtake it.
ARRIVAL_S = 10.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Read:
    """A read that rests with a supervisor until there is something new."""

    after: int
    supervisor: NamedSupervisor
    reference: Any
    asked_at: float = field(default_factory=time.monotonic)

    def age_s(self) -> float:
        return time.monotonic() - self.asked_at


class RayCluster:
    """A driver of a running Ray cluster.

    Args:
        address: ``host:port`` of the head.
        node_ip: address of this machine that the cluster's nodes use; None: let Ray find it.
        work_dir: node-local directory for logs and staged checkpoints, on every node.
        storage: run storage, where launch markers say who supervises an attempt.
        num_warm_supervisors: how many supervisors wait for an attempt.
        num_warm_ranks: how many rank actors wait for an attempt on each node.
    """

    def __init__(
        self,
        *,
        address: str,
        node_ip: str | None,
        work_dir: str,
        storage: ObjectStore,
        num_warm_supervisors: int,
        num_warm_ranks: int,
    ) -> None:
        self._work_dir = work_dir
        self._storage = storage
        self._num_warm_ranks = num_warm_ranks
        self._pool = SupervisorPool(num_warm_supervisors)
        # Those that attempts were given to, and those that their markers name.
        self._supervisors: dict[tuple[str, int], NamedSupervisor] = {}
        self._assigned_at: dict[tuple[str, int], float] = {}
        self._reads: dict[tuple[str, int], _Read] = {}
        self._agents: dict[str, _Agent] = {}
        options: dict[str, Any] = {} if node_ip is None else {"_node_ip_address": node_ip}
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False, **options)

    def nodes(self) -> tuple[Node, ...]:
        """Return the nodes that can run a rank: alive, with CPUs, and with a forkserver that is ready.

        Each node gets an agent, and with it a forkserver, as soon as it is seen. Called about once a second, it also
        sees that supervisors and rank actors wait for attempts.
        """
        try:
            found = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
            self._agents = {node["NodeID"]: self._agent(node["NodeID"]) for node in found}
            if any(agent.is_ready for agent in self._agents.values()):
                self._pool.keep_up()
        except RayError as error:
            raise Unavailable(f"Ray does not answer: {error}") from error
        return tuple(
            Node(
                id=node["NodeID"],
                address=node["NodeManagerAddress"],
                total=Resources(
                    cpus=node["Resources"]["CPU"],
                    gpus=int(node["Resources"].get("GPU", 0)),
                    memory_bytes=int(node["Resources"].get("memory", 0)),
                ),
            )
            for node in sorted(found, key=lambda node: str(node["NodeID"]))
            if self._agents[node["NodeID"]].is_ready
        )

    def launch(self, launch: Launch) -> None:
        """Start the supervisor of an attempt, without waiting for it; starting it twice has no second effect."""
        key = (launch.job_id, launch.attempt)
        try:
            if key not in self._supervisors:
                self._supervisors[key] = self._pool.take()
                self._assigned_at[key] = time.monotonic()
            self._supervisors[key].actor.assign.remote(launch)
        except RayError as error:
            raise Unavailable(f"Ray did not take the supervisor: {error}") from error

    def read(self, job_id: str, attempt: int, *, after: int) -> JournalPage:
        """Return what an attempt reported since; never waits longer than a moment."""
        key = (job_id, attempt)
        read = self._reads.get(key)
        if read is None or read.after != after:
            try:
                supervisor = self._supervisor(job_id, attempt)
            except (RayError, OSError, ServiceError):
                return JournalPage(state=SupervisorState.UNREACHABLE, records=())
            if supervisor is None:
                return JournalPage(state=SupervisorState.GONE, records=())
            reference = supervisor.actor.read.remote(job_id, attempt, after, REST_S)
            read = self._reads[key] = _Read(after=after, supervisor=supervisor, reference=reference)
        done, _ = ray.wait([read.reference], timeout=LOOK_S)
        if not done:
            if read.age_s() <= REST_S + PATIENCE_S:
                return JournalPage(state=SupervisorState.ALIVE, records=())
            del self._reads[key]  # lost on the way, perhaps; the next look asks again
            return JournalPage(state=SupervisorState.UNREACHABLE, records=())
        del self._reads[key]
        try:
            records: Sequence[JournalRecord] | None = ray.get(read.reference)
        except (ActorUnavailableError, GetTimeoutError):
            return JournalPage(state=SupervisorState.UNREACHABLE, records=())
        except RayActorError:
            return self._not_there(key, read.supervisor)
        except RayError:
            logger.exception("The supervisor of %s attempt %d could not answer", job_id, attempt)
            return JournalPage(state=SupervisorState.UNREACHABLE, records=())
        if records is None and after == 0 and self._may_be_on_its_way(key, read.supervisor):
            return JournalPage(state=SupervisorState.ALIVE, records=())
        if records is None:
            self._pool.give_back(read.supervisor, job_id, attempt)
            return self._not_there(key, read.supervisor)
        return JournalPage(state=SupervisorState.ALIVE, records=tuple(records))

    def stop(self, job_id: str, attempt: int, reason: Reason) -> None:
        """Ask an attempt for a checkpoint and an end; does not wait."""
        with suppress(RayError, OSError, ServiceError):  # gone or unreachable: the next read says which
            supervisor = self._supervisor(job_id, attempt)
            if supervisor is not None:
                supervisor.actor.stop.remote(job_id, attempt, reason)

    def close(self, job_id: str, attempt: int) -> None:
        """Release what is left of an attempt whose end has been recorded: its supervisor and placement group."""
        self._reads.pop((job_id, attempt), None)
        self._assigned_at.pop((job_id, attempt), None)
        with suppress(RayError, OSError, ServiceError):  # gone already
            supervisor = self._supervisor(job_id, attempt)
            self._supervisors.pop((job_id, attempt), None)
            if supervisor is not None:
                self._pool.give_back(supervisor, job_id, attempt)

    def supervisors(self) -> tuple[str, ...]:
        """Return the names of all supervisors in the cluster, those that wait for an attempt among them."""
        try:
            names = [str(entry["name"]) for entry in list_named_actors(all_namespaces=True)]
        except RayError as error:
            raise Unavailable(f"Ray does not answer: {error}") from error
        return tuple(filter(is_supervisor_name, names))

    def close_all_but(self, attempts: Collection[tuple[str, int]], supervisors: Collection[str]) -> None:
        """Close those of these supervisors that none of these attempts has, and that do not wait for one here."""
        try:
            with ThreadPoolExecutor(MARKER_READERS) as readers:  # an object store takes its time for each
                owners = set(readers.map(lambda key: read_launch_marker(self._storage, *key), attempts))
            known = {supervisor.name for key, supervisor in self._supervisors.items() if key in attempts}
            for name in set(supervisors) - owners - known - self._pool.names:
                with suppress(ValueError):  # gone by now
                    ray.kill(ray.get_actor(name, namespace=NAMESPACE))
        except (RayError, OSError, ServiceError) as error:
            raise Unavailable(f"Ray or run storage does not answer: {error}") from error

    def disconnect(self) -> None:
        """Leave the cluster; supervisors that have an attempt run on."""
        with suppress(RayError):
            self._pool.close()
        ray.shutdown()

    def _supervisor(self, job_id: str, attempt: int) -> NamedSupervisor | None:
        """Return an attempt's supervisor, whether or not it lives; None if there is none, or none any more.

        Raises:
            RayError: Ray does not answer.
            OSError: run storage does not answer.
        """
        known = self._supervisors.get((job_id, attempt))
        if known is not None:
            return known
        name = read_launch_marker(self._storage, job_id, attempt)
        try:
            actor = None if name is None else ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            return None
        if name is None:
            return None
        found = self._supervisors[job_id, attempt] = NamedSupervisor(name=name, actor=actor)
        return found

    def _may_be_on_its_way(self, key: tuple[str, int], asked: NamedSupervisor) -> bool:
        """Return whether an attempt was given to its supervisor so lately that this may not have known of it yet.

        It may know by now: then the marker has its name. One that another supervisor has is not on its way.
        """
        assigned_at = self._assigned_at.get(key)
        if assigned_at is None or time.monotonic() - assigned_at >= ARRIVAL_S:
            return False
        with suppress(OSError, ServiceError):
            return read_launch_marker(self._storage, *key) in (None, asked.name)
        return True

    def _not_there(self, key: tuple[str, int], asked: NamedSupervisor) -> JournalPage:
        """Tell what it means that a supervisor does not have an attempt, or has died: another one may have it."""
        self._supervisors.pop(key, None)
        self._assigned_at.pop(key, None)
        try:
            owner = read_launch_marker(self._storage, *key)
        except (OSError, ServiceError):
            return JournalPage(state=SupervisorState.UNREACHABLE, records=())
        is_gone = owner is None or owner == asked.name
        return JournalPage(state=SupervisorState.GONE if is_gone else SupervisorState.UNREACHABLE, records=())

    def _agent(self, node_id: str) -> "_Agent":
        agent = self._agents.get(node_id)
        if agent is None or not agent.look():
            agent = _Agent(_start_agent(node_id, self._work_dir, self._num_warm_ranks))
        return agent


class _Agent:
    """A node's agent, and whether its forkserver is ready; asked anew at every look, since either may die.

    Args:
        handle: of the actor.
    """

    def __init__(self, handle: Any) -> None:  # noqa: ANN401 - Ray's handles are untyped
        self._handle = handle
        self._answer = handle.keep_up.remote()
        self.is_ready = False

    def look(self) -> bool:
        """See whether the forkserver was ready since the last look; False if the agent is gone."""
        self.is_ready = bool(ray.wait([self._answer], timeout=0)[0])
        if self.is_ready:
            try:
                ray.get(self._answer)
            except ActorUnavailableError:
                self.is_ready = False  # being restarted
            except RayError:
                logger.exception("A node's forkserver did not start; it will be tried again")
                return False
            self._answer = self._handle.keep_up.remote()
        return True


def _start_agent(node_id: str, work_dir: str, num_warm_ranks: int) -> Any:  # noqa: ANN401
    return (
        ray.remote(NodeAgent)
        .options(
            name=node_agent_name(node_id),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        .remote(work_dir, num_warm_ranks)
    )
