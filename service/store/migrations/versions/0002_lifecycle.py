"""What jobs are asked for beside a cancel: to pause, to be resized; where forks come from; where attempts go on."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("pause_requested", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.add_column("jobs", sa.Column("workers_wanted", sa.Integer(), nullable=True))
    op.add_column("jobs", sa.Column("resize_requested", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.add_column("jobs", sa.Column("origin_job_id", sa.String(length=40), nullable=True))
    op.add_column("jobs", sa.Column("origin_attempt", sa.Integer(), nullable=True))
    op.add_column("jobs", sa.Column("origin_step", sa.BigInteger(), nullable=True))
    op.add_column("attempts", sa.Column("target_node_ids", sa.Text(), nullable=True))
    op.create_index(
        "ix_jobs_origin",
        "jobs",
        ["origin_job_id"],
        sqlite_where=sa.text("origin_job_id IS NOT NULL"),
        postgresql_where=sa.text("origin_job_id IS NOT NULL"),
    )
