"""Real connections: what makes an acknowledged write durable, and what an outage looks like."""

import logging

import pytest
import sqlalchemy as sa

from service.domain.errors import NotFound, Unavailable
from service.domain.job import JobStatus
from service.domain.journal import Launched, Resumed, Running
from service.store import SqlStore, migrate
from service.store.engine import Database, create_engine
from tests.contract.store_examples import lead, loss, make_spec, records, run, start

FULL, EXTRA = 2, 3


def pragmas(engine):
    with engine.connect() as connection:
        return {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }


def test_a_safe_sqlite_keeps_a_write_ahead_log(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("service.store.engine.sqlite_driver.sqlite_version_info", (3, 51, 3))
    engine = create_engine(f"sqlite:///{tmp_path / 'db'}")
    with caplog.at_level(logging.INFO, "service.store.engine"):
        expected = {"journal_mode": "wal", "synchronous": FULL, "foreign_keys": 1, "busy_timeout": 5000}
        assert pragmas(engine) == expected
        engine.dispose()
        assert pragmas(engine) == expected
    engine.dispose()
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_an_sqlite_with_the_race_keeps_a_rollback_journal_and_says_so_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("service.store.engine.sqlite_driver.sqlite_version_info", (3, 40, 1))
    url = f"sqlite:///{tmp_path / 'db'}"
    migrate(url)
    caplog.clear()
    engine = create_engine(url)
    expected = {"journal_mode": "delete", "synchronous": EXTRA, "foreign_keys": 1, "busy_timeout": 5000}
    assert pragmas(engine) == expected
    engine.dispose()
    assert pragmas(engine) == expected
    engine.dispose()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Install pysqlite3" in caplog.text
    store = SqlStore(url)
    job = run(store, lead(store))
    assert store.get(job.id).status is JobStatus.RUNNING
    store.close()


def test_a_transaction_that_raises_leaves_nothing(database_url):
    database = Database(database_url)

    def fail_half_way():
        with database.writing() as connection:
            connection.exec_driver_sql("UPDATE leases SET holder = 'nobody'")
            raise NotFound("as a query does")

    with pytest.raises(NotFound):
        fail_half_way()
    with database.reading() as connection:
        assert connection.exec_driver_sql("SELECT holder FROM leases").scalar_one() is None
    database.close()


def test_a_reader_sees_one_moment(database_url):
    database = Database(database_url)
    with database.reading() as connection:
        before = connection.exec_driver_sql("SELECT epoch FROM leases").scalar_one()
        with database.writing() as writer:
            writer.exec_driver_sql("UPDATE leases SET epoch = epoch + 1")
        assert connection.exec_driver_sql("SELECT epoch FROM leases").scalar_one() == before
    database.close()


def test_a_database_that_cannot_be_reached_is_unavailable(tmp_path):
    for url in (f"sqlite:///{tmp_path / 'no' / 'such' / 'db'}", "postgresql://nobody@127.0.0.1:1/none"):
        store = SqlStore(url)
        with pytest.raises(Unavailable, match="does not answer"):
            store.ping()
        with pytest.raises(Unavailable):
            store.submit(make_spec())
        with pytest.raises(Unavailable):
            migrate(url)
        store.close()


@pytest.mark.postgres
@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_a_postgresql_session_is_durable_and_waits_for_nothing_without_end(database_url):
    database = Database(database_url.replace("search_path=", "synchronous_commit=off%20-csearch_path="))
    with database.reading() as connection:
        settings = {
            name: connection.exec_driver_sql(f"SHOW {name}").scalar_one()
            for name in ("synchronous_commit", "lock_timeout", "statement_timeout", "transaction_read_only")
        }
    assert settings == {
        "synchronous_commit": "on",
        "lock_timeout": "5s",
        "statement_timeout": "30s",
        "transaction_read_only": "on",
    }
    database.close()


@pytest.mark.postgres
@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_a_postgresql_server_that_dropped_its_connections_costs_no_request(database_url):
    store = SqlStore(database_url)
    job, _ = store.submit(make_spec())
    with store._database.reading() as connection:
        pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
    engine = create_engine(database_url)
    with engine.connect() as connection:
        connection.exec_driver_sql("SELECT pg_terminate_backend(%s)", (pid,))
    assert store.get(job.id) == job
    store.close()
    engine.dispose()


def test_pages_curves_and_queues_are_read_through_indices(tmp_path):
    url = f"sqlite:///{tmp_path / 'db'}"
    migrate(url)
    engine = create_engine(url)
    statements = []
    store = SqlStore(url)
    sa.event.listen(
        store._database.engine,
        "before_cursor_execute",
        lambda connection, cursor, statement, parameters, context, many: statements.append((statement, parameters)),
    )
    lease = lead(store)
    job = run(store, lease, loss(1))
    statements.clear()
    store.ingest(lease, job.id, 1, records(loss(1), loss(2), first=5))
    store.list_jobs()
    store.list_jobs(statuses=[JobStatus.QUEUED, JobStatus.RUNNING], labels=[("a", "b")], name="digits")
    store.queued_jobs()
    store.live_attempts()
    store.metrics(job.id, names=["train/loss"])
    store.curves(job.id, max_points=10)
    store.follow({job.id: 0})
    store.get(job.id)
    plans = []
    with engine.connect() as connection:
        for statement, parameters in statements:
            if statement.startswith(("SELECT", "WITH")):
                rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
                plans += [row[3] for row in rows]
    store.close()
    engine.dispose()
    # The newest page walks the table backwards, by its key; nothing else is read whole or sorted.
    of_no_table = ("USING INDEX", "SUBQUERY", "(subquery", "anon", "CONSTANT ROW", "wanted")
    scans = [plan for plan in plans if plan.startswith("SCAN") and not any(word in plan for word in of_no_table)]
    assert scans in ([], ["SCAN jobs"]), plans
    for index in ("ix_jobs_status", "ix_attempts_live", "ix_metrics_curve"):
        assert any(index in plan for plan in plans), (index, plans)
    for search in (
        "metrics USING PRIMARY KEY (job_number=? AND position>",
        "metric_rollups USING PRIMARY KEY (job_number=? AND width=? AND name=? AND start>",
    ):
        assert any(search in plan for plan in plans), (search, plans)


def test_a_job_that_would_be_refused_by_now_stops_nobody(store, database_url):
    lease = lead(store)
    job_id = run(store, lease).id
    queued, _ = store.submit(make_spec(name="queued"))
    engine = create_engine(database_url)
    with engine.begin() as connection:
        spec = make_spec().model_copy(update={"epochs": 3})  # beside steps
        connection.execute(sa.text("UPDATE jobs SET spec = :spec"), {"spec": spec.model_dump_json()})
    engine.dispose()
    assert [job.id for job in store.list_jobs().jobs] == [queued.id, job_id]
    assert [job.id for job in store.queued_jobs()] == [queued.id]
    assert [entry.job.spec for entry in store.live_attempts()] == [spec]


def test_a_supervisor_that_tells_the_time_of_day_alone_is_timed_by_it(tmp_path):
    """Those of earlier versions do."""
    url = f"sqlite:///{tmp_path / 'db'}"
    migrate(url)
    store = SqlStore(url)
    lease = lead(store)
    job = start(store, lease)
    journal = records(Launched(supervisor_pid=1), Resumed(step=0), Running(num_steps=10), loss(1), loss(2))
    untimed = [record.model_copy(update={"elapsed_s": 0.0}) for record in journal]
    store.ingest(lease, job.id, 1, untimed[:4])
    assert store.attempts(job.id)[0].ran_s == 1.0
    store.ingest(lease, job.id, 1, untimed)
    assert store.attempts(job.id)[0].ran_s == 2.0
    store.close()
