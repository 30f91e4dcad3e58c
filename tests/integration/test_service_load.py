"""A little of the load that ``benchmarks.service_load`` puts on the API and the database, with its checks.

A failure is a job, a point or an event that is lost or doubled under load, or something that has become slower by a
large factor: the bounds are a twentieth of what two busy cores do.
"""

import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.service_load import TOKEN, Api, Size, database, measure_curve, measure_ingest, measure_streams
from service.store import SqlStore
from tests.contract.store_databases import KINDS
from tests.fakes import spec_data

SMALL = Size(rounds=1, seconds=1, points=20_000, streams=40, requests=3)
NUM_CLIENTS = 16
SUBMITS_PER_CLIENT = 20


@pytest.fixture(params=KINDS)
def url(request, tmp_path):
    with database(request.param, tmp_path) as url:
        yield url


def test_submits_at_once_are_all_kept(url, tmp_path):
    api = Api(url, tmp_path)

    def submit(client):
        connection = http.client.HTTPConnection("127.0.0.1", api.port, timeout=30)
        answers = []
        for number in range(SUBMITS_PER_CLIENT):
            headers = {"Authorization": f"Bearer {TOKEN}", "Idempotency-Key": f"{client}-{number}"}
            for _ in range(2):  # as a client does that did not see the answer
                connection.request("POST", "/v1/jobs", json.dumps(spec_data(seed=number)), headers)
                answer = connection.getresponse()
                answers.append((json.loads(answer.read())["id"], answer.headers.get("Idempotent-Replayed")))
                assert answer.status == 201
        connection.close()
        return answers

    try:
        started = time.monotonic()
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            answers = list(pool.map(submit, range(NUM_CLIENTS)))
        rate = 2 * NUM_CLIENTS * SUBMITS_PER_CLIENT / (time.monotonic() - started)
    finally:
        api.stop()
    for of_client in answers:
        for first, again in zip(of_client[::2], of_client[1::2], strict=True):
            assert first == (again[0], None)
            assert again[1] == "true"
    ids = {job_id for of_client in answers for job_id, _ in of_client}
    assert len(ids) == NUM_CLIENTS * SUBMITS_PER_CLIENT
    store = SqlStore(url)
    jobs = store.list_jobs(limit=500).jobs
    store.close()
    assert {job.id for job in jobs} == ids
    assert len(jobs) == len(ids)
    assert rate > 50


def test_points_are_taken_in_and_rolled_up(url, tmp_path):
    (rate,) = measure_ingest(url, tmp_path, SMALL)
    assert rate.values[0] > 2500


def test_a_long_curve_is_read_from_its_roll_ups(url, tmp_path):
    for figure in measure_curve(url, tmp_path, SMALL):
        assert max(figure.values) < 2000


def test_streams_lose_nothing_while_they_break_off_and_come_back(url, tmp_path):
    figures = list(measure_streams(url, tmp_path, SMALL))
    assert figures[0].values == (0.0,)
