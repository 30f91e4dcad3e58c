"""The tables of the job database."""

from typing import Any

import sqlalchemy as sa

from service.store.columns import BigInteger, Json, PlainText, UtcDateTime

metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
    }
)


def _partial_index(name: str, *columns: sa.ColumnElement[Any], where: str, in_sqlite: str | None = None) -> None:
    sa.Index(name, *columns, sqlite_where=sa.text(in_sqlite or where), postgresql_where=sa.text(where))


jobs = sa.Table(
    "jobs",
    metadata,
    # In the order of submission; other tables refer to it, and pages of jobs are cut by it.
    sa.Column("number", BigInteger, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("name", PlainText, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("spec", sa.Text, nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("reason", sa.String(32), nullable=False),
    sa.Column("message", PlainText, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("retries_used", sa.Integer, nullable=False),
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column("num_steps", sa.BigInteger),
    sa.Column("cancel_requested", sa.Boolean, nullable=False),
    sa.Column("running_s", sa.Double, nullable=False),
    sa.Column("failure", Json),
    # The last position given out in the job's feed; grows under the row's lock.
    sa.Column("position", sa.BigInteger, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("started_at", UtcDateTime),
    sa.Column("ended_at", UtcDateTime),
    sa.Column("pause_requested", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("workers_wanted", sa.Integer),
    sa.Column("resize_requested", sa.Boolean, nullable=False, server_default=sa.false()),
    # The checkpoint that a fork begins at.
    sa.Column("origin_job_id", sa.String(40)),
    sa.Column("origin_attempt", sa.Integer),
    sa.Column("origin_step", sa.BigInteger),
    sa.Column("exact", sa.Boolean),
    sa.Column("exactness", PlainText),
    sa.Column("owner", PlainText, nullable=False, server_default="default"),
    sa.Column("queue", sa.String(63), nullable=False, server_default="default"),
    sa.Column("preemptions_used", sa.Integer, nullable=False, server_default="0"),
    # A retry waits until then.
    sa.Column("not_before", UtcDateTime),
    # A job that has not started by then fails.
    sa.Column("start_by", UtcDateTime),
    sqlite_autoincrement=True,
)
sa.Index("ix_jobs_status", jobs.c.status, jobs.c.number)
sa.Index("ix_jobs_name", jobs.c.name, jobs.c.number)
_partial_index("ix_jobs_origin", jobs.c.origin_job_id, where="origin_job_id IS NOT NULL")
_partial_index("ix_jobs_queue", jobs.c.status, jobs.c.priority.desc(), jobs.c.number, where="status = 'queued'")

sa.Index("ix_jobs_queue_name", jobs.c.queue, jobs.c.number)
sa.Index("ix_jobs_owner", jobs.c.owner, jobs.c.number)
_partial_index("ix_jobs_start_by", jobs.c.start_by, where="start_by IS NOT NULL")

job_dependencies = sa.Table(
    "job_dependencies",
    metadata,
    sa.Column("job_number", BigInteger, sa.ForeignKey("jobs.number"), primary_key=True),
    # That has to succeed first.
    sa.Column("after_number", BigInteger, sa.ForeignKey("jobs.number"), primary_key=True),
)

queues = sa.Table(
    "queues",
    metadata,
    sa.Column("name", sa.String(63), primary_key=True),
    sa.Column("weight", sa.Double, nullable=False),
    sa.Column("quota", Json, nullable=False),
    sa.Column("quota_per_owner", Json, nullable=False),
    sa.Column("paused", sa.Boolean, nullable=False),
    # Decayed, in seconds of the whole cluster; the scheduler's.
    sa.Column("usage_s", sa.Double, nullable=False, server_default="0"),
)

job_labels = sa.Table(
    "job_labels",
    metadata,
    sa.Column("job_number", BigInteger, sa.ForeignKey("jobs.number"), primary_key=True),
    sa.Column("key", sa.String(63), primary_key=True),
    sa.Column("value", PlainText, nullable=False),
)
sa.Index("ix_job_labels_key", job_labels.c.key, job_labels.c.value, job_labels.c.job_number)

attempts = sa.Table(
    "attempts",
    metadata,
    sa.Column("job_number", BigInteger, sa.ForeignKey("jobs.number"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("world_size", sa.Integer, nullable=False),
    sa.Column("node_ids", Json, nullable=False),
    sa.Column("last_sequence", sa.BigInteger, nullable=False),
    sa.Column("resumed_from_step", sa.BigInteger),
    sa.Column("stop_reason", sa.String(32)),
    sa.Column("outcome", sa.String(16)),
    sa.Column("reason", sa.String(32)),
    sa.Column("message", PlainText),
    sa.Column("failure", Json),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("running_at", UtcDateTime),
    # The same by its supervisor's monotonic clock.
    sa.Column("running_elapsed_s", sa.Double),
    # Of the last record taken in: the last proof that it was alive.
    sa.Column("reported_elapsed_s", sa.Double),
    sa.Column("ended_at", UtcDateTime),
    # Where the next attempt goes, if this one was asked to stop to be resized.
    sa.Column("target_node_ids", Json),
    # The last one that it reported.
    sa.Column("step", sa.BigInteger),
)
_partial_index("ix_attempts_live", attempts.c.job_number, attempts.c.number, where="status != 'sealed'")

events = sa.Table(
    "events",
    metadata,
    sa.Column("job_number", BigInteger, sa.ForeignKey("jobs.number"), primary_key=True),
    sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("time", UtcDateTime, nullable=False),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("reason", sa.String(32)),
    sa.Column("message", PlainText, nullable=False),
    sa.Column("data", Json, nullable=False),
    sqlite_with_rowid=False,
)

metrics = sa.Table(
    "metrics",
    metadata,
    # No foreign key: points are written under the lock of their job's row, and a check of each costs as much again.
    sa.Column("job_number", BigInteger, primary_key=True, autoincrement=False),
    sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("name", PlainText, primary_key=True),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("sequence", sa.BigInteger, nullable=False),
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column("value", sa.Double),
    sa.Column("nonfinite", sa.String(8)),
    sa.Column("superseded", sa.Boolean, nullable=False),
    sqlite_with_rowid=False,
)
# As SQLAlchemy writes ``~column`` in each dialect: SQLite uses the index only where the words agree.
_COUNTED = {"where": "NOT superseded", "in_sqlite": "superseded = 0"}
_partial_index("ix_metrics_curve", metrics.c.job_number, metrics.c.name, metrics.c.step, **_COUNTED)

metric_rollups = sa.Table(
    "metric_rollups",
    metadata,
    sa.Column("job_number", BigInteger, sa.ForeignKey("jobs.number"), primary_key=True),
    # Steps per bucket.
    sa.Column("width", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("name", PlainText, primary_key=True),
    sa.Column("start", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("first_step", sa.BigInteger, nullable=False),
    sa.Column("last_step", sa.BigInteger, nullable=False),
    sa.Column("finite_count", sa.BigInteger, nullable=False),
    sa.Column("nonfinite_count", sa.BigInteger, nullable=False),
    sa.Column("min", sa.Double),
    sa.Column("mean", sa.Double),
    sa.Column("max", sa.Double),
    sa.Column("last", sa.Double),
    sa.Column("last_nonfinite", sa.String(8)),
    sa.Column("attempt", sa.Integer, nullable=False),
    sqlite_with_rowid=False,
)

checkpoints = sa.Table(
    "checkpoints",
    metadata,
    sa.Column("job_number", BigInteger, sa.ForeignKey("jobs.number"), primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("step", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("path", PlainText, nullable=False),
    sa.Column("manifest_sha256", sa.String(64), nullable=False),
    sa.Column("files", Json, nullable=False),
    sa.Column("metrics", Json, nullable=False),
    sa.Column("superseded", sa.Boolean, nullable=False),
    sa.Column("quarantined", sa.Boolean, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
)

idempotency_keys = sa.Table(
    "idempotency_keys",
    metadata,
    sa.Column("owner", PlainText, primary_key=True),
    sa.Column("route", PlainText, primary_key=True),
    sa.Column("key", PlainText, primary_key=True),
    sa.Column("body_sha256", sa.String(64), nullable=False),
    sa.Column("response", sa.Text, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
)

uploads = sa.Table(
    "uploads",
    metadata,
    sa.Column("kind", sa.String(16), primary_key=True),
    sa.Column("sha256", sa.String(64), primary_key=True),
    sa.Column("name", PlainText, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("entries", sa.Integer),
    sa.Column("owner", PlainText, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
)
sa.Index("ix_uploads_latest", uploads.c.kind, uploads.c.created_at)

leases = sa.Table(
    "leases",
    metadata,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("holder", PlainText),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    # Grows while its holder lives; whoever sees it stand still for long enough takes over.
    sa.Column("num_renewals", sa.BigInteger, nullable=False, server_default="0"),
)

cluster = sa.Table(
    "cluster",
    metadata,
    # One row.
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("nodes", Json, nullable=False),
    sa.Column("observed_at", UtcDateTime),
)
