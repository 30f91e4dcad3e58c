"""The durable copy of an attempt's journal: JSON lines in run storage."""

from collections.abc import Iterable, Iterator

from pydantic import ValidationError

from service.domain.journal import JournalRecord
from service.storage.layout import journal_dir
from service.storage.object_store import ObjectStore
from service.storage.segments import SegmentWriter, read_sequence


class JournalWriter:
    """Appends records; one per attempt, owned by its supervisor.

    Args:
        store: run storage.
        job_id: whose journal.
        attempt: which attempt's.
    """

    def __init__(self, store: ObjectStore, job_id: str, attempt: int) -> None:
        self._segments = SegmentWriter(store, journal_dir(job_id, attempt))

    def append(self, records: Iterable[JournalRecord]) -> None:
        """Make records durable, in order."""
        self._segments.append(b"".join(record.model_dump_json().encode() + b"\n" for record in records))


def read_journal(store: ObjectStore, job_id: str, attempt: int, *, after: int) -> Iterator[JournalRecord]:
    """Yield records after a sequence number, in order.

    A line that its writer did not finish, and what would come after a gap, is left out.
    """
    expected = 1
    for line in read_sequence(store, journal_dir(job_id, attempt), 0).split(b"\n"):
        try:
            record = JournalRecord.model_validate_json(line)
        except ValidationError:
            return
        if record.sequence != expected:
            return
        expected += 1
        if record.sequence > after:
            yield record
