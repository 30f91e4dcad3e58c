"""Whether a job's result depends on the number of its workers."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("exact", sa.Boolean(), nullable=True))
    op.add_column("jobs", sa.Column("exactness", TEXT, nullable=True))
