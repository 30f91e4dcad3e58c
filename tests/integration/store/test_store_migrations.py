"""Making and keeping the tables. A failure means that a database cannot be brought to what the code expects."""

import json
import re
import subprocess
import sys
from datetime import timedelta

import alembic.command
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from service.domain.errors import ServiceError, Unavailable
from service.domain.job import JobStatus, Outcome, Reason
from service.domain.journal import JournalRecord
from service.store import SqlStore, migrate
from service.store.engine import create_engine
from service.store.tables import metadata
from tests.contract.store_examples import feed_of, lead, loss, make_spec, run
from tests.fakes import naive_curves

# As that version wrote it down.
OF_THE_FIRST_VERSION = {
    "name": "digits",
    "labels": {},
    "task": "classification",
    "model": {"factory": "builtin:mlp", "args": {"hidden_sizes": [32]}},
    "dataset": {"factory": "builtin:digits", "args": {"test_fraction": 0.2, "split_seed": 0}},
    "optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4},
    "schedule": {"name": "cosine", "warmup_steps": 0, "final_fraction": 0.0},
    "batch": {"size": 16, "normalization_size": None, "max_per_rank": None},
    "workers": 4,
    "steps": 10,
    "epochs": None,
    "seed": 0,
    "norm": {"kind": "sync", "momentum": None, "eps": None, "skip_nonfinite": True},
    "precision": "float32",
    "gradient_clip_norm": None,
    "resources": {"cpus_per_rank": 1.0, "gpus_per_rank": 0, "memory_bytes_per_rank": None},
    "checkpoint": {"every_steps": 100, "keep_last": 3},
    "evaluation": {"every_steps": None, "batch_size": 64},
    "retry": {"budget": 3},
    "timeout_s": None,
    "priority": 0,
}


def definitions(engine):
    """Tables and indices in the database's own words."""
    with engine.connect() as connection:
        if connection.dialect.name == "sqlite":
            query = "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'alembic%'"
        else:
            query = (
                "SELECT indexname, replace(indexdef, current_schema(), '') FROM pg_indexes "
                "WHERE schemaname = current_schema() AND indexname NOT LIKE 'alembic%'"
                " UNION ALL SELECT table_name || '.' || column_name, concat_ws(' ', data_type, "
                "character_maximum_length, is_nullable, column_default, collation_name) "
                "FROM information_schema.columns "
                "WHERE table_schema = current_schema() AND table_name NOT LIKE 'alembic%'"
                " UNION ALL SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint "
                "WHERE connamespace = current_schema()::regnamespace AND conname NOT LIKE 'alembic%'"
            )
        return {name: _parts(definition) for name, definition in connection.execute(sa.text(query))}


def _parts(definition):
    """The parts of a definition in order of their text: SQLite appends an added column after the constraints."""
    return sorted(part.strip() for part in re.split(r",(?![^(]*\))", re.sub(r"\s+", " ", definition).rstrip(" )")))


def test_migrating_from_nothing_gives_the_tables_that_the_code_knows(empty_url):
    migrate(empty_url)
    engine = create_engine(empty_url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    migrated = definitions(engine)
    with engine.begin() as connection:
        metadata.drop_all(connection)
        metadata.create_all(connection)
    created = definitions(engine)
    engine.dispose()
    assert migrated == created
    assert any("priority DESC" in part for parts in migrated.values() for part in parts)


def test_migrating_again_changes_nothing(empty_url):
    migrate(empty_url)
    store = SqlStore(empty_url)
    job, _ = store.submit(make_spec())
    lead(store)
    lease = store.read_lease()
    migrate(empty_url)
    assert store.get(job.id) == job
    assert store.read_lease() == lease
    store.close()


def test_processes_that_start_at_once_migrate_once(empty_url):
    script = "import sys; from service.store import migrate; migrate(sys.argv[1])"
    processes = [
        subprocess.Popen([sys.executable, "-c", script, empty_url], stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for process in processes:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    store = SqlStore(empty_url)
    assert lead(store).epoch == 1
    store.close()


def test_a_database_without_tables_does_not_answer(empty_url):
    store = SqlStore(empty_url)
    with pytest.raises(Unavailable, match="cluster"):
        store.ping()
    store.close()


def test_a_migration_that_fails_leaves_nothing(empty_url, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("in the middle")

    monkeypatch.setattr("alembic.operations.base.Operations.execute", fail)  # after the tables, before their first rows
    with pytest.raises(RuntimeError, match="in the middle"):
        migrate(empty_url)
    engine = create_engine(empty_url)
    assert sa.inspect(engine).get_table_names() == []
    engine.dispose()
    monkeypatch.undo()
    migrate(empty_url)


def test_tables_of_a_later_version_are_left_alone(empty_url):
    migrate(empty_url)
    engine = create_engine(empty_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    engine.dispose()
    with pytest.raises(ServiceError, match="later version"):
        migrate(empty_url)


def test_jobs_of_the_first_version_live_on(empty_url, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(alembic.command, "upgrade", lambda config, _, to=alembic.command.upgrade: to(config, "0001"))
        migrate(empty_url)
    spec = OF_THE_FIRST_VERSION
    engine = create_engine(empty_url)
    with engine.begin() as connection:
        values = {
            "id": "job-old", "name": spec["name"], "priority": 0, "spec": json.dumps(spec), "status": "failed",
            "reason": "rank_lost", "message": "", "attempt": 0, "retries_used": 3, "step": 0, "position": 0,
            "running_s": 0.0, "cancel_requested": False, "created_at": "2026-01-01 00:00:00",
        }  # fmt: skip
        names = ", ".join(values)
        places = ", ".join(f":{name}" for name in values)
        connection.execute(sa.text(f"INSERT INTO jobs ({names}) VALUES ({places})"), values)
    engine.dispose()
    migrate(empty_url)
    store = SqlStore(empty_url)
    job = store.resume("job-old")
    assert job.spec.task.name == "classification"
    assert (job.spec.workers.min, job.spec.workers.max) == (4, 4)
    # Its checkpoints hold one group of parameters, all of which decay.
    assert (job.spec.optimizer.weight_decay, job.spec.optimizer.decay_norm_and_bias) == (5e-4, True)
    assert (job.status, job.retries_used) == (JobStatus.QUEUED, 0)
    assert (job.owner, job.spec.queue, job.preemptions_used, job.not_before) == ("default", "default", 0, None)
    assert [(state.queue.name, state.num_queued) for state in store.queue_states()] == [("default", 1)]
    assert (job.pause_requested, job.workers_wanted, job.resize_requested, job.forked_from) == (
        False,
        None,
        False,
        None,
    )
    store.close()


@pytest.mark.parametrize(("clock_s", "ran_s"), [(100.0, [7.0, 9.0]), (4.0, [7.0 - 3.0, 9.0 - 3.0]), (None, [7.0, 9.0])])
def test_an_attempt_that_runs_meanwhile_is_timed_from_then_on(database_url, store, clock_s, ran_s):
    """By its supervisor's clock, which says so much at the next record, as far as that goes back; else by the day's."""
    lease = lead(store)
    job = run(store, lease)
    engine = create_engine(database_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE attempts SET running_elapsed_s = NULL, reported_elapsed_s = NULL")
    engine.dispose()
    running_at = store.attempts(job.id)[0].running_at
    told = []
    for sequence, after_s in enumerate((7.0, 9.0), start=4):
        record = JournalRecord(
            sequence=sequence,
            time=running_at + timedelta(seconds=after_s),
            elapsed_s=0.0 if clock_s is None else clock_s + after_s - 7.0,
            report=loss(sequence),
        )
        store.ingest(lease, job.id, 1, [record])
        told.append(store.attempts(job.id)[0].ran_s)
    assert told == ran_s
    store.seal_attempt(lease, job.id, 1, outcome=Outcome.LOST, reason=Reason.NODE_LOST, failure=None)
    assert store.get(job.id).running_s == ran_s[-1]


def test_the_points_of_earlier_versions_are_rolled_up(empty_url, monkeypatch):
    """They keep their places in the feed and their values; what was superseded is in no roll-up."""
    with monkeypatch.context() as patched:
        patched.setattr(alembic.command, "upgrade", lambda config, _, to=alembic.command.upgrade: to(config, "0007"))
        migrate(empty_url)
    store = SqlStore(empty_url)
    jobs = [store.submit(make_spec(name=name))[0] for name in ("one", "two", "three")]
    engine = create_engine(empty_url)
    rows = []
    for number, scale in ((1, 1.0), (2, -1.0)):
        # Two attempts, of which the second began at step 150; a step without a finite value, and a sparse metric.
        steps = [(1, step, step > 150) for step in range(1, 201)] + [(2, step, False) for step in range(151, 9000, 3)]
        for sequence, (attempt, step, superseded) in enumerate(steps, 1):
            value, nonfinite = (None, "nan") if step == 7 else (scale * step * attempt, None)
            names = ("eval/loss", "train/loss") if step % 100 == 0 else ("train/loss",)
            rows += [
                (number, attempt, sequence, name, sequence + 1, step, value, nonfinite, superseded) for name in names
            ]
    columns = "job_number, attempt, sequence, name, position, step, value, nonfinite, superseded"
    names = columns.split(", ")
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE jobs SET attempt = 2, position = 4000 WHERE number < 3"))
        places = ", ".join(f":{name}" for name in names)
        insert = sa.text(f"INSERT INTO metrics ({columns}) VALUES ({places})")
        connection.execute(insert, [dict(zip(names, row, strict=True)) for row in rows])
    engine.dispose()
    migrate(empty_url)
    for job in jobs[:2]:
        points = store.metrics(job.id)
        assert len(points) == 200 - 50 + 2950 + sum(step % 100 == 0 for step in (100, *range(151, 9000, 3)))
        assert feed_of(store, job.id, after=100, limit=1).points[0].step == 100
        for max_points in (2, 10, 100, 500):
            curves = store.curves(job.id, max_points=max_points)
            width = curves["train/loss"].bucket_steps
            for name, curve in curves.items():
                expected = naive_curves(points, curve.bucket_steps)[name]
                assert [one._replace(mean=None) for one in curve.buckets] == [
                    one._replace(mean=None) for one in expected.buckets
                ]
                # Merged level by level, each of which rounds once.
                means = [one.mean for one in expected.buckets]
                assert [one.mean for one in curve.buckets] == pytest.approx(means, rel=1e-12)
            assert width > 1
    assert store.curves(jobs[2].id, max_points=10) == {}
    store.close()
