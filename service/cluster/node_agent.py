"""The actor that owns a node's forkserver; one per node, detached, restarted when it dies."""

import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import ray

ENTRY = "service.training.rank:main"
PRELOAD = ("service.training.rank", "torch._dynamo")
# Neither the service's secrets nor Ray's reach a training process.
SECRET_PREFIXES = ("SYNCBN_", "RAY_")


class NodeAgent:
    """Starts the node's forkserver and says how to reach it.

    Args:
        work_dir: node-local directory for logs and staged checkpoints; its contents go when an agent starts.
    """

    def __init__(self, work_dir: str) -> None:
        # One node's agents share the parent; several nodes may share one machine.
        self._work_dir = Path(work_dir) / ray.get_runtime_context().get_node_id()
        shutil.rmtree(self._work_dir, ignore_errors=True)
        self._work_dir.mkdir(parents=True, mode=0o700)
        self._socket_name = f"syncbn-{uuid.uuid4().hex}"
        environment = {name: value for name, value in os.environ.items() if not name.startswith(SECRET_PREFIXES)}
        # Threads of a preloaded BLAS would not survive the fork.
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "service.cluster.forkserver", "--socket", self._socket_name]
        command += ["--parent-pid", str(os.getpid()), "--entry", ENTRY, "--preload", *PRELOAD]
        with (self._work_dir / "forkserver.log").open("ab") as log:
            self._forkserver = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, env=environment
            )
        assert self._forkserver.stdout is not None
        line = self._forkserver.stdout.readline()
        if line != b"ready\n":
            if line:
                self._forkserver.kill()  # what it imported wrote to standard output
            status = self._forkserver.wait()
            output = (line + (self._work_dir / "forkserver.log").read_bytes()).decode(errors="replace")
            raise RuntimeError(f"The forkserver ended with status {status} before it was ready:\n{output}")

    def forkserver(self) -> tuple[str, str]:
        """Return the forkserver's socket name and the node's work directory. A dead forkserver ends the agent."""
        if self._forkserver.poll() is not None:
            ray.actor.exit_actor()
        return self._socket_name, str(self._work_dir)
