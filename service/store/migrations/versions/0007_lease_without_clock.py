"""No more times of day that are compared: the lease counts its renewals, and attempts tell how long they have run."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("leases", sa.Column("num_renewals", sa.BigInteger(), server_default="0", nullable=False))
    op.drop_column("leases", "expires_at")
    op.add_column("attempts", sa.Column("running_elapsed_s", sa.Double(), nullable=True))
    op.add_column("attempts", sa.Column("reported_elapsed_s", sa.Double(), nullable=True))
