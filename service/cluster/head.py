"""The Ray head of the embedded service: on loopback, behind a token, beside any other Ray of the machine."""

import sys
from pathlib import Path

# The object store carries only small messages here; data and checkpoints never pass through Ray.
OBJECT_STORE_BYTES = 100_000_000


def head_command(
    *, temp_dir: Path, num_cpus: int, num_gpus: int, memory_bytes: int, node_ip: str = "127.0.0.1"
) -> list[str]:
    """Return the command that starts the head and stays in the foreground.

    Args:
        temp_dir: for its session; short, since Unix sockets lie below it.
        num_cpus: logical CPUs to declare.
        num_gpus: GPUs to declare.
        memory_bytes: memory to declare.
        node_ip: address to bind to.
    """
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port=0"]
    command += [f"--node-ip-address={node_ip}", f"--temp-dir={temp_dir}", f"--num-cpus={num_cpus}"]
    command += [f"--memory={memory_bytes}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
    # Ports of the system's choice, so that two services never meet.
    command += ["--min-worker-port=0", "--max-worker-port=0"]
    command += [f"--num-gpus={num_gpus}", "--include-dashboard=false", "--disable-usage-stats"]
    return command


def ray_environment(token_path: Path) -> dict[str, str]:
    """Return what head and drivers need in their environment.

    Args:
        token_path: file with the cluster's token, readable by its owner alone.
    """
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        # Without it a head on 127.0.0.1 resolves its own host name and listens on every interface.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Ray's memory monitor would end its own workers, the supervisors among them, and it marks them for the
        # kernel to end first. Here it is the training processes that are marked.
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_worker_oom_score_adjustment": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def head_address(temp_dir: Path) -> str | None:
    """Return ``host:port`` of the head that runs below ``temp_dir``; None until it does."""
    try:
        return (temp_dir / "ray_current_cluster").read_text().strip() or None
    except FileNotFoundError:
        return None
