"""The API dies twenty times amid five hundred submissions."""

from itertools import pairwise

from tests.control_plane import Submitters, control_plane

NUM_JOBS = 500
NUM_KILLS = 20


def test_kill_minus_9_of_the_api(tmp_path, record_property):
    record_property("owed", "0 lost, 0 doubled")
    with control_plane(tmp_path / "plane") as plane:
        api = plane.start_api()
        plane.wait_for_api()
        submitters = Submitters(plane, NUM_JOBS)
        api = submitters.kill_api(api, range(20, 480, 23))
        submitters.wait()
        submitters.check_all_there_once()
        assert submitters.broken >= NUM_KILLS, "requests were hardly cut off"
        longest_s = max(later - earlier for earlier, later in pairwise(sorted(submitters.answered_at)))
    record_property(
        "seen",
        f"{NUM_JOBS} acknowledged and there once, {submitters.broken} requests cut off and repeated; "
        f"longest time without an answer {longest_s:.1f} s",
    )


def test_kill_minus_9_of_the_api_again_and_again(tmp_path, record_property):
    record_property("owed", "0 lost, 0 doubled, twenty times")
    broken = 0
    with control_plane(tmp_path / "plane") as plane:
        api = plane.start_api()
        for _ in range(NUM_KILLS):
            plane.wait_for_api()
            submitters = Submitters(plane, NUM_JOBS)
            api = submitters.kill_api(api, [NUM_JOBS // 2])
            submitters.wait()
            submitters.check_all_there_once()
            broken += submitters.broken
    record_property("seen", f"{NUM_KILLS * NUM_JOBS} acknowledged and there once; {broken} requests cut off")
