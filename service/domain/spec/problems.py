"""pydantic's errors in the words and paths of the person who wrote the document."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from service.domain.errors import FieldProblem

# The tags of a field that may be one of several models; pydantic puts them into the paths of errors below.
UNIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "optimizer": ("sgd", "adamw", "lars"),
        "task": ("classification", "segmentation", "detection", "regression", "custom"),
    }
)


def field_problems(errors: object) -> tuple[FieldProblem, ...]:
    """Turn pydantic's error list into problems with the paths that a person wrote.

    Args:
        errors: what ``ValidationError.errors()`` returned.
    """
    assert isinstance(errors, list | tuple)
    return tuple(_field_problem(error) for error in errors)


def _field_problem(error: Mapping[str, Any]) -> FieldProblem:
    path = list(error["loc"])
    if path[1:] and path[0] in ("body", "query", "path"):
        del path[0]  # where FastAPI found it; no field of the document
    kind = ""
    if path[1:] and path[1] in UNIONS.get(path[0], ()):
        kind = f" of {path.pop(1)}"  # the union's tag; likewise
    context = error.get("ctx", {})
    if error["type"] == "spec_problem" and context["field"]:
        path.append(context["field"])
    message = str(error["msg"])
    if error["type"] == "extra_forbidden":
        message = f"unknown field{kind}. Remove it, or check its spelling against the job reference in docs/jobs.md."
    elif error["type"] == "finite_number":
        message = "must be a finite number, not NaN or infinity."
    elif error["type"] == "missing":
        message = "is required."
    elif error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        names = [name for name in UNIONS[path[0]] if name != "custom"]
        path.append("name")
        message = f"must be one of: {', '.join(names)}."
    return FieldProblem(field=".".join(str(part) for part in path), message=message)
