"""Databases that are locked for half a minute, or whose disk fills up again and again."""

from tests.control_plane import control_plane
from tests.full_disk import fill_up
from tests.locks import lock_sqlite
from tests.outages import RECOVERY_S


def test_sqlite_is_locked_for_half_a_minute(tmp_path, record_property):
    record_property("owed", f"503 with Retry-After, recovery ≤ {RECOVERY_S:g} s, nothing acknowledged lost")
    with control_plane(tmp_path / "plane") as plane:
        record_property("seen", lock_sqlite(plane, 30.0))


def test_the_disk_fills_up_five_times(tmp_path, record_property):
    record_property("owed", f"reads go on, 507 says what to do, nothing torn, recovery ≤ {RECOVERY_S:g} s")
    for number in range(5):
        seen = fill_up(tmp_path / str(number))
    record_property("seen", seen)
