"""A node's rank actors: some wait for an attempt, others are lent to one; owned by the node's agent."""

import logging
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from service.cluster.rank_actor import RANK_OPTIONS, RankActor

# After a loan, how long the node is left to the attempt that starts before others are warmed up.
REFILL_AFTER_S = 1.0
# How long more of them than are to wait may wait for another attempt of their size.
SURPLUS_S = 10.0
WATCH_RETRY_S = 1.0
# Whatever a long life gathers in a process goes with it.
MAX_LOANS = 200

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LentRank:
    """A rank actor that an attempt may use until it gives it back.

    Attributes:
        id: by which it is given back.
        actor: its handle.
    """

    id: str
    actor: Any


@dataclass(kw_only=True)
class _Member:
    """One of the pool's actors.

    Attributes:
        rank: how borrowers know it.
        death: a reference that fails when it dies.
        num_loans: how often it was lent.
        idle_since: when it began to wait, by the monotonic clock.
    """

    rank: LentRank
    death: Any
    num_loans: int = 0
    idle_since: float = field(default_factory=time.monotonic)


class RankPool:
    """Safe to use from several threads.

    The one that came back last is lent first, so that under any traffic those that are too many are left over.

    Args:
        node_id: whose actors.
        size: how many are to wait.
    """

    def __init__(self, *, node_id: str, size: int) -> None:
        self._node_id = node_id
        self._size = size
        self._lock = threading.Lock()
        self._idle: list[_Member] = []
        self._lent: dict[tuple[str, int], dict[str, _Member]] = {}
        self._changed_at = time.monotonic() - REFILL_AFTER_S
        self._ending = ThreadPoolExecutor(max_workers=1, thread_name_prefix="end-loans")

    def lend(self, count: int, supervisor: Any, job_id: str, attempt: int) -> list[LentRank]:  # noqa: ANN401
        """Hand out actors that nobody else has, warm ones first.

        What has not been given back by then ends with the attempt, or with its supervisor.
        """
        key = (job_id, attempt)
        with self._lock:
            self._forget_dead()
            lent = [self._idle.pop() if self._idle else self._start() for _ in range(count)]
            for member in lent:
                member.num_loans += 1
            self._lent.setdefault(key, {}).update((member.rank.id, member) for member in lent)
            self._changed_at = time.monotonic()
        self._watch(supervisor, key)
        return [member.rank for member in lent]

    def take_back(self, ids: Sequence[str]) -> None:
        """Take actors back that have nothing left of an attempt."""
        with self._lock:
            for loan in self._lent.values():
                for member in [loan.pop(rank_id) for rank_id in ids if rank_id in loan]:
                    if member.num_loans < MAX_LOANS:
                        member.idle_since = time.monotonic()
                        self._idle.append(member)
                    else:
                        ray.kill(member.rank.actor)
            self._changed_at = time.monotonic()

    def keep_up(self) -> None:
        """Start one more, or end those that are too many; call it about once a second."""
        with self._lock:
            self._forget_dead()
            unchanged_s = time.monotonic() - self._changed_at
            if len(self._idle) < self._size and unchanged_s > REFILL_AFTER_S:
                self._idle.insert(0, self._start())  # not ready yet
            while len(self._idle) > self._size and time.monotonic() - self._idle[0].idle_since > SURPLUS_S:
                ray.kill(self._idle.pop(0).rank.actor)

    def _watch(self, supervisor: Any, key: tuple[str, int]) -> None:  # noqa: ANN401
        over = supervisor.until_over.remote(*key).future()
        # Ray calls back from the thread that would carry out what is asked of Ray there.
        over.add_done_callback(lambda answer: self._ending.submit(self._on_over, supervisor, key, answer.exception()))

    def _on_over(self, supervisor: Any, key: tuple[str, int], error: BaseException | None) -> None:  # noqa: ANN401
        if isinstance(error, ActorUnavailableError):
            # Unreachable is not dead.
            threading.Timer(WATCH_RETRY_S, self._watch, [supervisor, key]).start()
            return
        with self._lock:
            for member in self._lent.pop(key, {}).values():
                ray.kill(member.rank.actor)

    def _start(self) -> _Member:
        strategy = NodeAffinitySchedulingStrategy(self._node_id, soft=False)
        rank_class: Any = ray.remote(RankActor)
        actor = rank_class.options(**RANK_OPTIONS, num_cpus=0, scheduling_strategy=strategy).remote()
        return _Member(rank=LentRank(id=uuid.uuid4().hex, actor=actor), death=actor.until_dead.remote())

    def _forget_dead(self) -> None:
        for member in list(self._idle):
            if ray.wait([member.death], timeout=0)[0]:
                logger.warning("A rank actor died that waited for an attempt")
                self._idle.remove(member)
