"""`kill -9` of the API while clients submit. A failure: an acknowledged job is lost, or a repeated request doubled."""

from tests.control_plane import Submitters, control_plane

NUM_JOBS = 300
KILL_AFTER = (60, 150)


def test_kill_minus_9_of_the_api_loses_and_doubles_nothing(tmp_path):
    with control_plane(tmp_path / "plane") as plane:
        api = plane.start_api()
        plane.wait_for_api()
        submitters = Submitters(plane, NUM_JOBS)
        api = submitters.kill_api(api, KILL_AFTER)
        submitters.wait()
        submitters.check_all_there_once()
        assert submitters.broken, "no request was cut off, so the kills proved nothing"
