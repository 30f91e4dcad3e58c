"""Train a real model on four ranks through the service, and watch: `make demo`.

Starts `syncbn serve` with a data directory of its own, submits `examples/digits.yaml` over REST, follows the job to
its end, and stops the service. What the job left behind stays in the data directory. Ctrl-C stops everything.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from service.cli.job_file import load_job
from service.cli.output import is_lively
from service.cli.watch import watch_job
from service.client.client import Client
from service.client.discovery import find_service
from service.domain.job import JobStatus
from service.linux import die_with_parent

HERE = Path(__file__).parent
READY_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 40.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path(".demo"), help="where the service keeps its data")
    parser.add_argument("--job", type=Path, default=HERE / "digits.yaml", help="what to train")
    arguments = parser.parse_args()
    data_dir = arguments.data_dir.absolute()
    if not prepare(data_dir):
        print(f"{data_dir} holds something else than an earlier demo; name another --data-dir.", file=sys.stderr)
        return 2
    log_path = data_dir / "serve.log"
    print(f"Starting the service (log: {log_path}) …", flush=True)
    with log_path.open("wb") as log:
        serve = subprocess.Popen(
            [sys.executable, "-m", "service.cli.main", "serve", "--data-dir", str(data_dir)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # Ctrl-C is this script's to handle, and the service does not outlive it.
            start_new_session=True,
            preexec_fn=partial(die_with_parent, os.getpid(), signal.SIGTERM),
        )
    try:
        return follow_job(serve, data_dir, arguments.job, log_path)
    except KeyboardInterrupt:
        print("\nInterrupted.", flush=True)
        return 130
    finally:
        # A second Ctrl-C must not leave the service behind half-stopped.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("Stopping the service …", flush=True)
        serve.send_signal(signal.SIGTERM)
        serve.wait(STOP_TIMEOUT_S)


def prepare(data_dir: Path) -> bool:
    """Make an empty data directory in place of an earlier demo's; False if it holds anything else."""
    marker = data_dir / "this-is-a-demo"
    if data_dir.exists() and any(data_dir.iterdir()) and not marker.exists():
        return False
    shutil.rmtree(data_dir, ignore_errors=True)
    data_dir.mkdir(parents=True)
    marker.touch()
    return True


def follow_job(serve: "subprocess.Popen[bytes]", data_dir: Path, job_file: Path, log_path: Path) -> int:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not (data_dir / "service.json").exists():
        if serve.poll() is not None or time.monotonic() > deadline:
            print(f"The service did not start:\n{log_path.read_text(errors='replace')}", file=sys.stderr)
            return 1
        time.sleep(0.1)
    print("Try `pkill -9 syncbn-rank-2` in another terminal while it trains, and watch the curve go on.", flush=True)
    endpoint = find_service(data_dir=data_dir, url=None, token=None, environment={})
    with Client(endpoint.url, endpoint.token, reconnect_for_s=READY_TIMEOUT_S) as client:
        job = watch_job(client, client.submit(load_job(job_file)), timeout_s=None, lively=is_lively())
        print(f"{job.spec.name}: {job.status}, {job.step} of {job.num_steps} steps. {job.message}")
        if job.status is not JobStatus.SUCCEEDED:
            return 3
        accuracy = client.metrics(job.id, names=["eval/accuracy"])["eval/accuracy"].values[-1]
        checkpoint = client.checkpoints(job.id)[-1]
    directory = data_dir / "runs" / checkpoint.path
    print(f"""test accuracy {accuracy:.4f}
checkpoint {directory}

Its weights load into the same network with torch.nn.BatchNorm2d or torch.nn.SyncBatchNorm:

    from safetensors.torch import load_file
    model.load_state_dict(load_file("…/model.safetensors"))

examples/evaluate_checkpoint.py does that, and finds the same accuracy in one process:

    .venv/bin/python examples/evaluate_checkpoint.py {directory}
""")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
