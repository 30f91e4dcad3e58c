"""A node's rank actors: some wait for an attempt, others are lent to one; owned by the node's agent."""

import logging
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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


class RankPool:
    """Safe to use from several threads.

    Args:
        node_id: whose actors.
        size: how many are to wait.
    """

    def __init__(self, *, node_id: str, size: int) -> None:
        self._node_id = node_id
        self._size = size
        self._lock = threading.Lock()
        self._idle: list[LentRank] = []
        self._lent: dict[tuple[str, int], dict[str, LentRank]] = {}
        self._deaths: dict[str, Any] = {}  # by id: a reference that fails when the actor dies
        self._changed_at = time.monotonic() - REFILL_AFTER_S
        self._ending = ThreadPoolExecutor(max_workers=1, thread_name_prefix="end-loans")

    def lend(self, count: int, supervisor: Any, job_id: str, attempt: int) -> list[LentRank]:  # noqa: ANN401
        """Hand out actors that nobody else has, warm ones first.

        What has not been given back by then ends with the attempt, or with its supervisor.
        """
        key = (job_id, attempt)
        with self._lock:
            self._forget_dead()
            lent = [self._idle.pop(0) if self._idle else self._start() for _ in range(count)]
            self._lent.setdefault(key, {}).update((rank.id, rank) for rank in lent)
            self._changed_at = time.monotonic()
        self._watch(supervisor, key)
        return lent

    def take_back(self, ids: Sequence[str]) -> None:
        """Take actors back that have nothing left of an attempt."""
        with self._lock:
            for loan in self._lent.values():
                self._idle += [loan.pop(rank_id) for rank_id in ids if rank_id in loan]
            self._changed_at = time.monotonic()

    def keep_up(self) -> None:
        """Start one more, or end those that are too many; call it about once a second."""
        with self._lock:
            self._forget_dead()
            unchanged_s = time.monotonic() - self._changed_at
            if len(self._idle) < self._size and unchanged_s > REFILL_AFTER_S:
                self._idle.append(self._start())
            elif unchanged_s > SURPLUS_S:
                for rank in self._idle[self._size :]:
                    self._end(rank)
                del self._idle[self._size :]

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
            for rank in self._lent.pop(key, {}).values():
                self._end(rank)

    def _start(self) -> LentRank:
        strategy = NodeAffinitySchedulingStrategy(self._node_id, soft=False)
        rank_class: Any = ray.remote(RankActor)
        actor = rank_class.options(**RANK_OPTIONS, num_cpus=0, scheduling_strategy=strategy).remote()
        rank = LentRank(id=uuid.uuid4().hex, actor=actor)
        self._deaths[rank.id] = actor.until_dead.remote()
        return rank

    def _end(self, rank: LentRank) -> None:
        self._deaths.pop(rank.id, None)
        ray.kill(rank.actor)

    def _forget_dead(self) -> None:
        for rank in list(self._idle):
            if ray.wait([self._deaths[rank.id]], timeout=0)[0]:
                logger.warning("A rank actor died that waited for an attempt")
                self._idle.remove(rank)
                del self._deaths[rank.id]
