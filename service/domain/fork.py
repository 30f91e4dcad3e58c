"""A new job that begins at a checkpoint of another, with changes that leave the checkpoint loadable."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.domain.errors import FieldProblem, InvalidSpec, InvalidTransition
from service.domain.job import Checkpoint, Job
from service.domain.spec import JobSpec, parse_spec

# Kinds of norm whose layers have the same parameters and buffers.
_SAME_NORM_LAYERS = (frozenset({"sync", "local", "frozen"}), frozenset({"group"}), frozenset({"none"}))
# Fields of a specification that are of one kind or another: with another ``name`` or ``factory``, all else goes.
_OF_KINDS = frozenset({"dataset", "model", "optimizer", "schedule", "task"})
# So many steps are named in an error.
_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class ForkRequest:
    """What is asked for.

    Attributes:
        step: of the checkpoint; None for the latest.
        changes: fields of the new specification that differ: nested as in a specification, or by dotted paths.
    """

    step: int | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)


def plan_fork(parent: Job, checkpoints: Sequence[Checkpoint], request: ForkRequest) -> tuple[JobSpec, Checkpoint]:
    """Return the specification of a fork, and the checkpoint that it begins at.

    Args:
        parent: the job to fork.
        checkpoints: its checkpoints, by step.
        request: what is asked for.

    Raises:
        InvalidTransition: the parent has no checkpoint.
        InvalidSpec: there is none of that step, or a change cannot be made.
    """
    checkpoint = _chosen(parent, checkpoints, request.step)
    spec = parse_spec(changed(parent.spec, request.changes))
    problems = incompatible(parent.spec, spec)
    if spec.num_steps is not None and spec.num_steps <= checkpoint.step:
        problems.append(
            FieldProblem(
                field="epochs" if spec.steps is None else "steps",
                message=f"the job would have {spec.num_steps} steps, and the checkpoint is of step {checkpoint.step}. "
                "Give it more, or fork it from an earlier step.",
            )
        )
    if problems:
        raise InvalidSpec("The job cannot be forked like this.", tuple(problems))
    return spec, checkpoint


def changed(spec: JobSpec, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a specification as a document with changes; not checked yet.

    A mapping changes the fields that it names; one that names another kind of model, dataset, task, optimizer or
    schedule takes the place of all of its fields, which would not fit it. ``steps`` and ``epochs`` replace each other.

    Args:
        spec: what to begin with.
        changes: nested, or by dotted paths such as ``optimizer.learning_rate``.

    Raises:
        InvalidSpec: a field is given twice.
    """
    document = spec.model_dump(mode="json")
    document["workers"] = {"min": spec.workers.min, "max": spec.workers.max}
    nested = _nested(changes)
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if nested.get(one) is not None and other not in nested:
            document[other] = None
    for field_name, change in nested.items():
        base = document.get(field_name)
        is_another = field_name in _OF_KINDS and _names_another_kind(base, change)
        document[field_name] = change if is_another else _merged(base, change)
    return document


def incompatible(before: JobSpec, after: JobSpec) -> list[FieldProblem]:
    """Say which changes keep a job from going on from another's checkpoint; empty if it can.

    Args:
        before: of the job that wrote the checkpoint.
        after: of the job that is to begin there.
    """
    problems = []

    def refuse(path: str, why: str) -> None:
        problems.append(FieldProblem(field=path, message=f"cannot change in a fork: {why}. Submit a new job for that."))

    if after.model.factory != before.model.factory:
        refuse("model.factory", f"the checkpoint holds the weights of {before.model.factory}")
    elif after.model.args != before.model.args:
        refuse("model.args", "the weights in the checkpoint are those of a model with the arguments it had")
    if after.dataset.factory != before.dataset.factory:
        refuse("dataset.factory", "other data may have other inputs and classes, which the weights do not fit")
    kinds = [getattr(spec.task, "name", "a task of its own") for spec in (before, after)]
    if kinds[0] != kinds[1]:
        refuse("task.name", f"the outputs of the model are those for {kinds[0]}")
    if (before.train_function is None) != (after.train_function is None):
        refuse("train_function", "a function and the service's own loop keep different things in a checkpoint")
    if not any({before.norm.kind, after.norm.kind} <= kinds_of_layer for kinds_of_layer in _SAME_NORM_LAYERS):
        refuse("norm.kind", f"the layers of {after.norm.kind} have not the state that those of {before.norm.kind} have")
    if after.optimizer.name != before.optimizer.name:
        refuse("optimizer.name", f"the checkpoint holds the state of {before.optimizer.name}")
    elif after.optimizer.decay_norm_and_bias != before.optimizer.decay_norm_and_bias:
        refuse("optimizer.decay_norm_and_bias", "the optimizer's state is kept by groups of parameters, which it makes")
    if after.precision != before.precision:
        refuse("precision", f"the checkpoint holds weights and state as training in {before.precision} left them")
    return problems


def _chosen(parent: Job, checkpoints: Sequence[Checkpoint], step: int | None) -> Checkpoint:
    if not checkpoints:
        raise InvalidTransition(f"Job {parent.id} has no checkpoint yet: there is nothing to fork from.")
    chosen = [checkpoint for checkpoint in checkpoints if step in (None, checkpoint.step)]
    if chosen:
        return chosen[-1]
    last = [str(checkpoint.step) for checkpoint in checkpoints[-_SHOWN:]]
    there_are = ("…, " if len(checkpoints) > len(last) else "") + ", ".join(last)
    problem = FieldProblem(
        field="step", message=f"there is no checkpoint of step {step}. There are those of {there_are}."
    )
    raise InvalidSpec(f"Job {parent.id} cannot be forked like this.", (problem,))


def _nested(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return changes as one document, whatever of them were given by dotted paths."""
    document: dict[str, Any] = {}
    for path, value in changes.items():
        # Labels may have dots in their names.
        parts = path.split(".", 1) if path.startswith("labels.") else path.split(".")
        for part in reversed(parts):
            value = {part: value}
        _add(document, value, above="")
    return document


def _add(document: dict[str, Any], change: Mapping[str, Any], *, above: str) -> None:
    for key, value in change.items():
        path = f"{above}{key}"
        if key not in document:
            document[key] = value
        elif isinstance(document[key], Mapping) and isinstance(value, Mapping):
            document[key] = dict(document[key])  # not the caller's
            _add(document[key], value, above=f"{path}.")
        else:
            problem = FieldProblem(field=path, message="is given twice in the changes. Keep one of them.")
            raise InvalidSpec("The job cannot be forked like this.", (problem,))


def _names_another_kind(base: object, change: object) -> bool:
    return (
        isinstance(base, Mapping)
        and isinstance(change, Mapping)
        and any(key in change and change[key] != base.get(key) for key in ("name", "factory"))
    )


def _merged(base: object, change: object) -> object:
    if not isinstance(change, Mapping):
        return change
    if not isinstance(base, Mapping):
        return dict(change)
    return {**base, **{key: _merged(base.get(key), value) for key, value in change.items()}}
