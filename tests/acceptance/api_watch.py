"""Asks an API the whole time, as a dashboard would, and counts what it does not answer."""

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import httpx

INTERVAL_S = 0.05
# Of one answer. A busy machine may take its time; a service that hangs takes longer.
TIMEOUT_S = 5.0


class ApiWatch:
    """Asks while the context lasts, without a second try.

    Args:
        url: of the service.
        token: of the service.
        paths: what to GET, in turn.
    """

    def __init__(self, url: str, token: str, paths: Sequence[str]) -> None:
        self._client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=TIMEOUT_S)
        self._paths = paths
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self.num_answers = 0
        self.failures: list[str] = []
        self.longest_s = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()
        self._client.close()

    def _ask(self) -> None:
        while not self._is_over.wait(INTERVAL_S):
            for path in self._paths:
                try:
                    response = self._client.get(path)
                    response.raise_for_status()
                except httpx.HTTPError as error:
                    self.failures.append(f"{path}: {error!r}")
                else:
                    self.num_answers += 1
                    self.longest_s = max(self.longest_s, response.elapsed.total_seconds())
