"""The disk of the database fills up. A failure: reads stop, errors say nothing, or something stays broken."""

import pytest
import sqlalchemy as sa

from service.domain.errors import DiskFull
from service.store import SqlStore, migrate
from tests import full_disk
from tests.contract.store_examples import make_spec


def test_on_a_full_disk_reads_go_on_and_writes_say_what_to_do(tmp_path):
    full_disk.fill_up(tmp_path)


def test_a_store_that_is_full_says_so_and_leaves_nothing_of_what_it_refuses(tmp_path):
    url = f"sqlite:///{tmp_path / 'service.sqlite'}"
    migrate(url)
    store = SqlStore(url)

    @sa.event.listens_for(store._database.engine, "connect")
    def limit(connection, _record):
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count={pages + 4}")

    stored = []

    def fill_up():
        while True:
            stored.append(store.submit(make_spec(name=f"job-{len(stored)}"))[0].id)

    with pytest.raises(DiskFull, match="Make room"):
        fill_up()
    assert stored
    assert [job.id for job in store.list_jobs(limit=200).jobs] == stored[::-1]
    store.close()
