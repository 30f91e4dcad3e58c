"""Journal records and rank messages as JSON. A failure means that what one process wrote another misreads."""

import json
import math
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.domain.job import CheckpointFile, Failure, Outcome, Reason
from service.domain.journal import (
    CheckpointQuarantined,
    CheckpointWritten,
    Ended,
    JournalRecord,
    Launched,
    Metrics,
    Placed,
    Resumed,
    Running,
    Warned,
    parse_report,
    utc_now,
)
from service.domain.rank_protocol import Errored, Finished, Staged, Stepped, StopRequest, parse_from_rank

REPORTS = [
    Launched(supervisor_pid=17),
    CheckpointQuarantined(step=3, message="a file differs"),
    Resumed(step=0),
    Placed(node_ids=("a", "b"), pids=(1, 2)),
    Running(num_steps=10**9),
    Metrics(step=1, values={"train/loss": 0.1 + 0.2}, nonfinite={"train/norm": "nan"}),
    CheckpointWritten(
        step=5,
        path="jobs/j/attempts/1/checkpoints/5",
        manifest_sha256="0" * 64,
        files=(CheckpointFile(name="model.safetensors", size_bytes=2**40, sha256="1" * 64),),
        metrics={"eval/accuracy": 1.0},
    ),
    Warned(message="naïve — 警告\n", rank=3),
    Ended(
        outcome=Outcome.LOST,
        reason=Reason.RANK_LOST,
        message="Rank 1 is gone.",
        step=5,
        failure=Failure(rank=1, error_type="SIGKILL", message="killed", traceback=None),
    ),
]


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.kind)
def test_a_report_survives_json_on_one_line(report):
    data = report.model_dump_json()
    assert "\n" not in data
    assert parse_report(data) == report


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.kind)
def test_a_record_survives_json(report):
    record = JournalRecord(sequence=7, time=utc_now(), report=report)
    again = JournalRecord.model_validate_json(record.model_dump_json())
    assert again == record
    assert again.time.utcoffset() == timedelta(0)


@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_every_finite_number_survives_to_the_last_bit(value):
    (again,) = parse_report(Metrics.of(1, {"x": value}).model_dump_json()).values.values()
    assert again.hex() == value.hex()


@given(values=st.dictionaries(st.text(max_size=8), st.floats(), max_size=6))
def test_metrics_are_sorted_into_finite_and_other_and_none_is_lost(values):
    metrics = Metrics.of(3, values)
    assert metrics.values.keys() | metrics.nonfinite.keys() == values.keys()
    assert not metrics.values.keys() & metrics.nonfinite.keys()
    assert all(math.isfinite(value) for value in metrics.values.values())
    assert set(metrics.nonfinite.values()) <= {"nan", "inf", "-inf"}
    for name, text in metrics.nonfinite.items():
        assert str(float(text)) == str(values[name])
    assert parse_report(metrics.model_dump_json()) == metrics


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_that_is_not_finite_passes_as_one(value):
    with pytest.raises(ValidationError):
        Metrics(step=1, values={"x": value})
    with pytest.raises(ValidationError):
        parse_report(json.dumps({"kind": "metrics", "step": 1, "values": {"x": value}}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b'{"kind": "unheard-of"}',
        b'{"kind": "resumed"}',
        b'{"kind": "resumed", "step": 1, "extra": 2}',
        b'{"kind": "resumed", "step": 1',
        b"\xff",
        b"null",
    ],
)
def test_what_is_no_report_is_refused(data):
    with pytest.raises(ValidationError):
        parse_report(data)


def test_time_is_aware_and_utc():
    assert utc_now().tzinfo is UTC
    assert abs(utc_now() - datetime.now(UTC)) < timedelta(seconds=10)


@pytest.mark.parametrize(
    "message",
    [
        Stepped(num_steps=3),
        Staged(step=3, directory="/tmp/x", metrics={"train/loss": 1e-300}),
        Errored(cause="collective", error_type="RuntimeError", message="peer\ngone", traceback="…"),
        Finished(step=3, stopped=True),
        Metrics.of(1, {"a": 1.0, "b": math.inf}),
        Warned(message="w", rank=0),
    ],
    ids=lambda message: message.kind,
)
def test_a_rank_message_survives_its_line(message):
    data = message.model_dump_json().encode()
    assert b"\n" not in data
    assert parse_from_rank(data) == message


def test_a_request_to_a_rank_is_no_message_of_one():
    with pytest.raises(ValidationError):
        parse_from_rank(StopRequest().model_dump_json().encode())
