"""PostgreSQL locks tables, drops connections and is restarted under traffic; what is owed meanwhile and afterwards."""

import time

import sqlalchemy as sa

from service.domain.spec import parse_spec
from service.store.engine import create_engine
from tests.control_plane import ControlPlane, job_document, wait_until
from tests.locks import REFUSAL_S
from tests.outages import Traffic, check_problem
from tests.postgres_server import PostgresServer

NUM_STEPS = 80


def disturb(plane: ControlPlane, server: PostgresServer, *, locked_s: float, num_restarts: int) -> str:
    """Do all of it, and prove what is owed; what was seen, in words."""
    plane.start_api()
    scheduler = plane.start_scheduler()
    plane.wait_for_api()
    plane.wait_for_leader(scheduler)
    job = parse_spec(job_document("running", num_steps=NUM_STEPS, labels={"step_s": "0.1"}))
    running, _ = plane.store.submit(job)
    traffic = Traffic(plane, num_writers=8)
    traffic.wait_for_write()
    engine = create_engine(server.url)
    told = []

    with engine.begin() as connection:
        connection.execute(sa.text("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE"))
        traffic.forget()
        # The fault itself; with statements, or the server would end a transaction that rests.
        until = time.monotonic() + locked_s
        while time.monotonic() < until:
            connection.execute(sa.text("SELECT pg_sleep(0.5)"))
        seen = traffic.seen()
    recovered_s = traffic.wait_for_write()
    check_problem(seen.writes.problems[503], 503, "unavailable")
    assert max(seen.writes.longest_s, seen.reads.longest_s) < REFUSAL_S
    assert set(seen.health.statuses) == {200}
    told.append(
        f"table locked {locked_s:g} s: 503 within {seen.writes.longest_s:.1f} s, back after {recovered_s:.1f} s"
    )

    with engine.begin() as connection:
        ended = connection.execute(
            sa.text("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
        ).scalar_one()
    recovered_s = traffic.wait_for_write()
    assert ended
    told.append(f"{ended} connections ended: back after {recovered_s:.1f} s")
    engine.dispose()

    for number in range(num_restarts):
        mode = ("immediate", "fast")[number % 2]
        traffic.forget()
        server.stop(mode)
        wait_until(lambda: 503 in traffic.seen().writes.statuses, 30.0, plane.logs)
        server.start()
        recovered_s = traffic.wait_for_write()
        seen = traffic.seen()
        check_problem(seen.writes.problems[503], 503, "unavailable")
        assert set(seen.writes.statuses) <= {201, 503}, seen.writes
        assert set(seen.health.statuses) == {200}
        told.append(f"restarted ({mode}): back after {recovered_s:.1f} s")

    traffic.stop()
    traffic.check_nothing_lost()
    assert scheduler.poll() is None, f"the scheduler did not survive it:\n{plane.log('scheduler')}"
    plane.wait_for_end(running.id, 60.0)
    plane.check_ran_once(running.id, num_steps=NUM_STEPS)
    return f"{'; '.join(told)}; {len(traffic.acknowledged)} acknowledged, none lost or doubled"
