"""The way of a rank's reports to its supervisor."""

import threading
from collections.abc import Sequence
from typing import Any

import ray

from service.domain.journal import CheckpointWritten
from service.domain.ports import Launch
from service.domain.rank_protocol import FromRank

# How long the last reports may take to arrive.
REPORT_TIMEOUT_S = 10.0


class ReportSender:
    """Sends in order; safe to use from several threads.

    Args:
        supervisor: handle of the actor that takes the reports.
        launch: the attempt.
        rank: whose they are.
    """

    def __init__(self, supervisor: Any, launch: Launch, rank: int) -> None:  # noqa: ANN401 - Ray's handles are untyped
        self._supervisor = supervisor
        self._launch = launch
        self._rank = rank
        self._under_way: list[Any] = []
        self._sending = threading.Lock()

    def send(self, reports: Sequence[FromRank | CheckpointWritten]) -> None:
        """Send reports, without waiting for them to arrive."""
        if not reports:
            return
        with self._sending:  # checkpoints are reported from the thread that uploads them
            if self._under_way:
                self._under_way = ray.wait(self._under_way, num_returns=len(self._under_way), timeout=0)[1]
            self._under_way.append(
                self._supervisor.report.remote(self._launch.job_id, self._launch.attempt, self._rank, list(reports))
            )

    def arrive(self) -> None:
        """Wait until everything has arrived.

        Raises:
            RayError: something did not. The rank's end must not pass for a clean one then.
        """
        ray.get(self._under_way, timeout=REPORT_TIMEOUT_S)
