"""Jobs, attempts and nodes for the pure decisions."""

from datetime import UTC, datetime

from service.domain.job import Attempt, AttemptStatus, Job, JobStatus, Reason
from service.domain.placement import Node, Resources
from service.domain.ports import LiveAttempt
from service.domain.spec import parse_spec

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def make_job(name, *, workers=1, cpus=1.0, gpus=0, memory_bytes=None, priority=0, batch=None, dataset=None, **changes):
    spec = parse_spec(
        {
            "name": name,
            "model": {"factory": "builtin:mlp"},
            "dataset": dataset or {"factory": "builtin:digits"},
            "batch": batch or {"size": 64},
            "steps": 1,
            "workers": workers,
            "priority": priority,
            "resources": {"cpus_per_rank": cpus, "gpus_per_rank": gpus, "memory_bytes_per_rank": memory_bytes},
        }
    )
    job = Job(
        id=f"job-{name}",
        spec=spec,
        status=JobStatus.QUEUED,
        reason=Reason.SUBMITTED,
        message="",
        attempt=0,
        retries_used=0,
        step=0,
        num_steps=1,
        cancel_requested=False,
        running_s=0.0,
        failure=None,
        created_at=NOW,
        started_at=None,
        ended_at=None,
    )
    return job.model_copy(update=changes)


def make_live(job, *node_ids, target=None, **changes):
    """A job that runs on these nodes; one that is being resized has a target."""
    attempt = Attempt(
        job_id=job.id,
        number=1,
        status=AttemptStatus.RUNNING,
        world_size=len(node_ids),
        node_ids=node_ids,
        last_sequence=0,
        resumed_from_step=None,
        stop_reason=None if target is None else Reason.RESIZED,
        target_node_ids=target,
        outcome=None,
        reason=None,
        failure=None,
        created_at=NOW,
        running_at=None,
        ended_at=None,
    )
    job = job.model_copy(update={"status": JobStatus.RUNNING})
    return LiveAttempt(job=job, attempt=attempt.model_copy(update=changes))


def make_node(name, cpus, gpus=0, memory_bytes=2**40):
    return Node(id=name, address="", total=Resources(cpus=cpus, gpus=gpus, memory_bytes=memory_bytes))
