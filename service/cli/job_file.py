"""A job as a user writes it: a YAML file and changes to it."""

import json
import sys
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from service.domain.errors import FieldProblem, InvalidSpec
from service.domain.spec import JobSpec, parse_spec


def load_job(path: Path, changes: Sequence[str] = ()) -> JobSpec:
    """Read a job and check it.

    Args:
        path: of the YAML file; ``-`` for standard input.
        changes: such as ``batch.size=32``, the value in YAML.

    Raises:
        InvalidSpec: it cannot be read, or cannot be run as written.
    """
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSpec(f"The job file cannot be read: {error}") from None
    data = _parse(text, str(path))
    for change in changes:
        data = _changed(data, change)
    return parse_spec(data)


def parse_change(change: str) -> tuple[str, Any]:
    """Read a change such as ``batch.size=32``, the value in YAML; return the field's path and the value.

    Raises:
        InvalidSpec: it is none, or its value is one that JSON does not have, such as a date.
    """
    path, equals, value = change.partition("=")
    if not equals or not all(path.split(".")):
        raise InvalidSpec(f"--set {change}: write it as field=value, such as batch.size=32.")
    parsed = _parse(value, f"--set {change}")
    try:
        json.dumps(parsed, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        message = f"{value} is read as {type(parsed).__name__}, which a job cannot hold. For a text, put it in quotes."
        raise InvalidSpec(f"--set {change} cannot be applied.", (FieldProblem(field=path, message=message),)) from None
    return path, parsed


class _Loader(yaml.SafeLoader):
    """Refuses a field that is given twice, of which plain YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping."""
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key_node.tag != "tag:yaml.org,2002:merge" and isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            seen.add(key if isinstance(key, str) else id(key))
        return super().construct_mapping(node, deep)


def _parse(text: str, what: str) -> Any:  # noqa: ANN401 - whatever the document is
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: such as a 13th month
        raise InvalidSpec(f"{what} is not YAML: {error}") from None


def _changed(data: Any, change: str) -> Any:  # noqa: ANN401 - whatever the document is
    path, value = parse_change(change)
    *parents, last = path.split(".")
    inner = data
    for depth, parent in enumerate(parents):
        if isinstance(inner, dict) and inner.get(parent) is None:
            inner[parent] = {}
        inner = inner.get(parent) if isinstance(inner, dict) else None
        if not isinstance(inner, dict):
            field = ".".join(parents[: depth + 1])
            raise InvalidSpec(
                f"--set {change} cannot be applied.", (FieldProblem(field=field, message="has no fields."),)
            )
    if not isinstance(inner, dict):
        raise InvalidSpec("A job is a mapping of fields to values, such as `name: digits`.")
    inner[last] = value
    return data
