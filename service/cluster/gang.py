"""The gang of an attempt: the reservation of its resources, and the rank actors that use them."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from service.cluster.names import NAMESPACE, node_agent_name
from service.cluster.rank_actor import RANK_OPTIONS, RankActor, RankPlace
from service.cluster.rank_pool import LentRank
from service.domain.job import Checkpoint
from service.domain.journal import Placed
from service.domain.ports import Launch

AGENT_RETRY_S = 0.2
# How long an agent may take to say that it has its actors back.
RETURN_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class _Rank:
    """A rank's actor, and the agent that lent it; None where it is the gang's own."""

    actor: Any
    loan: LentRank | None = None
    agent: Any = None


class Gang:
    """Placed all together or not at all.

    Ranks that need no GPU are carried out by actors that wait, warm, on their nodes; these hold no resources of Ray,
    the placement group does. A GPU is known by number only to an actor that Ray gave it to, so there the actors are
    started for the attempt.

    Args:
        launch: the attempt.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._group: PlacementGroup | None = None
        self._ranks: tuple[_Rank, ...] = ()

    async def start(self, checkpoint: Checkpoint | None, *, timeout_s: float) -> Placed:
        """Start every rank's training process.

        Args:
            checkpoint: to continue from.
            timeout_s: how long the resources may take to become free.

        Raises:
            TimeoutError: they did not.
            UserCodeRefused: what the job brings cannot be used.
            RayError: an actor or a node is gone.
            ServiceError: a node does not see the service's run storage, or refuses the process.
            OSError: what the job brings could not be fetched this time.
        """
        this = ray.get_runtime_context().current_actor
        if self._launch.spec.resources.gpus_per_rank:
            self._ranks = self._start_own(await self._reserve(timeout_s))
        else:
            _, self._ranks = await asyncio.gather(self._reserve(timeout_s), self._borrow(this, timeout_s))
        places: list[RankPlace] = await self._of_each(
            lambda actor, rank: actor.prepare.remote(self._launch, rank, this)
        )
        first = places[0]
        pids: list[int] = await self._of_each(
            lambda actor, _: actor.start.remote(first.address, first.rendezvous_port, checkpoint)
        )
        return Placed(node_ids=tuple(place.node_id for place in places), pids=tuple(pids))

    def run(self) -> tuple[Awaitable[Any], ...]:
        """Return, for each rank, what says how its process ended, once it has."""
        return tuple(rank.actor.run.remote() for rank in self._ranks)

    def stop(self) -> None:
        """Ask every process for a checkpoint and an end."""
        for rank in self._ranks:
            rank.actor.stop.remote(self._launch.job_id, self._launch.attempt)

    def kill(self) -> None:
        """Kill every process; the runs of their actors return once the processes are gone."""
        for rank in range(len(self._ranks)):
            self.kill_rank(rank)

    def kill_rank(self, rank: int) -> Awaitable[None]:
        """Kill one rank's process; what is returned fails if its actor is dead or cannot be reached."""
        called: Awaitable[None] = self._ranks[rank].actor.kill.remote(self._launch.job_id, self._launch.attempt)
        return called

    async def release(self, clear: Set[int]) -> None:
        """Give resources and actors back.

        Args:
            clear: ranks whose actors have nothing left of the attempt; the others end with whatever they hold.
        """
        returned: dict[Any, list[str]] = {}
        for number, rank in enumerate(self._ranks):
            if number in clear and rank.loan is not None:
                returned.setdefault(rank.agent, []).append(rank.loan.id)
            else:
                ray.kill(rank.actor)
        if self._group is not None:
            remove_placement_group(self._group)
        with suppress(RayError, TimeoutError):  # an agent that is gone has taken its actors along
            answers = [_await(agent.take_back.remote(ids)) for agent, ids in returned.items()]
            await asyncio.wait_for(asyncio.gather(*answers), RETURN_TIMEOUT_S)

    async def _reserve(self, timeout_s: float) -> PlacementGroup:
        node_ids = self._launch.node_ids
        self._group = placement_group(
            [self._bundle] * len(node_ids), bundle_label_selector=[{"ray.io/node-id": node_id} for node_id in node_ids]
        )
        # Its ``ready()`` would start a process only to say so.
        if not await asyncio.to_thread(self._group.wait, timeout_s):
            raise TimeoutError
        return self._group

    @property
    def _bundle(self) -> Mapping[str, float]:
        resources = self._launch.spec.resources
        bundle: dict[str, float] = {"CPU": resources.cpus_per_rank}
        if resources.gpus_per_rank:
            bundle["GPU"] = resources.gpus_per_rank
        if resources.memory_bytes_per_rank:
            bundle["memory"] = resources.memory_bytes_per_rank
        return bundle

    def _start_own(self, group: PlacementGroup) -> tuple[_Rank, ...]:
        bundle = self._bundle
        start: Any = ray.remote(RankActor).options(
            **RANK_OPTIONS, num_cpus=bundle["CPU"], num_gpus=bundle.get("GPU", 0), memory=bundle.get("memory")
        )
        strategies = [
            PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
            for rank in range(len(self._launch.node_ids))
        ]
        return tuple(_Rank(actor=start.options(scheduling_strategy=strategy).remote()) for strategy in strategies)

    async def _borrow(self, this: Any, timeout_s: float) -> tuple[_Rank, ...]:  # noqa: ANN401 - Ray's handles are untyped
        node_ids = self._launch.node_ids
        distinct = list(dict.fromkeys(node_ids))
        lent = await asyncio.gather(
            *(self._borrow_from(node_id, node_ids.count(node_id), this, timeout_s) for node_id in distinct)
        )
        left = {node_id: iter(ranks) for node_id, ranks in zip(distinct, lent, strict=True)}
        return tuple(next(left[node_id]) for node_id in node_ids)

    async def _borrow_from(self, node_id: str, count: int, this: Any, timeout_s: float) -> list[_Rank]:  # noqa: ANN401
        """Borrow actors of a node; waits for an agent that is being restarted."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                agent: Any = ray.get_actor(node_agent_name(node_id), namespace=NAMESPACE)
                lent: list[LentRank] = await agent.lend.remote(count, this, self._launch.job_id, self._launch.attempt)
            except (ValueError, RayActorError):
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(AGENT_RETRY_S)
            else:
                return [_Rank(actor=loan.actor, loan=loan, agent=agent) for loan in lent]

    async def _of_each(self, call: Callable[[Any, int], Any]) -> list[Any]:
        return await asyncio.gather(*(_await(call(rank.actor, number)) for number, rank in enumerate(self._ranks)))


async def _await(reference: Any) -> Any:  # noqa: ANN401 - Ray's references are untyped
    return await reference
