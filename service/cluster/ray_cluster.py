"""The cluster as the scheduler sees it; implements ``service.domain.ports.Cluster`` on Ray Core."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from service.cluster.names import NAMESPACE, node_agent_name, parse_supervisor_name, supervisor_name
from service.cluster.node_agent import NodeAgent
from service.cluster.supervisor import Supervisor
from service.domain.errors import Unavailable
from service.domain.job import Reason
from service.domain.journal import JournalRecord
from service.domain.placement import Node, Resources
from service.domain.ports import JournalPage, Launch, SupervisorState

# How long a read may rest with a supervisor that has nothing new, and how long the scheduler looks for the answer.
REST_S = 5.0
LOOK_S = 0.02
# A supervisor that has not answered for this much longer than it may rest cannot be reached.
PATIENCE_S = 10.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Read:
    """A read that rests with a supervisor until there is something new."""

    after: int
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
    """

    def __init__(self, *, address: str, node_ip: str | None, work_dir: str) -> None:
        self._work_dir = work_dir
        self._reads: dict[tuple[str, int], _Read] = {}
        self._agents: dict[str, _Agent] = {}
        options: dict[str, Any] = {} if node_ip is None else {"_node_ip_address": node_ip}
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False, **options)

    def nodes(self) -> tuple[Node, ...]:
        """Return the nodes that can run a rank: alive, with CPUs, and with a forkserver that is ready.

        Each node gets an agent, and with it a forkserver, as soon as it is seen.
        """
        try:
            found = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
            self._agents = {node["NodeID"]: self._agent(node["NodeID"]) for node in found}
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
        try:
            supervisor: Any = (
                ray.remote(Supervisor)
                .options(
                    name=supervisor_name(launch.job_id, launch.attempt),
                    namespace=NAMESPACE,
                    lifetime="detached",
                    get_if_exists=True,
                    num_cpus=0,
                    max_restarts=0,
                    max_concurrency=1000,
                )
                .remote(launch)
            )
            supervisor.run.remote()
        except RayError as error:
            raise Unavailable(f"Ray did not take the supervisor: {error}") from error

    def read(self, job_id: str, attempt: int, *, after: int) -> JournalPage:
        """Return what an attempt reported since; never waits longer than a moment."""
        key = (job_id, attempt)
        read = self._reads.get(key)
        if read is None or read.after != after:
            try:
                supervisor = ray.get_actor(supervisor_name(job_id, attempt), namespace=NAMESPACE)
            except ValueError:
                return JournalPage(state=SupervisorState.GONE, records=())
            except RayError:
                return JournalPage(state=SupervisorState.UNREACHABLE, records=())
            read = self._reads[key] = _Read(after=after, reference=supervisor.read.remote(after, REST_S))
        done, _ = ray.wait([read.reference], timeout=LOOK_S)
        if not done:
            if read.age_s() <= REST_S + PATIENCE_S:
                return JournalPage(state=SupervisorState.ALIVE, records=())
            del self._reads[key]  # lost on the way, perhaps; the next look asks again
            return JournalPage(state=SupervisorState.UNREACHABLE, records=())
        del self._reads[key]
        try:
            records: Sequence[JournalRecord] = ray.get(read.reference)
        except (ActorUnavailableError, GetTimeoutError):
            return JournalPage(state=SupervisorState.UNREACHABLE, records=())
        except RayActorError:
            return JournalPage(state=SupervisorState.GONE, records=())
        except RayError:
            logger.exception("The supervisor of %s attempt %d could not answer", job_id, attempt)
            return JournalPage(state=SupervisorState.UNREACHABLE, records=())
        return JournalPage(state=SupervisorState.ALIVE, records=tuple(records))

    def stop(self, job_id: str, attempt: int, reason: Reason) -> None:
        """Ask an attempt for a checkpoint and an end; does not wait."""
        try:
            ray.get_actor(supervisor_name(job_id, attempt), namespace=NAMESPACE).stop.remote(reason)
        except (ValueError, RayError):
            return  # gone or unreachable: the next read says which

    def close(self, job_id: str, attempt: int) -> None:
        """Release what is left of an attempt whose end has been recorded: its supervisor and placement group."""
        self._reads.pop((job_id, attempt), None)
        try:
            ray.kill(ray.get_actor(supervisor_name(job_id, attempt), namespace=NAMESPACE))
        except (ValueError, RayError):
            return  # gone already

    def supervised(self) -> tuple[tuple[str, int], ...]:
        """Return job and attempt of every supervisor that has a name in the cluster."""
        try:
            names = [entry["name"] for entry in list_named_actors(all_namespaces=True)]
        except RayError as error:
            raise Unavailable(f"Ray does not answer: {error}") from error
        return tuple(found for found in map(parse_supervisor_name, names) if found is not None)

    def disconnect(self) -> None:
        """Leave the cluster; what is detached runs on."""
        ray.shutdown()

    def _agent(self, node_id: str) -> "_Agent":
        agent = self._agents.get(node_id)
        if agent is None or not agent.look():
            agent = _Agent(_start_agent(node_id, self._work_dir))
        return agent


class _Agent:
    """A node's agent, and whether its forkserver is ready; asked anew at every look, since either may die.

    Args:
        handle: of the actor.
    """

    def __init__(self, handle: Any) -> None:  # noqa: ANN401 - Ray's handles are untyped
        self._handle = handle
        self._answer = handle.forkserver.remote()
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
            self._answer = self._handle.forkserver.remote()
        return True


def _start_agent(node_id: str, work_dir: str) -> Any:  # noqa: ANN401
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
        .remote(work_dir)
    )
