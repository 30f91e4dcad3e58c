"""The job specification alone. A failure means that a user's file is misread, or refused without saying how to mend it.

Every refusal names the field by the path that a person wrote, and its remedy is applied here to prove that it works.
"""

import json
import math
import re
import subprocess
import sys
from copy import deepcopy
from itertools import permutations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from service.domain import catalog
from service.domain.errors import FieldProblem, InvalidSpec
from service.domain.spec import JobSpec, parse_spec

MINIMAL = {
    "name": "digits",
    "model": {"factory": "builtin:mlp"},
    "dataset": {"factory": "builtin:digits"},
    "batch": {"size": 16},
    "steps": 10,
}

FULL = {
    "name": "Every field 1.0_x-y",
    "labels": {"team/vision": "näive ✓", "a": ""},
    "task": "classification",
    "model": {"factory": "builtin:small-resnet", "args": {"width": 8, "blocks_per_stage": [1, 2, 1]}},
    "dataset": {"factory": "builtin:digits", "args": {"test_fraction": 0.25, "split_seed": 3}},
    "optimizer": {"name": "adamw", "learning_rate": 0.1 + 0.2, "betas": [0.8, 0.99], "eps": 1e-6, "weight_decay": 0.0},
    "schedule": {"name": "constant", "warmup_steps": 3, "final_fraction": 0.5},
    "batch": {"size": 24, "normalization_size": 12, "max_per_rank": 4},
    "workers": 3,
    "epochs": 2,
    "seed": 2**63 - 1,
    "norm": {"kind": "local", "momentum": 0.01, "eps": 1e-3, "skip_nonfinite": False},
    "precision": "bfloat16",
    "gradient_clip_norm": 1.5,
    "resources": {"cpus_per_rank": 0.5, "gpus_per_rank": 1, "memory_bytes_per_rank": 2**30},
    "checkpoint": {"every_steps": 7, "keep_last": 1},
    "evaluation": {"every_steps": 9, "batch_size": 11},
    "retry": {"budget": 0},
    "timeout_s": 3600.5,
    "priority": -1000,
}


def _with(path, value, base=MINIMAL):
    """A copy of a document with one value set, by dotted path."""
    data = deepcopy(base)
    *parents, last = path.split(".")
    inner = data
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[last] = value
    return data


def _refusal(data):
    with pytest.raises(InvalidSpec) as caught:
        parse_spec(data)
    assert caught.value.problems
    assert all(problem.message for problem in caught.value.problems)
    return caught.value


def _only_problem(data):
    (problem,) = _refusal(data).problems
    return problem


@pytest.mark.parametrize("data", [MINIMAL, FULL], ids=["minimal", "full"])
def test_a_specification_survives_json_and_yaml(data):
    spec = parse_spec(data)
    from_json = parse_spec(json.loads(spec.model_dump_json()))
    from_yaml = parse_spec(yaml.safe_load(yaml.safe_dump(json.loads(spec.model_dump_json()))))
    assert from_json == from_yaml == spec == JobSpec.model_validate_json(spec.model_dump_json())
    assert from_json.sha256 == from_yaml.sha256 == spec.sha256


def test_what_was_written_is_what_is_stored():
    stored = json.loads(parse_spec(FULL).model_dump_json())
    for key, value in FULL.items():
        assert stored[key] == value
    assert stored.keys() - FULL.keys() == {"steps"}


def test_no_field_is_missing_from_the_full_example():
    def leaves(model, path=()):
        for name, field in model.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from leaves(inner, (*path, name))
            else:
                yield (*path, name)

    missing = [path for path in leaves(JobSpec) if not _has(FULL, path)]
    assert missing == [("steps",)]  # epochs are given instead


def _has(data, path):
    for name in path:
        if not isinstance(data, dict) or name not in data:
            return False
        data = data[name]
    return True


def test_defaults_are_written_out_with_those_of_the_factories():
    stored = json.loads(parse_spec(MINIMAL).model_dump_json())
    assert stored["model"]["args"] == {"hidden_sizes": [128, 128]}
    assert stored["dataset"]["args"] == {"test_fraction": 0.2, "split_seed": 0}
    assert stored["optimizer"]["name"] == "sgd"
    assert stored["checkpoint"] == {"every_steps": 100, "keep_last": 3}
    assert stored["workers"] == 1
    written_out = parse_spec(stored)
    assert written_out.sha256 == parse_spec(MINIMAL).sha256


def test_equal_specifications_have_equal_hashes_whatever_the_order_of_their_fields():
    specs = [
        parse_spec({**dict(order), "labels": dict(labels)})
        for order, labels in zip(
            permutations(MINIMAL.items()), 60 * list(permutations([("a", "1"), ("b", "2")])), strict=True
        )
    ]
    assert all(spec == specs[0] for spec in specs)
    assert len({spec.sha256 for spec in specs}) == 1
    assert parse_spec(_with("seed", 1)).sha256 != parse_spec(MINIMAL).sha256


def test_a_specification_cannot_be_changed():
    spec = parse_spec(FULL)
    for part, name in ((spec, "steps"), (spec.batch, "size"), (spec.optimizer, "learning_rate"), (spec.model, "args")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, name, 3)


PARTS = ["", "model", "dataset", "optimizer", "schedule", "batch", "norm", "resources", "checkpoint", "evaluation"]


@pytest.mark.parametrize("part", [*PARTS, "retry", "model.args", "dataset.args"])
# The last ones are words that paths are cleaned of where they are no field: parts of a request, tags of a union.
@pytest.mark.parametrize("name", ["hiden", "body", "query", "path", "sgd", "adamw"])
def test_an_unknown_field_is_named_by_its_whole_path(part, name):
    path = f"{part}.{name}" if part else name
    base = _with("optimizer", {"name": "sgd"})
    problem = _only_problem(_with(path, 1, base))
    assert problem.field == path
    assert "unknown field" in problem.message


@pytest.mark.parametrize("key", ["sgd", "adamw", "body", "path"])
def test_a_label_is_named_by_its_key(key):
    assert _only_problem(_with("labels", {key: 5})).field == f"labels.{key}"


@pytest.mark.parametrize(
    "path",
    [
        "optimizer.learning_rate",
        "optimizer.momentum",
        "schedule.final_fraction",
        "norm.eps",
        "gradient_clip_norm",
        "resources.cpus_per_rank",
        "timeout_s",
        "dataset.args.test_fraction",
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_that_is_not_finite_passes(path, value):
    problem = _only_problem(_with(path, value, _with("optimizer", {"name": "sgd"})))
    assert problem == FieldProblem(field=path, message="must be a finite number, not NaN or infinity.")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("path", ["steps", "batch.size", "workers", "seed", "priority"])
def test_no_count_is_nan_or_infinite(path, value):
    assert _only_problem(_with(path, value)).field == path


@pytest.mark.parametrize(
    ("path", "near"),
    [("model", "builtin:mlpp"), ("model", "builtin:small_resnet"), ("dataset", "builtin:digit"), ("model", "mlp")],
)
def test_an_unknown_factory_lists_the_known_ones_and_the_nearest(path, near):
    problem = _only_problem(_with(path, {"factory": near}))
    assert problem.field == f"{path}.factory"
    known = catalog.MODELS if path == "model" else catalog.DATASETS
    assert all(name in problem.message for name in known)
    hint = re.search(r"Did you mean (\S+)\?", problem.message)
    if near != "mlp":  # too short to be like anything
        parse_spec(_with(path, {"factory": hint[1]}))


def test_a_factory_of_the_wrong_kind_is_unknown():
    assert _only_problem(_with("model", {"factory": "builtin:digits"})).field == "model.factory"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.args.hidden_sizes", []),
        ("model.args.hidden_sizes.1", [1, 0]),
        ("model.args.hidden_sizes.0", ["many"]),
        ("dataset.args.test_fraction", 0.0),
        ("dataset.args.test_fraction", 0.9),
        ("dataset.args.split_seed", -1),
    ],
)
def test_an_argument_that_does_not_fit_is_named_below_args(path, value):
    assert _only_problem(_with(re.sub(r"\.\d$", "", path), value)).field == path


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("name", ["", " x", "x" * 121, "a\n", "é", None, 5]),
        ("labels", [{"Team": "x"}, {"-a": "x"}, {"a-": "x"}, {"": "x"}, {"a" * 64: "x"}, {"a\n": "x"}, []]),
        ("task", ["regression"]),
        ("batch.size", [0, -1, 2**24 + 1, 1.5, "many", None]),
        ("batch.max_per_rank", [0]),
        ("workers", [0, 4097, 1.5]),
        ("steps", [0, -5, 10**9 + 1]),
        ("epochs", [0]),
        ("seed", [-1, 2**63]),
        ("precision", ["float16"]),
        ("gradient_clip_norm", [0.0]),
        ("resources.cpus_per_rank", [0.0, -1.0]),
        ("resources.gpus_per_rank", [-1, 0.5]),
        ("resources.memory_bytes_per_rank", [0]),
        ("checkpoint.every_steps", [0]),
        ("checkpoint.keep_last", [0]),
        ("evaluation.every_steps", [0]),
        ("norm.momentum", [0.0, 1.1]),
        ("norm.kind", ["batch"]),
        ("retry.budget", [-1]),
        ("timeout_s", [0.0, -1]),
        ("priority", [1001, -1001]),
        ("schedule.name", ["step"]),
        ("optimizer.name", ["adam", 5, None, []]),
        ("optimizer.learning_rate", [0.0, -1, 1e7]),
        ("optimizer.momentum", [1.0, -0.1]),
    ],
)
def test_a_value_out_of_range_is_named_by_its_path(path, values):
    base = _with("optimizer", {"name": "sgd"})
    for value in values:
        fields = {problem.field for problem in _refusal(_with(path, value, base)).problems}
        assert fields == {path}, value


def test_what_is_missing_is_named():
    fields = {problem.field for problem in _refusal({}).problems}
    assert fields == {"name", "model", "dataset", "batch"}
    data = deepcopy(MINIMAL)
    data["optimizer"] = {"learning_rate": 0.1}
    assert _only_problem(data) == FieldProblem(field="optimizer.name", message="must be one of: sgd, adamw.")


@pytest.mark.parametrize("data", [None, [], "name: digits", 3, {1: 2}])
def test_what_is_no_document_is_refused(data):
    with pytest.raises(InvalidSpec):
        parse_spec(data)


def test_all_problems_are_told_at_once():
    data = _with("seed", -1, _with("workers", 0, _with("extra", 1)))
    error = _refusal(data)
    assert {problem.field for problem in error.problems} == {"seed", "workers", "extra"}
    assert all(f"  {problem}" in str(error) for problem in error.problems)


@pytest.mark.parametrize("given", [{}, {"steps": 3, "epochs": 2}, {"steps": None, "epochs": None}])
def test_either_steps_or_epochs(given):
    data = {key: value for key, value in MINIMAL.items() if key != "steps"} | given
    problem = _only_problem(data)
    assert problem.field == "steps"
    assert "either steps or epochs" in problem.message


def test_nesterov_needs_momentum():
    data = _with("optimizer", {"name": "sgd", "momentum": 0, "nesterov": True})
    problem = _only_problem(data)
    assert problem.field == "optimizer.nesterov"
    for remedy in ({"momentum": 0.5}, {"nesterov": False}):
        parse_spec(_with("optimizer", {**data["optimizer"], **remedy}))


def test_the_warm_up_fits_into_the_job():
    parse_spec(_with("schedule.warmup_steps", 10))
    problem = _only_problem(_with("schedule.warmup_steps", 11))
    assert problem.field == "schedule.warmup_steps"
    assert "10 steps" in problem.message
    by_epochs = {key: value for key, value in MINIMAL.items() if key != "steps"} | {"epochs": 1}
    parse_spec(_with("schedule.warmup_steps", 89, by_epochs))  # 1438 // 16
    assert "89 steps" in _only_problem(_with("schedule.warmup_steps", 90, by_epochs)).message


def test_a_batch_larger_than_the_dataset_is_refused():
    data = _with("dataset.args", {"test_fraction": 0.5})
    samples = catalog.num_training_samples("builtin:digits", {"test_fraction": 0.5})
    problem = _only_problem(_with("batch.size", samples + 1, data))
    assert problem.field == "batch.size"
    assert f"{samples} training samples" in problem.message
    parse_spec(_with("batch.size", samples, data))


@given(size=st.integers(1, 2**24), normalization_size=st.integers(1, 2**24))
def test_a_normalization_batch_divides_the_mini_batch_and_the_divisor_that_is_named_does(size, normalization_size):
    # On the part alone: no builtin dataset has so many samples.
    data = {"batch": {"size": size, "normalization_size": normalization_size}}
    problems = {problem.field: problem.message for problem in _refusal(data).problems}
    assert ("batch.normalization_size" in problems) == (size % normalization_size != 0)
    if size % normalization_size:
        named = int(re.search(r"such as (\d+)\.", problems["batch.normalization_size"])[1])
        assert size % named == 0


@given(
    size=st.integers(1, 200),
    normalization_size=st.one_of(st.none(), st.integers(1, 200)),
    limit=st.one_of(st.none(), st.integers(1, 50)),
    workers=st.integers(1, 40),
)
def test_a_batch_that_no_world_of_this_size_holds_comes_with_remedies_that_work(
    size, normalization_size, limit, workers
):
    data = {
        **MINIMAL,
        "workers": workers,
        "batch": {"size": size, "normalization_size": normalization_size, "max_per_rank": limit},
    }
    try:
        plan = parse_spec(data).batch_plan()
    except InvalidSpec as error:
        (problem,) = error.problems
    else:
        assert (plan.size, plan.world_size) == (size, workers)
        return
    if problem.field == "batch.normalization_size":
        return  # shown above
    assert problem.field in ("workers", "batch.max_per_rank")
    (count,) = map(int, re.findall(r"Use at (?:most|least) (\d+) workers", problem.message))
    parse_spec({**data, "workers": count})
    for field, value in re.findall(r"or (batch\.\w+)=(\d+)", problem.message):
        parse_spec(_with(field, int(value), data))


def test_epochs_become_whole_steps_of_the_training_share():
    data = {key: value for key, value in MINIMAL.items() if key != "steps"} | {"epochs": 3}
    assert parse_spec(data).num_steps == 3 * (1438 // 16)
    assert parse_spec(MINIMAL).num_steps == 10


@given(fraction=st.floats(0, 0.9, exclude_min=True, exclude_max=True))
def test_every_share_leaves_something_to_train_on(fraction):
    samples = catalog.num_training_samples("builtin:digits", {"test_fraction": fraction})
    assert 0 < samples <= catalog.NUM_DIGITS_IMAGES


def test_the_json_schema_describes_every_field():
    schema = JobSpec.model_json_schema()
    assert schema["properties"].keys() == JobSpec.model_fields.keys()
    assert schema["additionalProperties"] is False


def test_reading_a_specification_imports_no_framework():
    # The command line checks a file in a moment, and the API process stays small.
    code = """
import sys, service.domain.spec, service.domain.journal, service.domain.ports, service.domain.rank_protocol
heavy = {"torch", "ray", "fastapi", "sqlalchemy", "numpy", "sklearn", "fsspec", "syncbn"} & sys.modules.keys()
sys.exit(f"imported {sorted(heavy)}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
