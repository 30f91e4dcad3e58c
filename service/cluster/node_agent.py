"""The actor that owns a node's forkserver and rank actors; one per node, detached, restarted when it dies."""

import logging
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from service.cluster.fence import FENCES
from service.cluster.rank_directory import AbandonedDirectories, clear_work_dir
from service.cluster.rank_pool import LentRank, RankPool
from service.cluster.training_environment import training_environment

ENTRY = "service.training.rank:main"
PRELOAD = ("service.training.rank", "torch._dynamo")

# How soon the last lines of a rank whose actor was killed are in run storage.
LOOK_FOR_ABANDONED_S = 1.0

logger = logging.getLogger(__name__)


class NodeAgent:
    """Keeps the node's forkserver running and says how to reach it; lends rank actors.

    Args:
        work_dir: node-local directory for logs and staged checkpoints. What is in this node's part of it goes when an
            agent starts, but for logs that are not shipped yet.
        num_warm_ranks: how many rank actors wait for an attempt.

    Raises:
        RuntimeError: the forkserver ended before it was ready.
    """

    def __init__(self, work_dir: str, num_warm_ranks: int) -> None:
        node_id = ray.get_runtime_context().get_node_id()
        self._ranks = RankPool(node_id=node_id, size=num_warm_ranks)
        # One node's agents share the parent; several nodes may share one machine.
        self._fences = Path(work_dir) / FENCES
        self._work_dir = Path(work_dir) / node_id
        clear_work_dir(self._work_dir)
        self._start()
        threading.Thread(target=self._clear_abandoned_forever, name="abandoned", daemon=True).start()

    def forkserver(self) -> tuple[str, str]:
        """Return the forkserver's socket name and the node's work directory. One that died is replaced first."""
        if self._forkserver.poll() is not None:
            self._start()
        return self._socket_name, str(self._work_dir)

    def keep_up(self) -> None:
        """See that the forkserver runs and that rank actors wait; once a second is often enough."""
        self.forkserver()
        self._ranks.keep_up()

    def lend(self, count: int, supervisor: Any, job_id: str, attempt: int) -> list[LentRank]:  # noqa: ANN401
        """Lend rank actors to an attempt; what it does not give back ends with it, or with its supervisor."""
        return self._ranks.lend(count, supervisor, job_id, attempt)

    def take_back(self, ids: Sequence[str]) -> None:
        """Take back rank actors that have nothing left of an attempt."""
        self._ranks.take_back(ids)

    def _clear_abandoned_forever(self) -> None:
        abandoned = AbandonedDirectories()
        while True:
            # Also below the names that this machine had as another node, before it was restarted.
            for work_dir in self._work_dir.parent.glob("*"):
                try:
                    abandoned.clear(work_dir)
                except OSError as error:
                    logger.warning("What was abandoned in %s could not be cleared: %s", work_dir, error)
            time.sleep(LOOK_FOR_ABANDONED_S)

    def _start(self) -> None:
        self._work_dir.mkdir(parents=True, mode=0o700, exist_ok=True)
        self._socket_name = f"syncbn-{uuid.uuid4().hex}"
        command = [sys.executable, "-m", "service.cluster.forkserver", "--socket", self._socket_name]
        command += ["--parent-pid", str(os.getpid()), "--entry", ENTRY, "--preload", *PRELOAD]
        command += ["--fences", str(self._fences)]
        with (self._work_dir / "forkserver.log").open("ab") as log:
            self._forkserver = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=training_environment(os.environ),
            )
        assert self._forkserver.stdout is not None
        with self._forkserver.stdout as output:
            line = output.readline()
        if line != b"ready\n":
            if line:
                self._forkserver.kill()  # what it imported wrote to standard output
            status = self._forkserver.wait()
            said = (line + (self._work_dir / "forkserver.log").read_bytes()).decode(errors="replace")
            raise RuntimeError(f"The forkserver ended with status {status} before it was ready:\n{said}")
