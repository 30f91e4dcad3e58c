"""docs/jobs.md and docs/api.md say what the code does: a field, route or problem that is not documented fails here."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from service.api import idempotency
from service.api.limits import MAX_BODY_BYTES
from service.api.problems import PROBLEM_TYPES
from service.domain import catalog, spec
from service.domain.catalog.augmentations import AUGMENTATIONS
from service.domain.spec import parse_spec

DOCS = Path(__file__).parents[3] / "docs"
JOBS = (DOCS / "jobs.md").read_text()
API = (DOCS / "api.md").read_text()

SECTIONS: dict[str, tuple[type[BaseModel], str]] = {
    "The job": (spec.JobSpec, ""),
    "Model": (spec.ModelSpec, "model."),
    "Dataset": (spec.DatasetSpec, "dataset."),
    "Task classification": (spec.ClassificationTask, "task."),
    "Task segmentation": (spec.SegmentationTask, "task."),
    "Task detection": (spec.DetectionTask, "task."),
    "Task regression": (spec.RegressionTask, "task."),
    "Task custom": (spec.CustomTask, "task."),
    "Augmentation": (spec.AugmentationSpec, "augmentation."),
    "Optimizer sgd": (spec.SgdSpec, "optimizer."),
    "Optimizer adamw": (spec.AdamWSpec, "optimizer."),
    "Optimizer lars": (spec.LarsSpec, "optimizer."),
    "Schedule": (spec.ScheduleSpec, "schedule."),
    "Batch": (spec.BatchSpec, "batch."),
    "Code": (spec.CodeSpec, "code."),
    "Workers": (spec.Workers, "workers."),
    "Norm": (spec.NormSpec, "norm."),
    "Ema": (spec.EmaSpec, "ema."),
    "Early stopping": (spec.EarlyStoppingSpec, "early_stopping."),
    "Loading": (spec.LoadingSpec, "loading."),
    "Diagnostics": (spec.DiagnosticsSpec, "diagnostics."),
    "Exactness": (spec.ExactnessSpec, "exactness."),
    "Rehearsal": (spec.RehearsalSpec, "exactness.rehearse."),
    "Resources": (spec.ResourcesSpec, "resources."),
    "Checkpoint": (spec.CheckpointSpec, "checkpoint."),
    "Keep best": (spec.KeepBestSpec, "checkpoint.keep_best."),
    "Evaluation": (spec.EvaluationSpec, "evaluation."),
    "Retry": (spec.RetrySpec, "retry."),
    **{f"Model {name}": (schema, "model.args.") for name, schema in catalog.MODELS.items()},
    **{f"Dataset {name}": (schema, "dataset.args.") for name, schema in catalog.DATASETS.items()},
    **{f"Augmentation {name}": (schema, "augmentation.args.") for name, schema in AUGMENTATIONS.items()},
}


def rows(section: str) -> dict[str, tuple[str, str, str]]:
    """Return field → meaning, default and limits, as the table of a section has them."""
    match = re.search(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", JOBS, re.MULTILINE | re.DOTALL)
    assert match, f"docs/jobs.md has no section {section!r}"
    found = re.findall(r"^\| `([^`]+)` \| (.*?) \| (.*?) \| (.*?) \|$", match[1], re.MULTILINE)
    return {field: (meaning, default, limits) for field, meaning, default, limits in found}


def test_every_part_of_a_job_has_a_section():
    documented = {model.__name__ for model, _ in SECTIONS.values()}
    assert {"JobSpec", *spec.JobSpec.model_json_schema()["$defs"]} <= documented
    assert set(re.findall(r"^## (.*)$", JOBS, re.MULTILINE)) == set(SECTIONS)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_of_a_job_is_documented(section):
    model, prefix = SECTIONS[section]
    table = rows(section)
    assert list(table) == [f"{prefix}{name}" for name in model.model_fields]
    schema = model.model_json_schema()
    for name, field in model.model_fields.items():
        meaning, default, limits = table[f"{prefix}{name}"]
        assert meaning
        if field.is_required():
            assert default == "required", name
        else:
            value = field.get_default(call_default_factory=True)
            # Where a number stands for a part, as that of the workers, it is the default.
            plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
            is_part = isinstance(value, BaseModel) and isinstance(plain, dict)
            expected = "the defaults below" if is_part else f"`{json.dumps(plain)}`"
            assert default == expected, name
        missing = {number for number in _bounds(_of_field(schema, name)) if number not in limits}
        assert not missing, f"{prefix}{name}: {missing} not in {limits!r}"


def _of_field(schema: dict[str, Any], name: str) -> object:
    """Return the schema of a field; workers are a number or a mapping, whose fields are in the latter."""
    mapping = schema if "properties" in schema else schema["anyOf"][1]
    return mapping["properties"][name]


def _bounds(schema: object) -> set[str]:
    """Return the numbers and names that bound a value, as the document writes them."""
    if isinstance(schema, list):
        return {bound for item in schema for bound in _bounds(item)}
    if not isinstance(schema, dict):
        return set()
    bounds = {bound for key in ("anyOf", "prefixItems", "items") for bound in _bounds(schema.get(key))}
    for key in (
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "minLength",
        "maxLength",
        "maxProperties",
    ):
        number = schema.get(key)
        if number is not None and "factory" not in schema.get("title", "").lower():
            if key == "exclusiveMaximum" and schema.get("type") == "integer":
                number -= 1
            bounds.add(f"{number:.10g}" if isinstance(number, float) else str(number))
    bounds.update(f"`{name}`" for name in [*schema.get("enum", ()), *([schema["const"]] if "const" in schema else [])])
    return bounds


def test_factories_are_listed():
    for field, known in (("Model", catalog.MODELS), ("Dataset", catalog.DATASETS)):
        limits = rows(field)[f"{field.lower()}.factory"][2]
        assert re.findall(r"`([^`]+)`", limits) == sorted(known)

    assert re.findall(r"`([^`]+)`", rows("Augmentation")["augmentation.name"][2]) == list(AUGMENTATIONS)


def test_the_jobs_in_the_reference_are_some():
    whole, *parts = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", JOBS, re.DOTALL))
    assert parse_spec(whole).workers == spec.Workers(min=4, max=4)
    for part in parts:
        parse_spec({**whole, **part})


def test_every_link_within_the_reference_leads_somewhere():
    places = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", JOBS, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", JOBS)) <= places


def test_every_route_is_documented(api):
    paths = api.get("/openapi.json").json()["paths"]
    routes = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    documented = re.findall(r"^\| `((?:GET|POST|PUT|DELETE) [^`]+)` \|", API, re.MULTILINE)
    assert sorted(documented) == sorted([*routes, "GET /openapi.json"])
    for path, methods in paths.items():
        for operation in methods.values():
            for parameter in operation.get("parameters", ()):
                if parameter["in"] != "path":
                    assert f"`{parameter['name']}`" in API, f"{path}: {parameter['name']}"


def test_every_problem_is_documented():
    documented = re.findall(r"^\| `(urn:syncbn:problem:[a-z-]+)` \| (\d+) \|", API, re.MULTILINE)
    assert sorted(documented) == sorted((problem.uri, str(problem.status)) for problem in PROBLEM_TYPES)


def test_limits_and_headers_are_documented():
    assert f"{MAX_BODY_BYTES} bytes" in API
    for header in (idempotency.HEADER, idempotency.REPLAYED_HEADER, "Last-Event-ID", "Log-Next-Offset", "Log-Ended"):
        assert f"`{header}`" in API
