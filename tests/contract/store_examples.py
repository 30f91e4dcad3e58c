"""Jobs and journals to fill a store with."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from service.domain.job import CheckpointFile, Failure, Job, Outcome, Reason
from service.domain.journal import (
    CheckpointWritten,
    Ended,
    JournalRecord,
    Launched,
    Metrics,
    Report,
    Resumed,
    Running,
)
from service.domain.ports import Feed, IdempotencyKey, Lease
from service.domain.spec import JobSpec, parse_spec

START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def make_spec(**changes: object) -> JobSpec:
    return parse_spec(
        {
            "name": "digits",
            "model": {"factory": "builtin:mlp"},
            "dataset": {"factory": "builtin:digits"},
            "batch": {"size": 16},
            "steps": 100,
            **changes,
        }
    )


def make_key(*, key: str = "k", body: str = "a") -> IdempotencyKey:
    return IdempotencyKey(owner="me", route="POST /v1/jobs", key=key, body_sha256=body * 64)


def lead(store, holder: str = "scheduler-1") -> Lease:
    """Take the lease, whoever has it."""
    lease = store.take_lease(holder, seen=store.read_lease())
    assert lease is not None
    return lease


def is_led(store) -> bool:
    """Whether somebody has the lease."""
    return store.read_lease().holder is not None


def feed_of(store, job_id: str, *, after: int = 0, limit: int = 10_000) -> Feed:
    """What the feed of a job holds after a position."""
    return store.follow({job_id: after}, limit=limit)[job_id].feed


def records(*reports: Report, first: int = 1) -> list[JournalRecord]:
    """One record a second."""
    return [
        JournalRecord(
            sequence=sequence, time=START + timedelta(seconds=sequence), elapsed_s=float(sequence), report=report
        )
        for sequence, report in enumerate(reports, start=first)
    ]


def loss(step: int, value: float = 1.0) -> Metrics:
    return Metrics.of(step, {"train/loss": value})


def checkpoint(step: int, *, attempt: int = 1) -> CheckpointWritten:
    return CheckpointWritten(
        step=step,
        path=f"attempts/{attempt}/checkpoints/{step}",
        manifest_sha256="0" * 64,
        files=(CheckpointFile(name="model.safetensors", size_bytes=12, sha256="1" * 64),),
        metrics={"train/loss": 0.5},
    )


def ended(
    outcome: Outcome = Outcome.SUCCEEDED,
    reason: Reason = Reason.COMPLETED,
    *,
    step: int = 0,
    failure: Failure | None = None,
) -> Ended:
    return Ended(outcome=outcome, reason=reason, message="Ended as told.", step=step, failure=failure)


def start(store, lease: Lease, *, job: Job | None = None, num_ranks: int = 2) -> Job:
    """Submit a job, unless given, and create its next attempt."""
    job = job or store.submit(make_spec())[0]
    assert store.create_attempt(lease, job.id, node_ids=["node-a"] * num_ranks) is not None
    return store.get(job.id)


def run(store, lease: Lease, *reports: Report, resume: int = 0, job: Job | None = None) -> Job:
    """Start an attempt, bring it to running (three records), and take in what it reported then."""
    job = start(store, lease, job=job)
    head = (Launched(supervisor_pid=1), Resumed(step=resume), Running(num_steps=100))
    store.ingest(lease, job.id, job.attempt, records(*head, *reports))
    return store.get(job.id)


def steps(points: Sequence) -> list[int]:
    return [point.step for point in points]
