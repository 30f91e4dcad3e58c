"""The actor that owns a node's forkserver; one per node, detached, restarted when it dies."""

import logging
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

import ray

from service.cluster.fence import FENCES
from service.cluster.rank_directory import clear_abandoned, clear_work_dir

ENTRY = "service.training.rank:main"
PRELOAD = ("service.training.rank", "torch._dynamo")

# A training process gets what it needs to run, and no secret of the service, of Ray, or of storage.
PASSED_NAMES = frozenset(
    {"HOME", "HOSTNAME", "LANG", "LANGUAGE", "LOGNAME", "PATH", "SHELL", "TMPDIR", "TZ", "USER", "VIRTUAL_ENV"}
)
PASSED_PREFIXES = ("LC_", "LD_", "PYTHON", "CUDA", "NVIDIA_", "NCCL_", "GLOO_", "TORCH", "OMP_", "MKL_", "GLIBC_")
# Comma-separated names of further variables to pass on, where the operator says so.
PASS_ENVIRONMENT = "SYNCBN_PASS_ENVIRONMENT"  # noqa: S105 - the name of a variable
# How soon the last lines of a rank whose actor was killed are in run storage.
LOOK_FOR_ABANDONED_S = 1.0

logger = logging.getLogger(__name__)


class NodeAgent:
    """Keeps the node's forkserver running and says how to reach it.

    Args:
        work_dir: node-local directory for logs and staged checkpoints. What is in this node's part of it goes when an
            agent starts, but for logs that are not shipped yet.

    Raises:
        RuntimeError: the forkserver ended before it was ready.
    """

    def __init__(self, work_dir: str) -> None:
        # One node's agents share the parent; several nodes may share one machine.
        self._fences = Path(work_dir) / FENCES
        self._work_dir = Path(work_dir) / ray.get_runtime_context().get_node_id()
        clear_work_dir(self._work_dir)
        self._start()
        threading.Thread(target=self._clear_abandoned_forever, name="abandoned", daemon=True).start()

    def forkserver(self) -> tuple[str, str]:
        """Return the forkserver's socket name and the node's work directory. One that died is replaced first."""
        if self._forkserver.poll() is not None:
            self._start()
        return self._socket_name, str(self._work_dir)

    def _clear_abandoned_forever(self) -> None:
        while True:
            # Also below the names that this machine had as another node, before it was restarted.
            for work_dir in self._work_dir.parent.glob("*"):
                try:
                    clear_abandoned(work_dir)
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


def training_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Choose the variables that a training process gets.

    Args:
        environment: of the node's agent.
    """
    also = {name.strip() for name in environment.get(PASS_ENVIRONMENT, "").split(",")}
    passed = {
        name: value
        for name, value in environment.items()
        if name in PASSED_NAMES or name in also or name.startswith(PASSED_PREFIXES)
    }
    # Threads of a preloaded BLAS would not survive the fork.
    return passed | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
