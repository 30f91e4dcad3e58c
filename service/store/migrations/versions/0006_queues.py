"""What decides when a job starts: queues, owners, other jobs, pauses before retries, deadlines."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("owner", TEXT, server_default="default", nullable=False))
    op.add_column("jobs", sa.Column("queue", sa.String(length=63), server_default="default", nullable=False))
    op.add_column("jobs", sa.Column("preemptions_used", sa.Integer(), server_default="0", nullable=False))
    op.add_column("jobs", sa.Column("not_before", sa.DateTime(timezone=True), nullable=True))
    op.add_column("jobs", sa.Column("start_by", sa.DateTime(timezone=True), nullable=True))
    op.add_column("attempts", sa.Column("step", sa.BigInteger(), nullable=True))
    op.create_index("ix_jobs_queue_name", "jobs", ["queue", "number"])
    op.create_index("ix_jobs_owner", "jobs", ["owner", "number"])
    op.create_index(
        "ix_jobs_start_by",
        "jobs",
        ["start_by"],
        sqlite_where=sa.text("start_by IS NOT NULL"),
        postgresql_where=sa.text("start_by IS NOT NULL"),
    )
    op.create_table(
        "job_dependencies",
        sa.Column("job_number", NUMBER, nullable=False),
        sa.Column("after_number", NUMBER, nullable=False),
        sa.ForeignKeyConstraint(["job_number"], ["jobs.number"], name="fk_job_dependencies_job_number"),
        sa.ForeignKeyConstraint(["after_number"], ["jobs.number"], name="fk_job_dependencies_after_number"),
        sa.PrimaryKeyConstraint("job_number", "after_number", name="pk_job_dependencies"),
    )
    queues = op.create_table(
        "queues",
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("weight", sa.Double(), nullable=False),
        sa.Column("quota", sa.Text(), nullable=False),
        sa.Column("quota_per_owner", sa.Text(), nullable=False),
        sa.Column("paused", sa.Boolean(), nullable=False),
        sa.Column("usage_s", sa.Double(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_queues"),
    )
    op.bulk_insert(
        queues, [{"name": "default", "weight": 1.0, "quota": "{}", "quota_per_owner": "{}", "paused": False}]
    )
