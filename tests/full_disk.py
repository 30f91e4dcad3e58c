"""A control plane whose database lies on a disk that fills up, and what is owed until there is room again."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from service.domain.spec import parse_spec
from tests.control_plane import ControlPlane, control_plane, job_document, wait_until
from tests.outages import RECOVERY_S, Traffic, check_problem
from tests.small_disk import small_disk

# The database and its write-ahead log come to less; what others wrote before fills the rest.
ROOM_BYTES = 6 << 20


def fill_up(directory: Path) -> str:
    """Fill the disk of a database under traffic, make room, and prove what is owed; what was seen, in words."""
    with _plane_on_small_disk(directory) as (plane, disk):
        plane.start_api()
        scheduler = plane.start_scheduler()
        plane.wait_for_api()
        plane.wait_for_leader(scheduler)
        running, _ = plane.store.submit(parse_spec(job_document("running", num_steps=30, labels={"step_s": "0.1"})))
        traffic = Traffic(plane, num_writers=4)
        traffic.wait_for_write()
        _fill(disk / "ballast")
        wait_until(lambda: 507 in traffic.seen().writes.statuses, 30.0, lambda: f"never full:\n{plane.logs()}")
        traffic.forget()
        wait_until(lambda: traffic.seen().writes.statuses[507] >= 8, 30.0, lambda: f"{traffic.seen()}\n{plane.logs()}")
        seen = traffic.seen()
        (disk / "ballast").unlink()
        recovered_s = traffic.wait_for_write(RECOVERY_S)
        traffic.stop()
        assert set(seen.reads.statuses) == {200}
        assert set(seen.health.statuses) == {200}
        check_problem(seen.writes.problems[507], 507, "disk-full")
        assert "Make room" in seen.writes.problems[507].body
        traffic.check_nothing_lost()
        assert scheduler.poll() is None, f"the scheduler did not survive it:\n{plane.log('scheduler')}"
        plane.wait_for_end(running.id)
        plane.check_ran_once(running.id, num_steps=30)
        with plane.store._database.reading() as connection:
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar_one() == "ok"
        # A new process finds a whole database too.
        with plane.client() as http:
            plane.start_api()
            assert http.get("/v1/jobs").status_code == httpx.codes.OK
        return (
            f"{seen.writes.statuses[507]} writes answered 507, {seen.reads.statuses[200]} reads 200; the first write "
            f"{recovered_s:.1f} s after there was room; {len(traffic.acknowledged)} acknowledged, none lost, none torn"
        )


@contextmanager
def _plane_on_small_disk(directory: Path) -> Iterator[tuple[ControlPlane, Path]]:
    directory.mkdir(exist_ok=True)
    with small_disk(directory / "disk", ROOM_BYTES) as disk:
        if not os.path.ismount(disk):
            pytest.skip("this process may not mount a file system of its own, which fills up as a disk does")
        with control_plane(directory / "plane", f"sqlite:///{disk / 'service.sqlite'}") as plane:
            yield plane, disk


def _fill(path: Path) -> None:
    """Write until there is no room for another page."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
