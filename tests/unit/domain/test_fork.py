"""What may change in a fork. A failure means weights that do not load, or a change that is refused without need."""

from datetime import UTC, datetime

import pytest

from service.domain.errors import InvalidSpec, InvalidTransition
from service.domain.fork import ForkRequest, changed, incompatible, plan_fork
from service.domain.job import Checkpoint, Job, JobStatus, Reason
from service.domain.spec import parse_spec

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def _spec(**changes):
    return parse_spec(
        {
            "name": "parent",
            "model": {"factory": "builtin:mlp"},
            "dataset": {"factory": "builtin:digits"},
            "batch": {"size": 16},
            "steps": 100,
            **changes,
        }
    )


def _parent(**changes):
    return Job(
        id="job-a",
        spec=_spec(**changes),
        status=JobStatus.SUCCEEDED,
        reason=Reason.COMPLETED,
        message="",
        attempt=1,
        retries_used=0,
        step=100,
        num_steps=100,
        cancel_requested=False,
        running_s=0.0,
        failure=None,
        created_at=NOW,
        started_at=NOW,
        ended_at=NOW,
    )


def _checkpoints(*steps):
    return [
        Checkpoint(
            job_id="job-a",
            attempt=1,
            step=step,
            path=f"checkpoints/{step}",
            manifest_sha256="0" * 64,
            files=(),
            metrics={},
            created_at=NOW,
        )
        for step in steps
    ]


def _after(spec, changes):
    return parse_spec(changed(spec, changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"name": "other", "labels": {"a": "b"}, "priority": 3, "timeout_s": 5.0},
        {"batch": {"size": 32}},
        {"batch.size": 32, "batch.normalization_size": 8},
        {"optimizer.learning_rate": 0.01, "optimizer.momentum": 0.5, "gradient_clip_norm": 1.0},
        {"schedule": {"name": "step", "milestones": [50]}, "steps": 500},
        {"epochs": 3},
        {"workers": 3},
        {"workers": {"min": 1, "max": 4}},
        {"workers.max": 4},
        {"seed": 7},
        {"augmentation": [{"name": "horizontal-flip"}]},
        {"norm.kind": "frozen"},
        {"norm.kind": "local", "norm.momentum": 0.01},
        {"task": {"name": "classification", "label_smoothing": 0.1}},
        {"dataset.args.test_fraction": 0.5},
        {"checkpoint.keep_best": {"metric": "eval/loss", "mode": "min"}, "ema.decay": 0.9, "export": ["onnx"]},
        {"precision": "float32", "model": {"factory": "builtin:mlp"}},
    ],
    ids=str,
)
def test_what_leaves_the_checkpoint_loadable_may_change(changes):
    before = _spec()
    assert incompatible(before, _after(before, changes)) == []


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model": {"factory": "builtin:small-resnet"}}, "model.factory"),
        ({"model.args.hidden_sizes": [8]}, "model.args"),
        ({"dataset": {"factory": "package.module:function"}}, "dataset.factory"),
        ({"task": "regression"}, "task.name"),
        ({"task": {"factory": "package.module:function"}}, "task.name"),
        ({"train_function": "package.module:function"}, "train_function"),
        ({"norm.kind": "group"}, "norm.kind"),
        ({"norm.kind": "none"}, "norm.kind"),
        ({"optimizer": {"name": "adamw"}}, "optimizer.name"),
        ({"optimizer.decay_norm_and_bias": True}, "optimizer.decay_norm_and_bias"),
        ({"precision": "float64"}, "precision"),
    ],
    ids=str,
)
def test_what_the_checkpoint_would_not_fit_is_refused_with_its_reason(changes, field):
    before = _spec()
    (problem,) = incompatible(before, _after(before, changes))
    assert problem.field == field
    assert "cannot change in a fork: " in problem.message
    # And the way back is refused alike.
    assert [found.field for found in incompatible(_after(before, changes), before)] == [field]


def test_changes_are_nested_or_dotted_and_name_only_what_they_change():
    before = _spec(optimizer={"name": "sgd", "momentum": 0.8}, labels={"a": "1"})
    after = _after(before, {"optimizer": {"learning_rate": 0.5}, "labels.team.x": "2"})
    assert (after.optimizer.learning_rate, after.optimizer.momentum) == (0.5, 0.8)
    assert after.labels == {"a": "1", "team.x": "2"}
    # Another kind of thing takes the place of all fields, which would not fit it.
    assert _after(before, {"schedule": {"name": "constant"}}).schedule.name == "constant"
    assert _after(before, {"optimizer.name": "adamw"}).optimizer.weight_decay == 0.01


def test_a_name_among_arguments_or_labels_is_one_of_them_and_no_kind():
    before = _spec(
        dataset={"factory": "package.module:data", "args": {"name": "train", "count": 3}},
        labels={"name": "a", "team": "x"},
    )
    after = _after(before, {"dataset.args.name": "val", "labels.name": "b"})
    assert after.dataset.args == {"name": "val", "count": 3}
    assert after.labels == {"name": "b", "team": "x"}


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule.milestones": [50], "schedule.name": "step"},
        {"schedule.name": "step", "schedule.milestones": [50]},
        {"schedule.name": "step", "schedule": {"milestones": [50]}},
        {"schedule": {"milestones": [50]}, "schedule.name": "step"},
    ],
    ids=str,
)
def test_the_order_of_changes_does_not_matter(changes):
    schedule = _after(_spec(schedule={"name": "cosine", "warmup_steps": 3}), changes).schedule
    assert (schedule.name, schedule.milestones, schedule.warmup_steps) == ("step", (50,), 0)
    assert all(not isinstance(value, dict) or value == {"milestones": [50]} for value in changes.values())


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"optimizer": {"learning_rate": 0.1}, "optimizer.learning_rate": 0.1}, "optimizer.learning_rate"),
        ({"workers.max": 4, "workers": 3}, "workers"),
        ({"ema": None, "ema.decay": 0.9}, "ema"),
    ],
    ids=str,
)
def test_a_field_that_is_given_twice_is_refused(changes, field):
    with pytest.raises(InvalidSpec) as caught:
        changed(_spec(), changes)
    assert [problem.field for problem in caught.value.problems] == [field]


def test_steps_and_epochs_replace_each_other():
    assert _after(_spec(), {"epochs": 2}).steps is None
    assert _after(_spec(steps=None, epochs=2), {"steps": 9}).epochs is None
    with pytest.raises(InvalidSpec, match="either steps or epochs"):
        _after(_spec(), {"epochs": 2, "steps": 3})


def test_a_fork_begins_at_the_latest_checkpoint_or_the_one_that_is_named():
    for step, expected in ((None, 20), (10, 10)):
        spec, checkpoint = plan_fork(_parent(), _checkpoints(10, 20), ForkRequest(step=step))
        assert checkpoint.step == expected
        assert spec == _spec()


def test_a_step_without_a_checkpoint_is_refused_with_those_there_are():
    with pytest.raises(InvalidSpec, match=r"step: there is no checkpoint of step 15\. There are those of 10, 20"):
        plan_fork(_parent(), _checkpoints(10, 20), ForkRequest(step=15))
    with pytest.raises(InvalidTransition, match="no checkpoint yet"):
        plan_fork(_parent(), [], ForkRequest())


@pytest.mark.parametrize(("changes", "field"), [({}, "steps"), ({"steps": 99}, "steps"), ({"epochs": 1}, "epochs")])
def test_a_fork_that_would_have_nothing_to_do_is_refused(changes, field):
    with pytest.raises(InvalidSpec) as caught:
        plan_fork(_parent(), _checkpoints(100), ForkRequest(changes=changes))
    assert [problem.field for problem in caught.value.problems] == [field]
    plan_fork(_parent(), _checkpoints(100), ForkRequest(changes={"steps": 101}))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"batch.sise": 32}, "batch.sise"),
        ({"optimizer.learning_rate": -1}, "optimizer.learning_rate"),
        ({"workers": 0}, "workers"),
        ({"name.of.it": "x"}, "name"),
    ],
)
def test_a_change_that_no_job_could_have_is_named_as_the_user_wrote_it(changes, field):
    with pytest.raises(InvalidSpec) as caught:
        plan_fork(_parent(), _checkpoints(10), ForkRequest(changes=changes))
    assert [problem.field for problem in caught.value.problems] == [field]


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(InvalidSpec) as caught:
        plan_fork(_parent(), _checkpoints(100), ForkRequest(changes={"precision": "float64", "norm.kind": "none"}))
    assert [problem.field for problem in caught.value.problems] == ["norm.kind", "precision", "steps"]
