"""The service's processes started apart, as on several machines: head, scheduler and API on one, workers on others."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from service.cluster.head import OBJECT_STORE_BYTES, head_command, ray_environment
from tests.acceptance.embedded_service import MARKER, ServiceUnderTest, marked_processes, wait_until
from tests.netns import Host, Network, network

READY_TIMEOUT_S = 90.0
MEMORY_BYTES = 4 << 30
TOKEN = "test-token"
# Ray takes over a minute to call a node dead, and a node as long to see that it has lost its head.
QUICK_VERDICTS = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "12",
}


class MultiHostService(ServiceUnderTest):
    """One head, and hosts that run ranks.

    Args:
        joined: the hosts; the first one is the head's.
        data_dir: seen by all hosts: the database and run storage.
        node_dir: another one on each host.
        ray_dir: likewise.
        num_cpus: of each worker host.
        environment: added to that of every process.
    """

    def __init__(
        self,
        joined: Network,
        *,
        data_dir: Path,
        node_dir: Path,
        ray_dir: Path,
        num_cpus: int,
        environment: Mapping[str, str],
    ) -> None:
        super().__init__(data_dir, uuid.uuid4().hex)
        self.network = joined
        self.head, *self.workers = joined.hosts
        self._num_cpus = num_cpus
        self._ray_dir = ray_dir
        self._processes: dict[tuple[str, str], subprocess.Popen[bytes]] = {}
        (data_dir / "logs").mkdir(parents=True)
        token_path = data_dir / "ray-token"
        token_path.write_text(uuid.uuid4().hex)
        token_path.chmod(0o600)
        self._environment = {
            **os.environ,
            **ray_environment(token_path),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # 0 keeps the embedded head on loopback, and refuses other nodes
            "PYTHONPATH": os.pathsep.join(sys.path),
            # Hosts share the kernel here, and must not train through its memory.
            "SYNCBN_SHARED_MEMORY": "0",
            MARKER: self.marker,
            "SYNCBN_PASS_ENVIRONMENT": f"{MARKER},SYNCBN_SHARED_MEMORY",
            "SYNCBN_DATA_DIR": str(data_dir),
            "SYNCBN_NODE_DIR": str(node_dir),
            "SYNCBN_NODE_IP": self.head.address,
            "SYNCBN_TOKEN": TOKEN,
            **environment,
        }

    def start(self) -> None:
        """Start everything, and wait until every worker host can run a rank."""
        head = head_command(
            temp_dir=self._ray_dir, num_cpus=0, num_gpus=0, memory_bytes=MEMORY_BYTES, node_ip=self.head.address
        )
        self._start(self.head, "ray", head)
        address_file = self.head.own_dirs[self._ray_dir] / "ray_current_cluster"
        wait_until(lambda: address_file.exists() and bool(address_file.read_text()), READY_TIMEOUT_S, self.all_logs)
        self.ray_address = address_file.read_text().strip()
        for host in self.workers:
            self.start_worker(host)
        self._environment["SYNCBN_RAY_ADDRESS"] = self.ray_address
        self._start(self.head, "migrate", [sys.executable, "-m", "service", "migrate"]).wait(READY_TIMEOUT_S)
        # Made here, where the tests are, and inherited: the API answers them, but runs on its host.
        with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
            api = [sys.executable, "-m", "service", "api", "--listen-fd", str(listener.fileno())]
            self._start(self.head, "api", api, pass_fds=(listener.fileno(),))
            self.connect(f"http://127.0.0.1:{listener.getsockname()[1]}", TOKEN)
        self._start(self.head, "scheduler", [sys.executable, "-m", "service", "scheduler"])
        wait_until(lambda: len(self.nodes()) == len(self.workers), READY_TIMEOUT_S, self.all_logs)

    def start_worker(self, host: Host) -> None:
        """Join a host to the cluster."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={self.ray_address}"]
        command += [f"--node-ip-address={host.address}", f"--num-cpus={self._num_cpus}", "--num-gpus=0"]
        command += [f"--memory={MEMORY_BYTES}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        command += ["--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"]
        self._start(host, "ray", command)

    def worker_has_ended(self, host: Host) -> bool:
        """Return whether Ray has ended on a host, as it does when its head has called it dead."""
        return self._processes[host.namespace, "ray"].poll() is not None

    def nodes(self) -> dict[str, str]:
        """Return the ids of the nodes that can run a rank, by address."""
        return {node["address"]: node["id"] for node in self.get("/v1/cluster")["nodes"]}

    def host_of(self, pid: int) -> Host:
        """Return the host on which a process runs."""
        return next(host for host in self.network.hosts if pid in host.pids())

    def stop(self) -> None:
        """End every process, wherever it is."""
        if hasattr(self, "http"):
            self.http.close()
        for process in marked_processes(self.marker):
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
        for started in self._processes.values():
            started.wait(READY_TIMEOUT_S)
        wait_until(lambda: not self.processes(), 10, lambda: f"left behind: {self.processes()}")

    def _start(
        self, host: Host, name: str, command: list[str], *, pass_fds: tuple[int, ...] = ()
    ) -> subprocess.Popen[bytes]:
        log = self.data_dir / "logs" / f"{name}-{host.address}.log"
        with log.open("ab") as output:
            process = host.start(command, environment=self._environment, output=output, pass_fds=pass_fds)
        self._processes[host.namespace, name] = process
        return process


@contextmanager
def multihost_service(
    directory: Path, *, num_workers: int, num_cpus: int, environment: Mapping[str, str]
) -> Iterator[MultiHostService]:
    """Run a service on hosts of its own, and leave nothing of it.

    Args:
        directory: for its files.
        num_workers: hosts that run ranks.
        num_cpus: of each of them.
        environment: added to that of every process.
    """
    node_dir = directory / "node"
    ray_dir = Path(tempfile.mkdtemp(prefix="syncbn-"))  # short: Unix sockets lie below it
    try:
        with network(1 + num_workers, directory, own=[node_dir, ray_dir]) as joined:
            service = MultiHostService(
                joined,
                data_dir=directory / "data",
                node_dir=node_dir,
                ray_dir=ray_dir,
                num_cpus=num_cpus,
                environment=environment,
            )
            try:
                service.start()
                yield service
            finally:
                service.stop()
    finally:
        shutil.rmtree(ray_dir)
