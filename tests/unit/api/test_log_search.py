"""Search in logs. A failure means lines that are not found, or found twice, or a pattern that holds up the API."""

import random
import re
import threading
import time

import pytest

from service.api import log_search
from service.api.log_search import MAX_TEXT_CHARACTERS, BadPattern, LinePattern, LogPlace, search_logs
from service.api.routes import logs as logs_route
from service.domain.job import Outcome, Reason
from tests.fakes import FakeRunFiles

LINES = ["epoch 1 loss 0.5", "", "WARNING: näher", "epoch 2 loss 0.25", "a.b", "axb", "progress 1\rprogress 2\rdone"]


def pattern(text, *, is_regex=False, ignore_case=False):
    return LinePattern(text, is_regex=is_regex, ignore_case=ignore_case)


def find(files, text, *, logs=((1, 0),), start=None, limit=1000, **options):
    places = [LogPlace(attempt=attempt, rank=rank) for attempt, rank in logs]
    return search_logs(files, "job", pattern(text, **options), logs=places, start=start, limit=limit)


def texts(found):
    return [line.text for line in found.lines]


@pytest.fixture
def files():
    files = FakeRunFiles()
    files.logs["job", 1, 0] = "\n".join(LINES).encode()
    return files


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("loss", {}, [LINES[0], LINES[3]]),
        ("a.b", {}, ["a.b"]),
        ("a.b", {"is_regex": True}, ["a.b", "axb"]),
        ("LOSS", {}, []),
        ("LOSS", {"ignore_case": True}, [LINES[0], LINES[3]]),
        ("NÄH", {"ignore_case": True}, [LINES[2]]),
        ("^epoch 2", {"is_regex": True}, [LINES[3]]),
        ("[0-9]$", {"is_regex": True}, [LINES[0], LINES[3], "progress 1", "progress 2"]),
        ("^$", {"is_regex": True}, [""]),
        ("(?s)loss.*WARNING", {"is_regex": True}, []),  # a match lies in one line
        (r"\s+WARNING", {"is_regex": True}, []),
        ("done", {}, ["done"]),  # though its line has not ended
    ],
)
def test_lines_are_found(files, text, options, expected):
    found = find(files, text, **options)
    assert texts(found) == expected
    assert found.next_place is None
    whole = files.logs["job", 1, 0]
    for line in found.lines:
        assert whole[line.place.offset :].startswith(line.text.encode())
        assert not line.is_cut


@pytest.mark.parametrize("window_bytes", [7, 64, 1 << 16])
@pytest.mark.parametrize("read_bytes", [10, 1 << 20])
def test_a_long_log_is_searched_whole_and_each_line_is_found_once(monkeypatch, window_bytes, read_bytes):
    monkeypatch.setattr(log_search, "WINDOW_BYTES", window_bytes)
    monkeypatch.setattr(log_search, "READ_BYTES", read_bytes)
    draw = random.Random(1)
    lines = ["".join(draw.choices("ab ", k=draw.randrange(7))) for _ in range(300)]
    files = FakeRunFiles()
    files.logs["job", 1, 0] = "\n".join(lines).encode()
    expected = [line for line in lines if re.search("a+b", line)]
    assert texts(find(files, "a+b", is_regex=True)) == expected
    # In parts, each going on where the one before stopped.
    place, parts = None, []
    while True:
        found = find(files, "a+b", is_regex=True, start=place, limit=7)
        assert len(found.lines) <= 7
        parts += texts(found)
        if found.next_place is None:
            break
        place = LogPlace.of_cursor(found.next_place.cursor)
    assert parts == expected


def test_a_search_stops_when_its_time_is_over_and_goes_on_there(files):
    files.logs["job", 1, 1] = b"loss of rank 1\n"
    files.logs["job", 2, 0] = b"loss of attempt 2\n"
    logs = [LogPlace(attempt=1, rank=0), LogPlace(attempt=1, rank=1), LogPlace(attempt=2, rank=0)]
    place, parts, num_requests = None, [], 0
    while num_requests == 0 or place is not None:
        found = search_logs(files, "job", pattern("loss"), logs=logs, start=place, limit=100, budget_s=0.0)
        num_requests += 1
        parts += [(line.place.attempt, line.place.rank) for line in found.lines]
        place = found.next_place
    assert parts == [(1, 0), (1, 0), (1, 1), (2, 0)]
    assert num_requests >= 3


def test_what_is_no_longer_kept_is_passed_over(files):
    files.log_starts["job", 1, 0] = len(LINES[0]) + 1
    found = find(files, "epoch")
    assert texts(found) == [LINES[3]]
    assert found.lines[0].place.offset == "\n".join(LINES).encode().index(b"epoch 2")


def test_of_a_long_line_the_part_around_the_match_is_shown(files):
    files.logs["job", 1, 0] = b"x" * 30_000 + b"needle" + b"y" * 30_000 + b"\n"
    line = find(files, "needle").lines[0]
    assert line.is_cut
    assert len(line.text) == MAX_TEXT_CHARACTERS
    assert "needle" in line.text


def test_bytes_that_are_no_text_are_passed_over(files):
    files.logs["job", 1, 0] = b"\xff\xfe before\nloss \xff 1\n"
    assert texts(find(files, "loss")) == ["loss \ufffd 1"]


@pytest.mark.parametrize("text", ["(", "a{1001}", "(?<=a)b", "a\\1", "((a{100}){100}){100}", r"\pL{200}"])
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(BadPattern):
        pattern(text, is_regex=True)
    pattern(text)  # as plain text it is


@pytest.mark.parametrize("text", ["(a+)+$", "(a|a)*b", "(?:.{0,20}){20}Q", "(.*a){12}b", "(?:a?){50}a{50}b"])
def test_a_hostile_pattern_cannot_hold_up_a_search(text):
    """Backtracking engines need longer than the age of the universe for some of these."""
    files = FakeRunFiles()
    files.logs["job", 1, 0] = b"a" * (1 << 20)
    started = time.monotonic()
    search_logs(
        files,
        "job",
        pattern(text, is_regex=True),
        logs=[LogPlace(attempt=1, rank=0)],
        start=None,
        limit=10,
        budget_s=0.1,
    )
    # The budget, and one window of the slowest pattern that is let in, on a machine that is busy: 0.7 s at rest.
    assert time.monotonic() - started < 10


@pytest.fixture
def job(service):
    job = service.submit(workers=2, batch__size=16)
    for attempt in (1, 2):
        service.scheduler.start(job.id)
        for rank in range(2):
            service.files.logs[job.id, attempt, rank] = b"begin\nloss %d of rank %d\n" % (attempt, rank)
        if attempt == 1:
            service.scheduler.end(job.id, Outcome.LOST, Reason.RANK_LOST)
    return job


def test_the_route(api, job):
    def search(**params):
        answer = api.get(f"/v1/jobs/{job.id}/logs/search", params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()

    assert search(q="loss") == {
        "matches": [
            {"attempt": 2, "rank": 0, "offset": 6, "text": "loss 2 of rank 0", "is_cut": False},
            {"attempt": 2, "rank": 1, "offset": 6, "text": "loss 2 of rank 1", "is_cut": False},
        ],
        "next_cursor": None,
    }
    assert [one["rank"] for one in search(q="loss", rank=1)["matches"]] == [1]
    assert [one["attempt"] for one in search(q="loss", attempt=1)["matches"]] == [1, 1]
    assert [one["attempt"] for one in search(q="LOSS", attempt="all", ignore_case=True)["matches"]] == [1, 1, 2, 2]
    assert [one["text"] for one in search(q="^b.*n$", regex=True)["matches"]] == ["begin", "begin"]
    assert search(q="^b.*n$")["matches"] == []
    first = search(q="loss", limit=1)
    assert [one["rank"] for one in first["matches"]] == [0]
    assert [one["rank"] for one in search(q="loss", limit=1, cursor=first["next_cursor"])["matches"]] == [1]


@pytest.mark.parametrize(
    ("params", "status", "field"),
    [
        ({}, 422, "q"),
        ({"q": ""}, 422, "q"),
        ({"q": "("}, 200, None),
        ({"q": "(", "regex": True}, 422, "q"),
        ({"q": "x" * 1001}, 422, "q"),
        ({"q": "x", "limit": 0}, 422, "limit"),
        ({"q": "x", "cursor": "bG9nczox"}, 422, None),
        ({"q": "x", "attempt": 3}, 404, None),
        ({"q": "x", "rank": 2}, 404, None),
        ({"q": "x", "attempt": "some"}, 422, None),
    ],
)
def test_bad_questions(api, job, params, status, field):
    answer = api.get(f"/v1/jobs/{job.id}/logs/search", params=params)
    assert answer.status_code == status
    if field is not None:
        assert answer.json()["errors"][0]["field"] == field


def test_a_job_that_has_not_begun_has_nothing_to_search(service, api):
    job = service.submit()
    assert api.get(f"/v1/jobs/{job.id}/logs/search", params={"q": "x"}).json() == {"matches": [], "next_cursor": None}
    assert api.get("/v1/jobs/none/logs/search", params={"q": "x"}).status_code == 404


def test_searches_leave_room_for_other_requests(service, api, job, monkeypatch):
    going_on, read = threading.Event(), service.files.read_log
    num_begun = threading.Semaphore(0)

    def wait(*arguments):
        num_begun.release()
        assert going_on.wait(10)
        return read(*arguments)

    monkeypatch.setattr(service.files, "read_log", wait)
    url = f"/v1/jobs/{job.id}/logs/search"
    threads = [threading.Thread(target=lambda: api.get(url, params={"q": "x"})) for _ in range(logs_route.MAX_SEARCHES)]
    try:
        for thread in threads:
            thread.start()
            assert num_begun.acquire(timeout=10)
        refused = api.get(url, params={"q": "x"})
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert api.get(f"/v1/jobs/{job.id}").status_code == 200
    finally:
        going_on.set()
        for thread in threads:
            thread.join(10)
    monkeypatch.undo()
    assert api.get(url, params={"q": "loss"}).status_code == 200
