"""PostgreSQL is locked for half a minute and restarted ten times, every other time as if by `kill -9`."""

import pytest

from tests.control_plane import Submitters, control_plane
from tests.outages import RECOVERY_S
from tests.postgres_outages import disturb
from tests.postgres_server import postgres_server

pytestmark = pytest.mark.postgres


def test_postgresql_is_locked_and_restarted(tmp_path, record_property):
    record_property("owed", f"503 with Retry-After, recovery ≤ {RECOVERY_S:g} s, nothing acknowledged lost")
    with postgres_server() as server, control_plane(tmp_path / "plane", server.url) as plane:
        record_property("seen", disturb(plane, server, locked_s=30.0, num_restarts=10))


def test_the_api_is_killed_amid_submissions_to_postgresql(tmp_path, record_property):
    record_property("owed", "0 lost, 0 doubled")
    with postgres_server() as server, control_plane(tmp_path / "plane", server.url) as plane:
        api = plane.start_api()
        plane.wait_for_api()
        submitters = Submitters(plane, 500)
        submitters.kill_api(api, range(20, 480, 23))
        submitters.wait()
        submitters.check_all_there_once()
        record_property("seen", f"500 acknowledged and there once, {submitters.broken} requests cut off and repeated")
