"""What became of a job, in words."""

from service.cli.exit_codes import ExitCode
from service.cli.metric_names import scores
from service.cli.output import show_pairs, steps
from service.client.client import Client
from service.domain.job import Job, JobStatus

WEIGHTS = "model.safetensors"

EXIT_CODE_OF_STATUS = {
    JobStatus.SUCCEEDED: ExitCode.OK,
    JobStatus.FAILED: ExitCode.JOB_FAILED,
    JobStatus.CANCELLED: ExitCode.JOB_CANCELLED,
}


def show_end(client: Client, job: Job) -> ExitCode:
    """Print how a job ended, where its weights are and how to load them; return the exit code that stands for it."""
    pairs: list[tuple[str, object]] = [
        ("job", f"{job.spec.name} ({job.id})"),
        ("status", job.status),
        ("reason", None if job.status is JobStatus.SUCCEEDED else f"{job.reason}: {job.message}"),
        ("steps", steps(job.step, job.num_steps)),
    ]
    if job.failure is not None:
        where = "" if job.failure.rank is None else f"rank {job.failure.rank}: "
        pairs.append(("failure", f"{where}{job.failure.error_type}: {job.failure.message}"))
        pairs.append(("its log", f"syncbn logs {job.id} --rank {job.failure.rank or 0}"))
    checkpoints = client.checkpoints(job.id)
    if checkpoints:
        last = checkpoints[-1]
        for name in scores(last.metrics):
            pairs.append((f"test {name.removeprefix('eval/')}", f"{last.metrics[name]:.4f} (step {last.step})"))
        folder = download_folder(job.id, last.step)
        pairs.append(("checkpoint", f"step {last.step}, in run storage at {last.path}"))
        pairs.append(("download", f"syncbn download {job.id} --step {last.step} --to {folder}"))
        pairs.append(("load", load_hint(folder)))
    show_pairs(pairs)
    return EXIT_CODE_OF_STATUS[job.status]


def download_folder(job_id: str, step: int) -> str:
    """Return the directory that a checkpoint is downloaded to unless told otherwise."""
    return f"{job_id}-step-{step}"


def load_hint(folder: str) -> str:
    """Say how the weights of a downloaded checkpoint are loaded."""
    path = f"{folder}/{WEIGHTS}"
    return f"model.load_state_dict(safetensors.torch.load_file({path!r}))"
