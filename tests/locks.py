"""A database that another process has locked, and what is owed meanwhile and afterwards."""

import subprocess
import sys
import time

from service.domain.spec import parse_spec
from service.store.turns import LOCK_TIMEOUT_S
from tests.control_plane import ControlPlane, job_document
from tests.outages import Traffic, check_problem

# More than the threads that an API process answers on.
NUM_WRITERS = 50
# A refusal waits for the lock once, and before that for its turn to.
REFUSAL_S = 2 * LOCK_TIMEOUT_S + 2.0
# What does not wait for the lock, on a busy machine.
ANSWER_S = 2.0

_LOCK = """
import sys
from pysqlite3 import dbapi2
connection = dbapi2.connect(sys.argv[1], isolation_level=None, timeout=10)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


def lock_sqlite(plane: ControlPlane, locked_s: float) -> str:
    """Lock an SQLite database for so long under traffic, and prove what is owed; what was seen, in words."""
    plane.start_api()
    scheduler = plane.start_scheduler()
    plane.wait_for_api()
    plane.wait_for_leader(scheduler)
    running, _ = plane.store.submit(parse_spec(job_document("running", num_steps=30, labels={"step_s": "0.1"})))
    traffic = Traffic(plane, num_writers=NUM_WRITERS)
    traffic.wait_for_write()
    path = plane.database_url.removeprefix("sqlite:///")
    command = [sys.executable, "-c", _LOCK, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as locker:
        assert locker.stdout is not None
        assert locker.stdout.readline() == b"locked\n"
        traffic.forget()
        time.sleep(locked_s)  # the fault itself
        seen = traffic.seen()
        locker.kill()
    recovered_s = traffic.wait_for_write()
    traffic.stop()
    assert set(seen.writes.statuses) <= {201, 503}, seen.writes
    assert seen.writes.statuses[201] <= NUM_WRITERS, "more than what was under way when the lock was taken"
    check_problem(seen.writes.problems[503], 503, "unavailable")
    assert seen.writes.longest_s < REFUSAL_S
    for others in (seen.reads, seen.health):
        assert set(others.statuses) == {200}
        assert others.longest_s < ANSWER_S, seen
    traffic.check_nothing_lost()
    assert scheduler.poll() is None, f"the scheduler did not survive it:\n{plane.log('scheduler')}"
    plane.wait_for_end(running.id)
    plane.check_ran_once(running.id, num_steps=30)
    return (
        f"locked for {locked_s:g} s: {seen.writes.statuses[503]} writes answered 503, within "
        f"{seen.writes.longest_s:.1f} s, reads within {seen.reads.longest_s:.2f} s, "
        f"health within {seen.health.longest_s:.2f} s; "
        f"the first write {recovered_s:.1f} s afterwards; {len(traffic.acknowledged)} acknowledged, none lost"
    )
