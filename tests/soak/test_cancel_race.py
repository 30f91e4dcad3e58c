"""A thousand jobs that are cancelled as they succeed, on each kind of database."""

import pytest

from service.domain.job import JobStatus
from service.store import migrate
from tests.cancel_race import race
from tests.contract.store_databases import KINDS, postgres_schema, sqlite_url

NUM_ROUNDS = 1000


@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_cancels_meet_a_success(tmp_path, record_property, kind):
    record_property("owed", f"one terminal state and consistent events, {NUM_ROUNDS} times")
    if kind == "sqlite":
        url = sqlite_url(tmp_path / "service.sqlite")
        migrate(url)
        became = race(url, NUM_ROUNDS)
    else:
        with postgres_schema() as url:
            migrate(url)
            became = race(url, NUM_ROUNDS)
    record_property("seen", ", ".join(f"{number} {status}" for status, number in sorted(became.items())))
    assert sum(became.values()) == NUM_ROUNDS
    assert set(became) == {JobStatus.SUCCEEDED, JobStatus.CANCELLED}, "one side won every time: nothing was raced"
