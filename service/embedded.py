"""``syncbn serve``: the whole service on one machine, as supervised children that nothing outlives."""

import fcntl
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from datetime import datetime
from pathlib import Path
from tempfile import mkdtemp
from types import FrameType
from typing import TextIO

import httpx
import psutil

from service.child import Child
from service.cluster.fence import FENCES
from service.cluster.head import head_address, head_command, ray_environment
from service.cluster.head_guard import guard_command
from service.cluster.rank_directory import clear_work_dir
from service.domain.errors import Unavailable
from service.linux import become_subreaper
from service.settings import Settings
from service.wiring import last_observed, migrate_database

SERVICE_FILE = "service.json"
TICK_S = 0.1
READY_TIMEOUT_S = 60.0
# Of one question whether the API is ready; a busy machine may take its time to answer.
ANSWER_TIMEOUT_S = 2.0
HEAD_STOP_S = 5.0
API_STOP_S = 8.0

logger = logging.getLogger(__name__)


class EmbeddedService:
    """The processes of one machine.

    Args:
        settings: with the data directory.
        host: address of the API.
        port: of the API; 0 for a free one.
        num_cpus: logical CPUs that jobs may share; may be more than there are cores.
        num_gpus: GPUs; None: those found.

    Raises:
        Unavailable: another service uses the data directory, or the port is taken.
    """

    def __init__(self, settings: Settings, *, host: str, port: int, num_cpus: int, num_gpus: int | None) -> None:
        data_dir = settings.data_dir.absolute()
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = _lock(data_dir / "lock")
        (data_dir / SERVICE_FILE).unlink(missing_ok=True)  # of a service that was killed
        (data_dir / "logs").mkdir(exist_ok=True)
        self._temp_dir = _session_dir(data_dir)
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = socket.create_server((host, port), family=family, backlog=1024)
        except OSError as error:
            raise Unavailable(f"Cannot listen on {host}:{port}: {error}. Choose another --port.") from error
        name = f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{self._listener.getsockname()[1]}"
        self._data_dir = data_dir
        token = settings.token or _read_or_make_token(data_dir / "token")
        ray_token_path = data_dir / "ray-token"
        _write_secret(ray_token_path, secrets.token_hex(32))
        memory_bytes = psutil.virtual_memory().total
        num_gpus = _count_gpus() if num_gpus is None else num_gpus
        for work_dir in (data_dir / "node").glob("*"):
            if work_dir.name != FENCES:
                clear_work_dir(work_dir)
        self._settings = settings.model_copy(update={"data_dir": data_dir, "token": token})
        self._environment = ray_environment(ray_token_path) | {
            "SYNCBN_DATA_DIR": str(data_dir),
            "SYNCBN_DATABASE_URL": self._settings.database,
            "SYNCBN_STORAGE_URL": self._settings.storage,
            "SYNCBN_NODE_IP": "127.0.0.1",
            "SYNCBN_MAX_CPUS": str(num_cpus),
            "SYNCBN_MAX_GPUS": str(num_gpus),
            "SYNCBN_MAX_MEMORY_BYTES": str(memory_bytes),
        }
        self._head_command = head_command(
            temp_dir=self._temp_dir, num_cpus=num_cpus, num_gpus=num_gpus, memory_bytes=memory_bytes
        )
        self._head = Child("ray", data_dir / "logs" / "ray.log")
        self._scheduler = Child("scheduler", data_dir / "logs" / "scheduler.log")
        self._api = Child("api", data_dir / "logs" / "api.log")
        self._stop_asked = 0
        self._rid_by: float | None = None

    def run(self) -> int:
        """Start everything, restart what ends, and stop in order when asked to.

        Returns:
            The exit status.
        """
        become_subreaper()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask_to_stop)
        migrate_database(self._settings)
        announced = False
        # A snapshot of an earlier run says nothing about this one; it is known by itself, since clocks jump.
        earlier = last_observed(self._settings)
        ready_by = time.monotonic() + READY_TIMEOUT_S
        try:
            while not self._stop_asked:
                self._keep_running()
                if not announced:
                    announced = self._announce(earlier, ready_by)
                time.sleep(TICK_S)
        finally:
            self._stop()
        sys.stdout.write("Stopped.\n")
        return 0

    def _ask_to_stop(self, _signal_number: int, _frame: FrameType | None) -> None:
        self._stop_asked += 1

    def _keep_running(self) -> None:
        self._reap()
        now = time.monotonic()
        if self._head.pid is None and now >= self._head.start_not_before and self._is_rid_of_cluster():
            (self._temp_dir / "ray_current_cluster").unlink(missing_ok=True)
            self._head.start(guard_command(self._head_command), self._environment)
        if self._api.pid is None and now >= self._api.start_not_before:
            descriptor = self._listener.fileno()
            command = [sys.executable, "-m", "service", "api", "--listen-fd", str(descriptor)]
            token = {"SYNCBN_TOKEN": self._settings.token or ""}
            self._api.start(command, self._environment | token, pass_fds=[descriptor])
        address = head_address(self._temp_dir)
        if self._scheduler.pid is None and address is not None and now >= self._scheduler.start_not_before:
            command = [sys.executable, "-m", "service", "scheduler"]
            self._scheduler.start(command, self._environment | {"SYNCBN_RAY_ADDRESS": address})

    def _is_rid_of_cluster(self) -> bool:
        """Kill what is left of a cluster that lost its head; True once nothing is, or nothing can be done about it.

        A scheduler of the old cluster cannot join the new one, and a training process must not train on beside the next
        attempt. Every process but the API's is one of these, or a descendant of one, and becomes this one's.
        """
        rest = [process for process in psutil.Process().children(recursive=True) if process.pid != self._api.pid]
        for process in rest:
            _kill(process)
        now = time.monotonic()
        if rest and self._rid_by is None:
            self._rid_by = now + HEAD_STOP_S
        if rest and self._rid_by is not None and now < self._rid_by:
            return False
        if rest:
            logger.error("Left of the old cluster, since even SIGKILL does not end them: %s", rest)
        self._rid_by = None
        return True

    def _announce(self, earlier: datetime | None, ready_by: float) -> bool:
        """Say that the service answers and has a cluster, once that is so."""
        try:
            headers = {"Authorization": f"Bearer {self._settings.token}"}
            snapshot = httpx.get(f"{self.url}/v1/cluster", headers=headers, timeout=ANSWER_TIMEOUT_S)
            cluster = snapshot.raise_for_status().json()
            ready = bool(cluster["nodes"]) and datetime.fromisoformat(cluster["observed_at"]) != earlier
        except (httpx.HTTPError, ValueError):
            ready = False
        if ready:
            _write_atomically(self._data_dir / SERVICE_FILE, json.dumps({"url": self.url, "pid": os.getpid()}))
            sys.stdout.write(f"Serving on {self.url}\nData and token in {self._data_dir}. Ctrl-C stops.\n")
            sys.stdout.flush()
        elif time.monotonic() > ready_by:
            raise Unavailable(f"The service is not ready after {READY_TIMEOUT_S:g} s; see {self._data_dir / 'logs'}.")
        return ready

    def _stop(self) -> None:
        """Stop the scheduler, then the API, then Ray; whatever is left after its time is killed."""
        (self._data_dir / SERVICE_FILE).unlink(missing_ok=True)
        settings = self._settings
        self._stop_child(self._scheduler, settings.stop_grace_s + 2 * settings.lease_ttl_s)
        self._stop_child(self._api, API_STOP_S)
        self._stop_child(self._head, HEAD_STOP_S)
        deadline = time.monotonic() + HEAD_STOP_S
        last_deadline = deadline + HEAD_STOP_S
        # What Ray's processes leave behind becomes ours, since this process is their reaper.
        while (rest := psutil.Process().children(recursive=True)) and time.monotonic() < last_deadline:
            for process in rest:
                if time.monotonic() > deadline:
                    _kill(process)
            self._reap()
            time.sleep(TICK_S / 2)
        if rest:
            logger.error("Left behind, since even SIGKILL does not end them: %s", rest)
        shutil.rmtree(self._temp_dir, ignore_errors=True)
        self._listener.close()
        self._lock.close()

    def _stop_child(self, child: Child, grace_s: float) -> None:
        child.is_stopping = True
        child.send(signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while child.pid is not None:
            self._reap()
            if time.monotonic() > deadline or self._stop_asked > 1:
                child.send(signal.SIGKILL)
            time.sleep(TICK_S / 2)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for child in (self._head, self._scheduler, self._api):
                if child.pid == pid:
                    child.send(signal.SIGKILL)  # what is left of its group
                    child.ended(os.waitstatus_to_exitcode(status))


def serve(settings: Settings, *, host: str, port: int, num_cpus: int, num_gpus: int | None) -> int:
    """Run the whole service on this machine until SIGINT or SIGTERM.

    Args:
        settings: with the data directory.
        host: address of the API.
        port: of the API; 0 for a free one.
        num_cpus: logical CPUs that jobs may share.
        num_gpus: GPUs; None: those found.

    Returns:
        The exit status.

    Raises:
        Unavailable: another service uses the data directory, the port is taken, or a part does not start.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    os.umask(0o077)
    return EmbeddedService(settings, host=host, port=port, num_cpus=num_cpus, num_gpus=num_gpus).run()


def _lock(path: Path) -> TextIO:
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise Unavailable(
            f"Another service uses {path.parent}. Stop it, or choose another directory with --data-dir."
        ) from None
    return file


def _session_dir(data_dir: Path) -> Path:
    """Make a short directory for Ray's session, and remove the one of a service that was killed."""
    record = data_dir / "ray-session"
    if record.exists():
        shutil.rmtree(record.read_text(), ignore_errors=True)
    directory = mkdtemp(prefix="syncbn-")
    _write_atomically(record, directory)
    return Path(directory)


def _count_gpus() -> int:
    """Count the NVIDIA GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip()])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def _read_or_make_token(path: Path) -> str:
    if not path.exists():
        _write_secret(path, secrets.token_hex(32))  # nothing that a command line could take for an option
    return path.read_text().strip()


def _write_secret(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    temporary.replace(path)


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text)
    temporary.replace(path)


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return
