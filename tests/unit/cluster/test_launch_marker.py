"""Who owns an attempt. A failure means two supervisors of one attempt, or one that nobody finds again."""

import pytest

from service.cluster.launch_marker import read_launch_marker, take_launch_marker
from service.storage.object_store import ObjectStore


@pytest.fixture
def store(tmp_path):
    return ObjectStore(str(tmp_path))


def test_the_marker_names_the_one_that_took_it(store):
    assert read_launch_marker(store, "job", 1) is None
    assert take_launch_marker(store, "job", 1, "supervisor/one")
    assert not take_launch_marker(store, "job", 1, "supervisor/two")
    assert read_launch_marker(store, "job", 1) == "supervisor/one"
    assert read_launch_marker(store, "job", 2) is None


def test_a_supervisor_does_not_take_an_attempt_again_that_it_had(store):
    assert take_launch_marker(store, "job", 1, "supervisor/one")
    assert not take_launch_marker(store, "job", 1, "supervisor/one")


def test_one_whose_answer_was_lost_has_it_all_the_same(store, monkeypatch):
    create = store.create_exclusively

    def lose_the_first_answer(path, data):
        create(path, data)
        return create(path, data)  # as a client does that tries again by itself

    monkeypatch.setattr(store, "create_exclusively", lose_the_first_answer)
    assert take_launch_marker(store, "job", 1, "supervisor/one")
    assert not take_launch_marker(store, "job", 1, "supervisor/two")
