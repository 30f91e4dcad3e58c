"""Where things lie in run storage; paths relative to its root, with forward slashes."""

UPLOAD_DIRS = ("bundles", "datasets")


def job_dir(job_id: str) -> str:
    """Return the directory below which everything lies that a job's attempts write."""
    return f"jobs/{job_id}"


def attempt_dir(job_id: str, attempt: int) -> str:
    """Return the directory below which everything lies that an attempt writes."""
    return f"{job_dir(job_id)}/attempts/{attempt}"


def launch_marker(job_id: str, attempt: int) -> str:
    """Return the file that the one supervisor of an attempt creates."""
    return f"{attempt_dir(job_id, attempt)}/launched"


def seal_marker(job_id: str, attempt: int) -> str:
    """Return the file that says that an attempt is over: whatever still runs of it is to write no more."""
    return f"{attempt_dir(job_id, attempt)}/sealed"


def journal_dir(job_id: str, attempt: int) -> str:
    """Return the directory of the journal's segments."""
    return f"{attempt_dir(job_id, attempt)}/journal"


def log_dir(job_id: str, attempt: int, rank: int) -> str:
    """Return the directory of a rank's log segments."""
    return f"{attempt_dir(job_id, attempt)}/logs/rank-{rank}"


def checkpoints_dir(job_id: str, attempt: int) -> str:
    """Return the directory below which an attempt's checkpoints lie."""
    return f"{attempt_dir(job_id, attempt)}/checkpoints"


def checkpoint_dir(job_id: str, attempt: int, step: int) -> str:
    """Return the directory of a checkpoint."""
    return f"{checkpoints_dir(job_id, attempt)}/{step:09d}"
