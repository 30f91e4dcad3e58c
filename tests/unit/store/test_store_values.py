"""What the store computes without a database."""

import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.dialects import postgresql, sqlite

from service.domain.errors import InvalidCursor, ServiceError
from service.store.clock import unix_now
from service.store.columns import Json, PlainText, UtcDateTime
from service.store.cursor import decode_cursor, encode_cursor
from service.store.engine import Database, journal_mode
from service.store.ids import new_job_id

SQLITE, POSTGRESQL = sqlite.dialect(), postgresql.dialect()


@pytest.mark.parametrize(
    ("version", "mode"),
    [
        ((3, 40, 1), "delete"),
        ((3, 44, 5), "delete"),
        ((3, 44, 6), "wal"),
        ((3, 45, 0), "delete"),
        ((3, 46, 1), "delete"),
        ((3, 50, 6), "delete"),
        ((3, 50, 7), "wal"),
        ((3, 51, 0), "delete"),
        ((3, 51, 2), "delete"),
        ((3, 51, 3), "wal"),
        ((3, 53, 4), "wal"),
        ((4, 0, 0), "wal"),
    ],
)
def test_a_write_ahead_log_only_where_its_race_is_fixed(version, mode):
    assert journal_mode(version) == mode


@pytest.mark.parametrize(
    "url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true", "mysql://h/d"]
)
def test_a_database_that_could_not_keep_the_promises_is_refused(url):
    with pytest.raises(ServiceError, match="job database"):
        Database(url)


def test_ids_are_lower_case_of_one_length_and_differ():
    ids = [new_job_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert {len(job_id) for job_id in ids} == {30}
    assert all(job_id.startswith("job-") and job_id[4:].isalnum() and job_id == job_id.lower() for job_id in ids)


def test_ids_sort_by_time(monkeypatch):
    ids = []
    for time_ns in (0, 10**15, 10**18, 1_780_000_000 * 10**9, 1_780_000_000 * 10**9 + 10**6, 10**19):
        monkeypatch.setattr("service.store.ids.time.time_ns", lambda time_ns=time_ns: time_ns)
        ids.append(new_job_id())
    assert ids == sorted(ids)


@given(st.integers(1, 10**18 - 1))
def test_a_cursor_is_read_back(number):
    assert decode_cursor(encode_cursor(number)) == number


@settings(max_examples=30)
@given(st.text())
def test_any_other_text_is_no_cursor(text):
    with pytest.raises(InvalidCursor):
        decode_cursor(text)


@given(st.datetimes(timezones=st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=30))])))
def test_times_come_back_in_utc(time):
    try:
        expected = time.astimezone(UTC)
    except OverflowError:
        return
    column = UtcDateTime()
    for dialect in (SQLITE, POSTGRESQL):
        read = column.process_result_value(column.process_bind_param(time, dialect), dialect)
        assert read == expected
        assert read.tzinfo is UTC


def test_a_time_without_a_zone_is_refused():
    with pytest.raises(ValueError, match="without a zone"):
        UtcDateTime().process_bind_param(datetime(2026, 1, 1), SQLITE)


@given(st.text(alphabet=st.characters(codec=None)))
def test_text_is_what_any_database_holds(text):
    held = PlainText().process_bind_param(text, POSTGRESQL)
    assert "\0" not in held
    held.encode()
    if "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text):
        assert held == text


def test_json_is_plain_and_finite():
    written = Json().process_bind_param({"path": "\udcff\0é"}, POSTGRESQL)
    assert written.isascii()
    assert "\0" not in written
    assert Json().process_result_value(written, POSTGRESQL) == {"path": "\udcff\0é"}
    with pytest.raises(ValueError, match="JSON compliant"):
        Json().process_bind_param({"loss": float("nan")}, SQLITE)


def test_the_clock_is_the_databases_own():
    query = sa.select(unix_now())
    assert "julianday('now')" in str(query.compile(dialect=SQLITE))
    assert "clock_timestamp()" in str(query.compile(dialect=POSTGRESQL))


def test_importing_the_store_is_light():
    script = (
        "import sys, service.store\n"
        "heavy = {'torch', 'ray', 'alembic', 'fastapi', 'numpy', 'psycopg', 'sqlalchemy.orm'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
