"""Another process holds SQLite's write lock. A failure: requests hang, reads stop, or the service stays away."""

from tests.control_plane import control_plane
from tests.locks import lock_sqlite

LOCKED_S = 7.0  # longer than a transaction waits


def test_while_the_database_is_locked_writes_are_refused_in_time_and_all_else_goes_on(tmp_path):
    with control_plane(tmp_path / "plane") as plane:
        lock_sqlite(plane, LOCKED_S)
