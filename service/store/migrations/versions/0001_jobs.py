"""Jobs, attempts, their feed, checkpoints; idempotency keys; the lease and the cluster, one row each."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Written out, not imported: a migration stays as it was when the code moves on.
NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "cluster",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("nodes", sa.Text(), nullable=False),
        sa.Column("observed_at", TIME, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_cluster"),
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("owner", TEXT, nullable=False),
        sa.Column("route", TEXT, nullable=False),
        sa.Column("key", TEXT, nullable=False),
        sa.Column("body_sha256", sa.String(length=64), nullable=False),
        sa.Column("response", sa.Text(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("owner", "route", "key", name="pk_idempotency_keys"),
    )
    op.create_table(
        "jobs",
        sa.Column("number", NUMBER, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("spec", sa.Text(), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.String(length=32), nullable=False),
        sa.Column("message", TEXT, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("retries_used", sa.Integer(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("num_steps", sa.BigInteger(), nullable=True),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("running_s", sa.Double(), nullable=False),
        sa.Column("failure", sa.Text(), nullable=True),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("started_at", TIME, nullable=True),
        sa.Column("ended_at", TIME, nullable=True),
        sa.PrimaryKeyConstraint("number", name="pk_jobs"),
        sa.UniqueConstraint("id", name="uq_jobs_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_jobs_name", "jobs", ["name", "number"])
    op.create_index(
        "ix_jobs_queue",
        "jobs",
        ["status", sa.literal_column("priority DESC"), "number"],
        sqlite_where=sa.text("status = 'queued'"),
        postgresql_where=sa.text("status = 'queued'"),
    )
    op.create_index("ix_jobs_status", "jobs", ["status", "number"])
    op.create_table(
        "leases",
        sa.Column("name", sa.String(length=32), nullable=False),
        sa.Column("holder", TEXT, nullable=True),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_leases"),
    )
    op.create_table(
        "attempts",
        sa.Column("job_number", NUMBER, nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("world_size", sa.Integer(), nullable=False),
        sa.Column("node_ids", sa.Text(), nullable=False),
        sa.Column("last_sequence", sa.BigInteger(), nullable=False),
        sa.Column("resumed_from_step", sa.BigInteger(), nullable=True),
        sa.Column("stop_reason", sa.String(length=32), nullable=True),
        sa.Column("outcome", sa.String(length=16), nullable=True),
        sa.Column("reason", sa.String(length=32), nullable=True),
        sa.Column("message", TEXT, nullable=True),
        sa.Column("failure", sa.Text(), nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("running_at", TIME, nullable=True),
        sa.Column("reported_at", TIME, nullable=True),
        sa.Column("ended_at", TIME, nullable=True),
        sa.ForeignKeyConstraint(["job_number"], ["jobs.number"], name="fk_attempts_job_number"),
        sa.PrimaryKeyConstraint("job_number", "number", name="pk_attempts"),
    )
    op.create_index(
        "ix_attempts_live",
        "attempts",
        ["job_number", "number"],
        sqlite_where=sa.text("status != 'sealed'"),
        postgresql_where=sa.text("status != 'sealed'"),
    )
    op.create_table(
        "checkpoints",
        sa.Column("job_number", NUMBER, nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("step", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("path", TEXT, nullable=False),
        sa.Column("manifest_sha256", sa.String(length=64), nullable=False),
        sa.Column("files", sa.Text(), nullable=False),
        sa.Column("metrics", sa.Text(), nullable=False),
        sa.Column("superseded", sa.Boolean(), nullable=False),
        sa.Column("quarantined", sa.Boolean(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(["job_number"], ["jobs.number"], name="fk_checkpoints_job_number"),
        sa.PrimaryKeyConstraint("job_number", "attempt", "step", name="pk_checkpoints"),
    )
    op.create_table(
        "events",
        sa.Column("job_number", NUMBER, nullable=False),
        sa.Column("position", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("time", TIME, nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("reason", sa.String(length=32), nullable=True),
        sa.Column("message", TEXT, nullable=False),
        sa.Column("data", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["job_number"], ["jobs.number"], name="fk_events_job_number"),
        sa.PrimaryKeyConstraint("job_number", "position", name="pk_events"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "job_labels",
        sa.Column("job_number", NUMBER, nullable=False),
        sa.Column("key", sa.String(length=63), nullable=False),
        sa.Column("value", TEXT, nullable=False),
        sa.ForeignKeyConstraint(["job_number"], ["jobs.number"], name="fk_job_labels_job_number"),
        sa.PrimaryKeyConstraint("job_number", "key", name="pk_job_labels"),
    )
    op.create_index("ix_job_labels_key", "job_labels", ["key", "value", "job_number"])
    op.create_table(
        "metrics",
        sa.Column("job_number", NUMBER, nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("sequence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("value", sa.Double(), nullable=True),
        sa.Column("nonfinite", sa.String(length=8), nullable=True),
        sa.Column("superseded", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["job_number"], ["jobs.number"], name="fk_metrics_job_number"),
        sa.PrimaryKeyConstraint("job_number", "attempt", "sequence", "name", name="pk_metrics"),
        sqlite_with_rowid=False,
    )
    op.create_index(
        "ix_metrics_curve",
        "metrics",
        ["job_number", "step", "name"],
        sqlite_where=sa.text("superseded = 0"),
        postgresql_where=sa.text("NOT superseded"),
    )
    op.create_index(
        "ix_metrics_feed",
        "metrics",
        ["job_number", "position"],
        sqlite_where=sa.text("superseded = 0"),
        postgresql_where=sa.text("NOT superseded"),
    )
    op.execute("INSERT INTO leases (name, holder, epoch, expires_at) VALUES ('scheduler', NULL, 0, 0)")
    op.execute("INSERT INTO cluster (id, nodes, observed_at) VALUES (1, '[]', NULL)")
