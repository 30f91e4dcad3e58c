"""When a job starts, told ahead. A failure means a dry run that promises what the scheduler does not do."""

from service.domain.scheduling.foretelling import foretell
from tests.unit.domain.scheduling.examples import make_active, make_node, make_pending, names

NODES = [make_node("n", 2)]


def test_a_job_that_fits_starts_now():
    decision, starts_in_s = foretell("a", [make_pending("a")], [], NODES)
    assert (names(decision), starts_in_s) == (["a"], 0.0)


def test_a_job_waits_for_those_that_run_and_those_ahead_of_it():
    active = [make_active("running", "n", "n", remaining_s=60.0)]
    pending = [make_pending("first", workers=2, duration_s=100.0), make_pending("second", workers=2)]
    decision, starts_in_s = foretell("second", pending, active, NODES)
    assert starts_in_s == 160.0
    assert [wait.position for wait in decision.waits] == [1, 2]
    assert foretell("first", pending, active, NODES)[1] == 60.0


def test_nothing_is_told_that_nobody_knows():
    active = [make_active("running", "n", "n")]
    assert foretell("a", [make_pending("a")], active, NODES)[1] is None
    active = [make_active("running", "n", "n", remaining_s=60.0)]
    assert foretell("b", [make_pending("a", workers=2), make_pending("b")], active, NODES)[1] is None
    assert foretell("a", [make_pending("a", workers=9)], active, NODES)[1] is None


def test_an_urgent_job_starts_when_its_victim_has_stopped():
    active = [make_active("running", "n", "n", preemptions_left=1, remaining_s=1e6)]
    decision, starts_in_s = foretell("urgent", [make_pending("urgent", priority=1)], active, NODES)
    assert [preemption.job_id for preemption in decision.preemptions] == ["running"]
    assert starts_in_s == 60.0


def test_a_victim_waits_again_and_goes_on():
    active = [make_active("victim", "n", preemptions_left=1, remaining_s=500.0)]
    pending = [make_pending("urgent", workers=2, priority=1, duration_s=100.0), make_pending("last", workers=2)]
    assert foretell("last", pending, active, NODES)[1] == 60.0 + 100.0 + 500.0


def test_one_that_was_stopped_for_another_waits_again():
    victim = make_active("victim", "n", "n", is_stopping=True, remaining_s=10.0)
    again = [make_pending("victim", workers=2, duration_s=500.0, sequence=0)]
    pending = [make_pending("urgent", workers=2, priority=1, duration_s=100.0), make_pending("a")]
    assert foretell("a", pending, [victim], NODES, going_on=again)[1] == 10.0 + 100.0 + 500.0
    assert foretell("a", pending, [victim], NODES)[1] == 10.0 + 100.0


def test_one_that_is_resized_goes_on_where_it_is_to():
    elastic = make_active("elastic", "n", workers=(1, 2), next_node_ids=("n", "n"), remaining_s=10.0)
    assert foretell("a", [make_pending("a")], [elastic], NODES)[1] is None
    rest = [make_pending("elastic", workers=(1, 2), duration_s=500.0)]
    assert foretell("a", [make_pending("a")], [elastic], NODES, going_on=rest)[1] == 510.0
