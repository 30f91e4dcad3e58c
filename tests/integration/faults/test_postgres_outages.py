"""PostgreSQL is locked, drops connections, restarts. A failure: requests hang, jobs are lost, or nothing comes back."""

import pytest

from tests.control_plane import control_plane
from tests.postgres_outages import disturb
from tests.postgres_server import postgres_server

pytestmark = pytest.mark.postgres


def test_what_postgresql_does_to_the_service_passes(tmp_path):
    with postgres_server() as server, control_plane(tmp_path / "plane", server.url) as plane:
        disturb(plane, server, locked_s=6.0, num_restarts=1)
