"""Databases for tests: an SQLite file, or a schema of its own on a PostgreSQL server."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from service.store.engine import create_engine
from service.store.tables import metadata

KINDS = [pytest.param("sqlite"), pytest.param("postgres", marks=pytest.mark.postgres)]


def sqlite_url(path: Path) -> str:
    return f"sqlite:///{path}"


@contextmanager
def postgres_schema() -> Iterator[str]:
    """Yield the URL of an empty schema that is dropped afterwards."""
    server = os.environ.get("SYNCBN_TEST_POSTGRES_URL", "postgresql+psycopg://postgres@127.0.0.1:5432/test")
    name = f"syncbn_test_{uuid.uuid4().hex}"
    engine = create_engine(server)
    try:
        try:
            with engine.begin() as connection:
                connection.execute(sa.schema.CreateSchema(name))
        except sa.exc.OperationalError as error:
            reason = f"no PostgreSQL at {sa.make_url(server)}: {str(error.orig).splitlines()[0]}"
            if "postgres" in os.environ.get("SYNCBN_REQUIRE", "").split(","):
                pytest.fail(reason)
            pytest.skip(reason)
        try:
            url = sa.make_url(server).update_query_dict({"options": f"-csearch_path={name}"})
            yield url.render_as_string(hide_password=False)
        finally:
            with engine.begin() as connection:
                connection.execute(sa.schema.DropSchema(name, cascade=True))
    finally:
        engine.dispose()


def empty(engine: sa.Engine) -> None:
    """Take every row out of a migrated database, as if it were new."""
    with engine.begin() as connection:
        for table in reversed(metadata.sorted_tables):
            if table.name not in ("leases", "cluster", "queues"):
                connection.execute(sa.delete(table))
        queues = metadata.tables["queues"]
        connection.execute(sa.delete(queues).where(queues.c.name != "default"))
        connection.execute(
            sa.update(queues).values(weight=1.0, quota={}, quota_per_owner={}, paused=False, usage_s=0.0)
        )
        connection.execute(sa.update(metadata.tables["leases"]).values(holder=None, epoch=0, num_renewals=0))
        connection.execute(sa.update(metadata.tables["cluster"]).values(nodes=[], observed_at=None))
