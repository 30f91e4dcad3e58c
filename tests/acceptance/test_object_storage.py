"""The whole service with its run storage on S3. A failure means that something still takes run storage for a directory.

Where `tests/unit/storage` passes on S3, look at who holds credentials, and at what reads files by local paths.
"""

import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.embedded_service import EmbeddedServiceProcess, digits_job
from tests.s3 import S3Server

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

NUM_STEPS = 120
KILL_AT_STEP = 45


@pytest.fixture(scope="module")
def s3_service(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServiceProcess]:
    s3_server.make_bucket("service")
    environment = {**s3_server.environment, "SYNCBN_STORAGE_URL": "s3://service/runs"}
    running = EmbeddedServiceProcess(tmp_path_factory.mktemp("s3") / "data", environment=environment)
    yield running
    assert running.stop() == 0


def test_a_job_trains_resumes_and_is_downloaded(s3_service: EmbeddedServiceProcess, s3_server: S3Server) -> None:
    service = s3_service
    job_id = service.submit(digits_job(steps=NUM_STEPS, checkpoint={"every_steps": 20, "keep_last": 10}))
    service.wait_for_step(job_id, KILL_AT_STEP)
    victim = service.training_pids(job_id)[1]
    environment = Path(f"/proc/{victim}/environ").read_bytes()
    assert b"AWS_" not in environment, "a training process holds credentials of storage"
    os.kill(victim, signal.SIGKILL)
    assert service.wait_for_end(job_id)["status"] == "succeeded", service.all_logs()

    attempts = service.get(f"/v1/jobs/{job_id}/attempts")["attempts"]
    assert [attempt["reason"] for attempt in attempts] == ["rank_lost", "completed"]
    assert attempts[1]["resumed_from_step"] >= 20, "more than a checkpoint interval was lost"
    assert service.series(job_id, "train/loss")["steps"] == list(range(1, NUM_STEPS + 1))

    keys = _keys(s3_server, f"runs/jobs/{job_id}/")
    for part in ("attempts/1/launched", "attempts/2/journal/", "attempts/2/logs/rank-1/", "attempts/2/checkpoints/"):
        assert any(part in key for key in keys), f"nothing of {part}: {keys}"
    assert not (service.data_dir / "runs").exists()
    log = service.http.get(f"/v1/jobs/{job_id}/logs", params={"rank": 0, "attempt": 2})
    assert log.status_code == 200, log.text
    assert "steps" in log.text

    # What is downloaded is what was written, on every way to it.
    checkpoints = service.get(f"/v1/jobs/{job_id}/checkpoints")["checkpoints"]
    last = max(checkpoints, key=lambda checkpoint: checkpoint["step"])
    assert last["step"] == NUM_STEPS
    for file in last["files"]:
        url = f"/v1/jobs/{job_id}/checkpoints/{NUM_STEPS}/files/{file['name']}"
        content = service.http.get(url).content
        assert hashlib.sha256(content).hexdigest() == file["sha256"], file["name"]
        stored = s3_server.client().get_object(Bucket="service", Key=f"runs/{last['path']}/{file['name']}")
        assert stored["Body"].read() == content
        part = service.http.get(url, headers={"Range": "bytes=3-10"})
        assert (part.status_code, part.content) == (206, content[3:11])

    # The same job where nobody died and nothing was fetched: the same weights to the last bit.
    undisturbed = service.submit(digits_job(steps=NUM_STEPS, checkpoint={"every_steps": 20}))
    assert service.wait_for_end(undisturbed)["status"] == "succeeded"
    found, expected = (
        service.http.get(f"/v1/jobs/{one}/checkpoints/{NUM_STEPS}/files/model.safetensors").content
        for one in (job_id, undisturbed)
    )
    assert found == expected


def _keys(s3_server: S3Server, prefix: str) -> list[str]:
    pages = s3_server.client().get_paginator("list_objects_v2").paginate(Bucket="service", Prefix=prefix)
    return [entry["Key"] for page in pages for entry in page.get("Contents", [])]
