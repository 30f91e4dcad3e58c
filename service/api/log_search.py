"""Search in what ranks printed: a scan that stops at a number of matches or after a time, and says where it stopped.

Patterns are RE2's (Cox 2010, "Regular Expression Matching in the Wild"): matched in time linear in the text, without
the backtracking that lets a short pattern keep a process busy for years, and without the interpreter's lock.
"""

import base64
import binascii
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import re2

from service.domain.errors import InvalidCursor
from service.domain.ports import RunFiles

# A request ends about this long after it began, wherever it is by then.
BUDGET_S = 2.0
READ_BYTES = 4 << 20
# What is searched at once; the time is looked at in between. A longer line is searched in pieces of this length.
WINDOW_BYTES = 1 << 16
# A pattern that compiles to more instructions could take a second for a window.
MAX_INSTRUCTIONS = 5000
_MAX_MEMORY_BYTES = 1 << 20
MAX_TEXT_CHARACTERS = 2000
_CURSOR = re.compile(r"logs:([1-9][0-9]{0,9}):([0-9]{1,10}):([0-9]{1,19})", re.ASCII)


@dataclass(frozen=True, kw_only=True, order=True)
class LogPlace:
    """A place in the logs of a job.

    Attributes:
        attempt: number of the attempt.
        rank: which rank of it.
        offset: byte in its log.
    """

    attempt: int
    rank: int
    offset: int = 0

    @classmethod
    def of_cursor(cls, cursor: str) -> Self:
        """Return the place that a cursor was made of. Raises ``InvalidCursor``."""
        try:
            plain = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode()
        except (binascii.Error, ValueError):
            plain = ""
        match = _CURSOR.fullmatch(plain)
        if match is None:
            raise InvalidCursor("The cursor is not one that this service hands out. Start again without a cursor.")
        return cls(attempt=int(match[1]), rank=int(match[2]), offset=int(match[3]))

    @property
    def cursor(self) -> str:
        """Opaque to those who carry it."""
        plain = f"logs:{self.attempt}:{self.rank}:{self.offset}"
        return base64.urlsafe_b64encode(plain.encode()).decode().rstrip("=")


class BadPattern(ValueError):
    """What was asked for is no pattern that can be searched for; it says why."""


@dataclass(frozen=True, kw_only=True)
class FoundLine:
    """A line that matches.

    Attributes:
        place: where it begins.
        text: the line, without its end, decoded; of a long one the part around the match.
        is_cut: whether that is only a part of it.
    """

    place: LogPlace
    text: str
    is_cut: bool


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one request found.

    Attributes:
        lines: in order of attempt, rank and offset.
        next_place: where the search goes on; None: everything has been searched.
    """

    lines: tuple[FoundLine, ...]
    next_place: LogPlace | None


class LinePattern:
    """What a line has to contain.

    Args:
        text: as its user wrote it.
        is_regex: it is a regular expression in RE2's syntax; else it stands for itself.
        ignore_case: whether case makes no difference.

    Raises:
        BadPattern: it is no regular expression, or too large a one.
    """

    def __init__(self, text: str, *, is_regex: bool, ignore_case: bool) -> None:
        options = re2.Options()
        options.literal = not is_regex
        options.case_sensitive = not ignore_case
        options.never_nl = True  # a match lies in one line, whatever the pattern says
        options.max_mem = _MAX_MEMORY_BYTES
        options.log_errors = False
        try:
            re2.compile(text, options)  # by itself, as its user wrote it
            self._pattern = re2.compile(f"(?m){text}" if is_regex else text, options)
        except re2.error as error:
            why = error.args[0] if error.args else error
            reason = why.decode(errors="replace") if isinstance(why, bytes) else why
            raise BadPattern(
                f"is no regular expression that can be used here: {reason}. The syntax is RE2's; leave out `regex` to "
                "look for the text itself."
            ) from None
        if self._pattern.programsize > MAX_INSTRUCTIONS:
            raise BadPattern("is too large a regular expression. Use fewer or smaller repetitions.")

    def search(self, text: bytes, start: int) -> tuple[int, int] | None:
        """Return the span of the first match from an offset on that is the beginning of a line."""
        match = self._pattern.search(text, start)
        return None if match is None else match.span()


def search_logs(
    files: RunFiles,
    job_id: str,
    pattern: LinePattern,
    *,
    logs: Sequence[LogPlace],
    start: LogPlace | None,
    limit: int,
    budget_s: float = BUDGET_S,
) -> Found:
    """Search the logs of a job, line by line.

    Args:
        files: run storage.
        job_id: of the job.
        pattern: what to look for.
        logs: the beginnings of the logs to search, in order.
        start: where an earlier search stopped; None: at the first log.
        limit: most lines to return.
        budget_s: time after which it stops.
    """
    deadline = time.monotonic() + budget_s
    found: list[FoundLine] = []
    has_begun = False
    for log in logs:
        if start is not None and (log.attempt, log.rank) < (start.attempt, start.rank):
            continue
        if has_begun and time.monotonic() >= deadline:
            return Found(lines=tuple(found), next_place=log)
        has_begun = True
        place = start if start is not None and (log.attempt, log.rank) == (start.attempt, start.rank) else log
        for window_start, window in _windows(files, job_id, place):
            at = 0
            while at < len(window):
                span = pattern.search(window, at)
                if span is None or (span[0] == len(window) and window.endswith(b"\n")):
                    break
                line_start = window.rfind(b"\n", at, span[0]) + 1 or at
                line_end = window.find(b"\n", span[1])
                line_end = len(window) if line_end < 0 else line_end
                text, is_cut = _show(window[line_start:line_end], span[0] - line_start)
                line_place = LogPlace(attempt=log.attempt, rank=log.rank, offset=window_start + line_start)
                found.append(FoundLine(place=line_place, text=text, is_cut=is_cut))
                at = line_end + 1
                if len(found) == limit:
                    next_place = LogPlace(attempt=log.attempt, rank=log.rank, offset=window_start + at)
                    return Found(lines=tuple(found), next_place=next_place)
            if time.monotonic() >= deadline:
                next_place = LogPlace(attempt=log.attempt, rank=log.rank, offset=window_start + len(window))
                return Found(lines=tuple(found), next_place=next_place)
    return Found(lines=tuple(found), next_place=None)


def _windows(files: RunFiles, job_id: str, place: LogPlace) -> Iterator[tuple[int, bytes]]:
    """Yield the log from a place on in windows of whole lines, as far as lines are not longer than one."""
    rest, rest_start, offset = b"", place.offset, place.offset
    while True:
        part = files.read_log(job_id, place.attempt, place.rank, offset, READ_BYTES)
        if not part.content:
            break
        if part.start != offset:  # what lay between is no longer kept
            if rest:
                yield rest_start, rest
            rest, rest_start = b"", part.start
        offset = part.start + len(part.content)
        # Progress bars end their lines with a carriage return.
        text = rest + part.content.replace(b"\r", b"\n")
        begin = 0
        while len(text) - begin >= WINDOW_BYTES:
            end = text.rfind(b"\n", begin, begin + WINDOW_BYTES) + 1 or begin + WINDOW_BYTES
            yield rest_start + begin, text[begin:end]
            begin = end
        rest, rest_start = text[begin:], rest_start + begin
    if rest:
        yield rest_start, rest


def _show(line: bytes, match_start: int) -> tuple[str, bool]:
    """Decode a line, or the part of a long one that begins a little before the match."""
    text = line.decode(errors="replace")
    if len(text) <= MAX_TEXT_CHARACTERS:
        return text, False
    before = len(line[:match_start].decode(errors="replace"))
    start = max(0, min(before - MAX_TEXT_CHARACTERS // 4, len(text) - MAX_TEXT_CHARACTERS))
    return text[start : start + MAX_TEXT_CHARACTERS], True
