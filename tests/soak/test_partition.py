"""A host that is cut off from the rest while it trains, and the network's healing.

Behind the cut an attempt may train on, and may reach run storage too: that the job goes on elsewhere, once, and that
nothing is taken from the old attempt any more, is what these tests show.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.acceptance.embedded_service import digits_job, is_alive, wait_until
from tests.multihost import QUICK_VERDICTS, MultiHostService, multihost_service
from tests.netns import Host, skip_without_namespaces

pytestmark = [pytest.mark.ray, pytest.mark.netns, pytest.mark.timeout(400)]

NUM_STEPS = 1500
CUT_AT_STEP = 45
ENVIRONMENT = QUICK_VERDICTS | {"SYNCBN_COLLECTIVE_TIMEOUT_S": "5"}
# Ray's verdict on a host, shortened, and the start of an attempt on a busy machine.
RECOVERY_S = 90.0
# Of a host's Ray once it hears that it was called dead, and of what hangs on it.
HEALED_END_S = 60.0
ORPHANS_S = 10.0
# Of two worlds only the order of float64 sums differs: 1e-16 a sum, amplified over the steps of training.
TOLERANCE = 1e-10


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MultiHostService]:
    skip_without_namespaces()
    directory = tmp_path_factory.mktemp("hosts")
    with multihost_service(directory, num_workers=2, num_cpus=2, environment=ENVIRONMENT) as service:
        yield service


@pytest.fixture(scope="module")
def undisturbed(hosts: MultiHostService) -> list[float]:
    job_id = hosts.submit(digits_job(steps=NUM_STEPS))
    assert hosts.wait_for_end(job_id, 180)["status"] == "succeeded"
    return list(hosts.series(job_id, "train/loss")["values"])


@pytest.mark.parametrize(
    "job",
    [
        pytest.param({"workers": 2}, id="the-whole-gang"),
        pytest.param({"workers": {"min": 1, "max": 2}, "resources": {"cpus_per_rank": 2}}, id="one-rank-of-two"),
    ],
)
def test_a_host_is_cut_off_and_comes_back(
    hosts: MultiHostService,
    undisturbed: list[float],
    job: dict[str, Any],
    record_property: Callable[[str, object], None],
) -> None:
    record_property(
        "owed", "one attempt commits, 0 stale writes; run again elsewhere after Ray's verdict; the rest ends"
    )
    job_id = hosts.submit(digits_job(steps=NUM_STEPS, **job))
    hosts.wait_for_step(job_id, CUT_AT_STEP)
    pids = hosts.training_pids(job_id)
    places = [hosts.host_of(pid) for pid in pids]
    cut_off = places[-1]
    is_whole = places[0] is cut_off
    behind_the_cut = [pid for pid, place in zip(pids, places, strict=True) if place is cut_off]
    hosts.network.cut(cut_off)

    wait_until(lambda: len(_attempts(hosts, job_id)) > 1, RECOVERY_S, hosts.all_logs)
    first = _attempts(hosts, job_id)[0]
    assert first["reason"] in ("node_lost", "supervisor_lost"), first
    committed = _checkpoints(hosts, job_id, attempt=1)
    wait_until(lambda: hosts.job(job_id)["status"] == "running", RECOVERY_S, hosts.all_logs)
    second_pids = hosts.training_pids(job_id, attempt=2)
    assert all(hosts.host_of(pid) is not cut_off for pid in second_pids)
    resumed_from = _attempts(hosts, job_id)[1]["resumed_from_step"]
    assert resumed_from in committed, "it goes on from what was committed"
    hosts.wait_for_step(job_id, resumed_from + 40)
    if is_whole:
        # With run storage in reach it hears of its end there, before the network heals.
        wait_until(lambda: not any(map(is_alive, pids)), HEALED_END_S, lambda: "the old attempt trains on")

    hosts.network.heal(cut_off)
    wait_until(lambda: hosts.worker_has_ended(cut_off), HEALED_END_S, hosts.all_logs)
    wait_until(lambda: not any(map(is_alive, behind_the_cut)), ORPHANS_S, lambda: "orphans on the host that came back")
    _start_again(hosts, cut_off)
    assert hosts.wait_for_end(job_id, 180)["status"] == "succeeded", hosts.job(job_id)

    events = [(event["attempt"], event["kind"]) for event in hosts.get(f"/v1/jobs/{job_id}/events")["events"]]
    after_the_first = events[events.index((2, "attempt_created")) :]
    assert [event for event in after_the_first if event[0] == 1] == [], "something of a sealed attempt was taken"
    assert _checkpoints(hosts, job_id, attempt=1) == committed
    stale = _stored(hosts, job_id, attempt=1) - committed
    # One may have been on its way into run storage when the attempt was sealed.
    assert len(stale) <= 1, stale
    series = hosts.series(job_id, "train/loss")
    assert series["steps"] == list(range(1, NUM_STEPS + 1)), "not each step exactly once"
    difference = max(abs(found - wanted) for found, wanted in zip(series["values"], undisturbed, strict=True))
    assert difference <= TOLERANCE * max(undisturbed)
    record_property(
        "seen",
        f"{len(_attempts(hosts, job_id))} attempts; resumed at step {resumed_from}; {len(stale)} stale checkpoints; "
        f"largest difference of the loss {difference:.1e}",
    )


def _attempts(service: MultiHostService, job_id: str) -> list[Any]:
    attempts: list[Any] = service.get(f"/v1/jobs/{job_id}/attempts")["attempts"]
    return attempts


def _checkpoints(service: MultiHostService, job_id: str, *, attempt: int) -> set[int]:
    """The steps of every checkpoint of an attempt that was ever committed, by its events."""
    events = service.events(job_id, "checkpoint")
    return {event["data"]["step"] for event in events if event["attempt"] == attempt}


def _stored(service: MultiHostService, job_id: str, *, attempt: int) -> set[int]:
    directory = service.data_dir / "runs" / "jobs" / job_id / "attempts" / str(attempt) / "checkpoints"
    return {int(path.name) for path in directory.iterdir()}


def _start_again(service: MultiHostService, host: Host) -> None:
    service.start_worker(host)
    wait_until(lambda: host.address in service.nodes(), 90, service.all_logs)
