"""Requests that wait for the disk together: what arrives during one commit shares the next."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from service.domain.errors import Unavailable
from service.store.engine import Deadlock

MAX_GROUP = 256
"""Most requests of one transaction, so that none waits long for the others' statements."""

MAX_WAITING = 4096
"""Most requests that wait; while no commit gets through, more are refused at once."""

Request = TypeVar("Request")
Result = TypeVar("Result")


class GroupCommit(Generic[Request, Result]):
    """Carries requests out in groups, in a thread of its own, in the order in which they came.

    Args:
        commit: carries a group out in one transaction. Returns, once that is durable, what became of each request, in
            their order: its result, or the error that is its alone. Raises if the transaction left nothing.
        name: of the thread.
    """

    def __init__(self, commit: Callable[[Sequence[Request]], Sequence[Result | Exception]], *, name: str) -> None:
        self._commit = commit
        self._name = name
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Request, Future[Result]]] = deque()
        self._thread: threading.Thread | None = None
        self._closing = False

    def put(self, request: Request) -> "Future[Result]":
        """Return the future of a request; cancelled before its turn, it has no effect."""
        future: Future[Result] = Future()
        with self._changed:
            if len(self._waiting) >= MAX_WAITING:
                future.set_exception(Unavailable(f"{MAX_WAITING} requests wait for the database already. Try again."))
                return future
            self._waiting.append((request, future))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return future

    def close(self) -> None:
        """Carry out what waits, and end the thread; the next request starts another."""
        with self._changed:
            thread = self._thread
            self._closing = True
            self._changed.notify_all()
        if thread is not None:
            thread.join()
        with self._changed:
            self._closing = False

    def _run(self) -> None:
        while group := self._next_group():
            self._carry_out([(request, future) for request, future in group if future.set_running_or_notify_cancel()])

    def _next_group(self) -> list[tuple[Request, "Future[Result]"]]:
        """Wait for requests; none: the thread ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            group = [self._waiting.popleft() for _ in range(min(MAX_GROUP, len(self._waiting)))]
            if not group:
                self._thread = None
            return group

    def _carry_out(self, group: Sequence[tuple[Request, "Future[Result]"]]) -> None:
        if not group:
            return
        try:
            outcomes: Sequence[Result | Exception] = self._commit_again_if_undone([request for request, _ in group])
        except Unavailable as error:
            # Those that came while it was tried would be tried for as long, and have waited for it already.
            with self._changed:
                waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
            group = [*group, *(one for one in waiting if one[1].set_running_or_notify_cancel())]
            # One exception for each: whoever raises it adds a traceback of his own.
            outcomes = [type(error)(error.message) for _ in group]
        except Exception as error:
            if len(group) > 1:
                # One of them breaks the transaction: by itself, it breaks its own alone.
                for one in group:
                    self._carry_out([one])
                return
            outcomes = [error]
        for (_, future), outcome in zip(group, outcomes, strict=True):
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

    def _commit_again_if_undone(self, requests: Sequence[Request]) -> Sequence[Result | Exception]:
        try:
            return self._commit(requests)
        except Deadlock:
            # Whoever it waited for goes on now: no reason to refuse a whole group.
            return self._commit(requests)
