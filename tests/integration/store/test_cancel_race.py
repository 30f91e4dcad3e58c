"""A cancel that meets a success. A failure: a job ended twice, or its events tell another story than its status."""

from tests.cancel_race import race

NUM_ROUNDS = 30


def test_a_cancel_and_a_success_that_meet_end_a_job_once(database_url):
    became = race(database_url, NUM_ROUNDS)
    assert sum(became.values()) == NUM_ROUNDS
    assert len(became) == 2, f"one side won every time, so nothing was raced: {became}"
