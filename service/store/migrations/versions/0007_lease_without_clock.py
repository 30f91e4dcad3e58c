"""The lease counts its renewals instead of naming the time at which it ends."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("leases", sa.Column("num_renewals", sa.BigInteger(), server_default="0", nullable=False))
    op.drop_column("leases", "expires_at")
