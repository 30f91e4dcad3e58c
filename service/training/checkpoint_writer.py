"""Checkpoints written beside the training: a step waits for a copy in memory, not for the disk."""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from pathlib import Path
from types import TracebackType

from service.domain.rank_protocol import RankTask, Staged
from service.training.checkpoints import Checkpoint, write_checkpoint
from service.training.errors import CheckpointFailed
from service.training.host_memory import HostMemory

# Beside training on the same cores, writing is what may wait.
NICENESS = 10


class CheckpointWriter:
    """Copies checkpoints into host memory and writes them from a thread of its own, one at a time, in order.

    One thread uses it. What the writing thread did is handed to that one by ``outcomes``::

        with CheckpointWriter(task) as writer:
            for step in ...:
                ...
                deliver(writer.outcomes(wait=False))
                if due:
                    writer.save(trainer.capture(), metrics)
            deliver(writer.outcomes(wait=True))

    Leaving the ``with`` block waits for what is being written, and hands out nothing.

    Args:
        task: whose checkpoints, and where they are staged.
    """

    def __init__(self, task: RankTask) -> None:
        self._task = task
        self._thread = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="checkpoint", initializer=_be_nice_to_training
        )
        self._memory = HostMemory()
        self._written: deque[Future[Staged]] = deque()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown()

    def save(self, checkpoint: Checkpoint, metrics: Mapping[str, float], *, extra_dir: Path | None = None) -> float:
        """Copy a checkpoint, and have the copy written; first waits for the checkpoint before it, if there is one.

        A failure of that one does not hold this one up: it is one of the ``outcomes``.

        Args:
            checkpoint: its tensors may be the live ones.
            metrics: finite values to keep with it.
            extra_dir: see ``write_checkpoint``.

        Returns:
            How long the caller was held up, in seconds: waiting and copying.

        Raises:
            CheckpointFailed: it holds something that could not be read back.
        """
        started = time.perf_counter()
        if self._written:
            _await(self._written[-1])
        copy = self._memory.copy(checkpoint)
        self._written.append(self._thread.submit(self._write, copy, dict(metrics), extra_dir))
        return time.perf_counter() - started

    def wait_until_free(self, timeout_s: float) -> bool:
        """Wait until nothing is being written, so that ``save`` need not; False if it takes longer."""
        return not self._written or not wait_for_futures([self._written[-1]], timeout_s).not_done

    def outcomes(self, *, wait: bool) -> list[Staged | CheckpointFailed]:
        """Return what became of the checkpoints since the last call, oldest first.

        Args:
            wait: for those that are still being written, too.
        """
        found: list[Staged | CheckpointFailed] = []
        while self._written and (wait or self._written[0].done()):
            try:
                found.append(self._written.popleft().result())
            except CheckpointFailed as error:
                found.append(error)
        return found

    def _write(self, checkpoint: Checkpoint, metrics: dict[str, float], extra_dir: Path | None) -> Staged:
        directory = write_checkpoint(checkpoint, self._task, metrics, extra_dir=extra_dir)
        return Staged(step=checkpoint.step, directory=str(directory), metrics=metrics)


def _await(future: Future[Staged]) -> None:
    """Wait for its end, whatever that is."""
    future.exception()


def _be_nice_to_training() -> None:
    if sys.platform == "linux":  # where threads have priorities of their own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
