"""Which checkpoints are kept, against a slow truth. A failure means one removed that is needed, or disks that fill."""

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from service.domain.job import Checkpoint
from service.domain.keeping import to_remove
from service.domain.spec import CheckpointSpec, KeepBestSpec

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def _checkpoint(step, *, attempt=1, **metrics):
    return Checkpoint(
        job_id="job-a",
        attempt=attempt,
        step=step,
        path=f"checkpoints/{step}",
        manifest_sha256="0" * 64,
        files=(),
        metrics={name.replace("_", "/", 1): value for name, value in metrics.items()},
        created_at=NOW,
    )


def _removed(checkpoints, **policy):
    return [one.step for one in to_remove(checkpoints, CheckpointSpec.model_validate(policy))]


def test_the_newest_are_kept_in_whatever_order_they_come():
    checkpoints = [_checkpoint(step) for step in (30, 10, 40, 20)]
    assert _removed(checkpoints, keep_last=2) == [10, 20]
    assert _removed(checkpoints, keep_last=4) == []
    assert _removed([], keep_last=1) == []


def test_the_best_are_kept_beside_the_newest():
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: 5.0}
    checkpoints = [_checkpoint(step, eval_loss=loss) for step, loss in losses.items()]
    best = {"metric": "eval/loss", "mode": "min", "count": 2}
    assert _removed(checkpoints, keep_last=1, keep_best=best) == [10]
    assert _removed(checkpoints, keep_last=1, keep_best={**best, "mode": "max"}) == [20, 30]


def test_one_that_was_not_measured_is_not_among_the_best():
    checkpoints = [_checkpoint(10, eval_loss=9.0), _checkpoint(20), _checkpoint(30)]
    best = {"metric": "eval/loss", "mode": "min", "count": 2}
    assert _removed(checkpoints, keep_last=1, keep_best=best) == [20]
    assert _removed(checkpoints, keep_last=1, keep_best={**best, "metric": "eval/accuracy"}) == [10, 20]


def test_of_equal_ones_the_earliest_stays():
    checkpoints = [_checkpoint(step, eval_loss=1.0) for step in (10, 20, 30)]
    assert _removed(checkpoints, keep_last=1, keep_best={"metric": "eval/loss", "mode": "min"}) == [20]


def test_every_so_manieth_is_kept():
    checkpoints = [_checkpoint(step) for step in range(10, 101, 10)]
    assert _removed(checkpoints, keep_last=1, keep_every_steps=40) == [10, 20, 30, 50, 60, 70, 90]


@given(
    steps=st.sets(st.integers(1, 60), max_size=20),
    values=st.dictionaries(st.integers(1, 60), st.integers(-3, 3).map(float)),
    keep_last=st.integers(1, 5),
    keep_every=st.none() | st.integers(1, 20),
    best=st.none() | st.tuples(st.sampled_from(["min", "max"]), st.integers(1, 4)),
)
def test_a_checkpoint_goes_if_and_only_if_no_rule_keeps_it(steps, values, keep_last, keep_every, best):
    checkpoints = [_checkpoint(step, **({"eval_loss": values[step]} if step in values else {})) for step in steps]
    keep_best = None if best is None else KeepBestSpec(metric="eval/loss", mode=best[0], count=best[1])
    policy = CheckpointSpec(keep_last=keep_last, keep_best=keep_best, keep_every_steps=keep_every)
    removed = {one.step for one in to_remove(checkpoints, policy)}

    def is_kept(step):
        if sum(other > step for other in steps) < keep_last:
            return True
        if keep_every is not None and step % keep_every == 0:
            return True
        if best is None or step not in values:
            return False
        sign = 1 if best[0] == "min" else -1
        measured = [other for other in steps if other in values]
        return sum((sign * values[other], other) < (sign * values[step], step) for other in measured) < best[1]

    assert removed == {step for step in steps if not is_kept(step)}
