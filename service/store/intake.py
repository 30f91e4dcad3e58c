"""What the records of a journal do to the rows of their job."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy.engine import Connection

from service.domain.curve import Point
from service.domain.job import Attempt, AttemptStatus, JobStatus, Reason
from service.domain.journal import (
    CheckpointQuarantined,
    CheckpointWritten,
    Ended,
    ExactnessFound,
    JournalRecord,
    Launched,
    Metrics,
    Placed,
    Resumed,
    Running,
    Warned,
)
from service.store import checkpoints, metrics, rollups
from service.store.attempts import is_timed, update_attempt
from service.store.columns import plain
from service.store.jobs import LockedJob, failure_row
from service.store.metrics import PointRow


def take_in(connection: Connection, locked: LockedJob, attempt: Attempt, records: Sequence[JournalRecord]) -> None:
    """Take in the records that follow the attempt's last one; those before it are skipped.

    Args:
        connection: in a transaction for writing.
        locked: the job.
        attempt: its current one.
        records: in order of sequence.

    Raises:
        ValueError: a record is missing between them.
    """
    new = list(_new_records(attempt, records))
    if not new:
        return
    intake = _Intake(connection, locked, attempt)
    for record in new:
        intake.take(record)
    intake.write(last=new[-1])


def _new_records(attempt: Attempt, records: Sequence[JournalRecord]) -> Iterator[JournalRecord]:
    last = attempt.last_sequence
    for record in records:
        if record.sequence <= last:
            continue
        if record.sequence != last + 1:
            raise ValueError(
                f"The journal of attempt {attempt.number} of job {attempt.job_id} goes from record {last} "
                f"to {record.sequence}."
            )
        last = record.sequence
        yield record


class _Intake:
    """The effect of records, one after another; rows of points are gathered and written together."""

    def __init__(self, connection: Connection, locked: LockedJob, attempt: Attempt) -> None:
        self._connection = connection
        self._locked = locked
        self._number = attempt.number
        self._status = attempt.status
        self._running_at = attempt.running_at
        # Else it may be, and is only looked up where it matters.
        self._is_timed = attempt.ran_s > 0.0
        self._step = attempt.step or 0
        self._changes: dict[str, Any] = {}
        self._points: list[PointRow] = []
        # Where those of them are that count, by step and name, and at which of these a stored one may have to give way.
        self._counting: dict[tuple[int, str], int] = {}
        self._replacing: set[tuple[int, str]] = set()
        # No stored point beyond this step counts.
        self._reached = locked.job.step

    def take(self, record: JournalRecord) -> None:
        """Take in one record."""
        match record.report:
            case Launched() as report:
                self._advance(AttemptStatus.LAUNCHED)
                self._event("launched", "The supervisor runs.", record, supervisor_pid=report.supervisor_pid)
            case Placed() as report:
                self._changes["node_ids"] = list(report.node_ids)
                message = f"{len(report.pids)} worker(s) have a process."
                self._event("placed", message, record, node_ids=list(report.node_ids), pids=list(report.pids))
            case CheckpointQuarantined() as report:
                job_id = report.job_id or self._locked.job.id
                checkpoints.quarantine(self._connection, job_id, report.attempt, report.step)
                self._event("checkpoint_quarantined", report.message, record, step=report.step, job_id=job_id)
            case Resumed() as report:
                self._take_resumed(report, record)
            case Running() as report:
                self._take_running(report, record)
            case Metrics() as report:
                self._take_metrics(report, record)
            case CheckpointWritten() as report:
                self._take_checkpoint(report, record)
            case Warned() as report:
                self._event("warning", report.message, record, rank=report.rank)
            case ExactnessFound() as report:
                self._take_exactness(report, record)
            case Ended() as report:
                self._take_ended(report, record)

    def write(self, *, last: JournalRecord) -> None:
        """Write what was gathered, and how far the journal was taken in."""
        self._write_points()
        update_attempt(
            self._connection,
            self._locked,
            self._number,
            status=self._status,
            last_sequence=last.sequence,
            **(self._changes | self._clock(last)),
        )

    def _clock(self, last: JournalRecord) -> dict[str, float]:
        """Return the columns by which it is told how long the attempt has run."""
        if self._running_at is not None:
            by_day_s = max(0.0, (last.time - self._running_at).total_seconds())
            if not last.elapsed_s:
                # Its supervisor is of an earlier version, and tells the time of day alone.
                return {"running_elapsed_s": 0.0, "reported_elapsed_s": by_day_s}
            if not (self._is_timed or is_timed(self._connection, self._locked, self._number)):
                # It was running already when these columns were added.
                return {
                    "running_elapsed_s": max(0.0, last.elapsed_s - by_day_s),
                    "reported_elapsed_s": last.elapsed_s,
                }
        return {"reported_elapsed_s": last.elapsed_s}

    def _take_resumed(self, report: Resumed, record: JournalRecord) -> None:
        self._write_points()
        metrics.supersede_beyond(self._connection, self._locked.number, report.step)
        rollups.cut_beyond(self._connection, self._locked.number, report.step)
        checkpoints.supersede_beyond(self._connection, self._locked.number, report.step)
        self._changes["resumed_from_step"] = report.step
        self._locked.change(step=report.step)
        self._reached = report.step
        message = f"Continues from the checkpoint of step {report.step}." if report.step else "Starts at the beginning."
        self._event("resumed", message, record, step=report.step)

    def _take_running(self, report: Running, record: JournalRecord) -> None:
        self._advance(AttemptStatus.RUNNING)
        if self._running_at is None:
            self._running_at, self._is_timed = record.time, True
            self._changes.update(running_at=record.time, running_elapsed_s=record.elapsed_s)
        job = self._locked.job
        self._locked.change(num_steps=report.num_steps, started_at=job.started_at or record.time)
        if job.status is JobStatus.STARTING:
            self._locked.move(JobStatus.RUNNING, Reason.ALL_RANKS_STEPPED, "Every rank trains.", time=record.time)

    def _take_exactness(self, report: ExactnessFound, record: JournalRecord) -> None:
        self._locked.change(exact=report.exact, exactness=report.message)
        self._event("exactness", report.message, record, exact=report.exact, reasons=list(report.reasons))

    def _take_metrics(self, report: Metrics, record: JournalRecord) -> None:
        names = [*report.values, *report.nonfinite]
        if not names:
            return
        position = self._locked.next_position()
        for name in names:
            text = _name(name)
            place = (report.step, text)
            earlier = self._counting.get(place)
            if earlier is not None:
                self._points[earlier] = self._points[earlier]._replace(superseded=True)
            if report.step <= self._reached:
                self._replacing.add(place)
            self._counting[place] = len(self._points)
            self._points.append(
                PointRow(
                    job_number=self._locked.number,
                    position=position,
                    name=text,
                    attempt=self._number,
                    sequence=record.sequence,
                    step=report.step,
                    value=report.values.get(name),
                    nonfinite=report.nonfinite.get(name),
                    superseded=False,
                )
            )
        self._reach(report.step)

    def _take_checkpoint(self, report: CheckpointWritten, record: JournalRecord) -> None:
        checkpoints.commit_checkpoint(self._connection, self._locked.number, self._number, report, record.time)
        self._reach(report.step)
        self._event(
            "checkpoint",
            f"Checkpoint of step {report.step}.",
            record,
            step=report.step,
            path=report.path,
            manifest_sha256=report.manifest_sha256,
            metrics=report.metrics,
        )

    def _take_ended(self, report: Ended, record: JournalRecord) -> None:
        self._advance(AttemptStatus.ENDED)
        self._changes.update(
            outcome=report.outcome,
            reason=report.reason,
            message=report.message,
            failure=failure_row(report.failure),
            ended_at=record.time,
        )
        self._reach(report.step)
        failed_rank = report.failure.rank if report.failure else None
        self._locked.add_event(
            "ended",
            report.message,
            time=record.time,
            reason=report.reason,
            data={"outcome": report.outcome, "step": report.step, "rank": failed_rank},
        )

    def _advance(self, status: AttemptStatus) -> None:
        order = list(AttemptStatus)
        self._status = max(self._status, status, key=order.index)

    def _reach(self, step: int) -> None:
        self._step = self._changes["step"] = max(step, self._step)
        if step > self._locked.job.step:
            self._locked.change(step=step)

    def _event(self, kind: str, message: str, record: JournalRecord, **data: object) -> None:
        self._locked.add_event(kind, message, time=record.time, data=data)

    def _write_points(self) -> None:
        if not self._points:
            return
        number = self._locked.number
        replaced = metrics.supersede_at(self._connection, number, self._replacing)
        metrics.insert_points(self._connection, self._points)
        points: defaultdict[str, list[Point]] = defaultdict(list)
        for (step, name), place in self._counting.items():
            row = self._points[place]
            points[name].append((step, row.value, row.nonfinite, self._number))
        rollups.add_points(self._connection, number, points, replaced=replaced, reached=self._reached)
        self._points, self._counting, self._replacing = [], {}, set()
        self._reached = self._locked.job.step


@lru_cache(maxsize=1024)
def _name(text: str) -> str:
    return plain(text)  # a job reports the same few names again and again
