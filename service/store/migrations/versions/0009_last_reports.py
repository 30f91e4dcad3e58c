"""No more times of day of last reports: attempts are timed by their supervisors' clocks."""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_column("attempts", "reported_at")
