"""The policy over simulated days. A failure means that a promise breaks where many things come together."""

import pytest

from benchmarks.scheduler_simulation import LOWEST_UTILISATION, shares_of
from benchmarks.scheduling.invariants import Broken, Invariants
from benchmarks.scheduling.simulation import Simulation
from benchmarks.scheduling.workload import Load

DAY_S = 86400.0


@pytest.mark.parametrize("estimates", ["exact", "rough", "none"])
def test_every_promise_holds_at_every_step(estimates):
    load = Load(num_jobs=200, num_gpus=64, duration_s=DAY_S / 2, estimates=estimates, urgent=0.1, elastic=0.3)
    simulation = Simulation(load, failures_per_node_week=3.0, interval_s=30.0, watch=Invariants())
    outcome = simulation.run()
    assert outcome.num_finished == load.num_jobs, "nobody waits for ever"
    assert min(outcome.num_preempted, outcome.num_resized, outcome.num_lost) > 0, "the load shows nothing"


def test_with_exact_estimates_a_promised_start_is_kept_to_the_second():
    invariants = Invariants(is_exact=True)
    load = Load(num_jobs=250, num_gpus=64, duration_s=DAY_S / 2, estimates="exact", urgent=0.0, elastic=0.0)
    simulation = Simulation(load, failures_per_node_week=0.0, interval_s=0.0, watch=invariants)
    assert simulation.run().num_finished == load.num_jobs
    assert len(invariants.late_s) > 20, "the load shows nothing"


def test_queues_share_by_weight_and_little_lies_idle_while_they_all_have_work():
    load = Load(num_jobs=400, num_gpus=64, duration_s=DAY_S, load=2.0, backlog=1.0, seed=1)
    simulation = Simulation(load, interval_s=30.0)
    outcome = simulation.run(until_s=load.duration_s)
    assert outcome.available_gpu_s > 0.5 * 64 * DAY_S, "the load shows nothing"
    assert sum(outcome.gpu_s.values()) / outcome.available_gpu_s >= LOWEST_UTILISATION
    # On 64 GPUs one job of 16 is a quarter of the cluster, and two and a half times the share of the last queue.
    assert all(share == pytest.approx(1.0, abs=0.15) for share in shares_of(simulation, outcome).values())


def test_the_invariants_notice_what_they_are_for():
    def break_rooms(simulation, step):
        for start in step.decision.starts:
            object.__setattr__(start, "node_ids", start.node_ids[:1] * 9)
        Invariants()(simulation, step)

    with pytest.raises(Broken, match=r"whole|over-committed"):
        Simulation(Load(num_jobs=20, num_gpus=16, duration_s=DAY_S), watch=break_rooms).run()
