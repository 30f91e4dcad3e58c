"""Jobs from before norms and biases could be spared go on decaying them, as they were submitted to."""

import json

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

jobs = sa.table("jobs", sa.column("number", sa.BigInteger), sa.column("spec", sa.Text))


def upgrade() -> None:
    connection = op.get_bind()
    for number, text in connection.execute(sa.select(jobs.c.number, jobs.c.spec)).all():
        spec = json.loads(text)
        if "decay_norm_and_bias" not in spec["optimizer"]:
            spec["optimizer"]["decay_norm_and_bias"] = True
            changed = json.dumps(spec, separators=(",", ":"), ensure_ascii=False)
            connection.execute(sa.update(jobs).where(jobs.c.number == number).values(spec=changed))
