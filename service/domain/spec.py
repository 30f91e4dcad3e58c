"""What a user submits: one model for the API, YAML files and the command line."""

import hashlib
import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from service.domain import catalog
from service.domain.batch_plan import BatchPlan, NoPlan, divisors, plan_batch
from service.domain.catalog import FactoryArguments
from service.domain.errors import FieldProblem, InvalidSpec
from service.domain.placement import Resources

LABEL_PATTERN = re.compile(r"[a-z0-9]([a-z0-9._/-]{0,61}[a-z0-9])?")


class SpecModel(BaseModel):
    """Base of the parts of a specification: immutable, finite numbers only, unknown fields refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _check_labels(labels: dict[str, str]) -> dict[str, str]:
    for key in labels:
        if not LABEL_PATTERN.fullmatch(key):
            raise PydanticCustomError(
                "label_key",
                "label {key} must be 1–63 lower-case letters, digits, '.', '_', '/' or '-', starting and ending "
                "with a letter or digit",
                {"key": repr(key)},
            )
    return labels


class FactorySpec(SpecModel):
    """Something built by name with arguments."""

    factory: Annotated[str, Field(min_length=1, max_length=200, description="such as builtin:digits")]
    args: dict[str, Any] = Field(default_factory=dict, max_length=64)

    @classmethod
    def _schemas(cls) -> Mapping[str, type[FactoryArguments]]:
        raise AssertionError(f"{cls.__name__} has no catalog")

    @model_validator(mode="after")
    def _known_factory_with_fitting_arguments(self) -> Self:
        schemas = self._schemas()
        schema = schemas.get(self.factory)
        if schema is None:
            near = get_close_matches(self.factory, schemas, n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise problem("factory", f"unknown factory {self.factory!r}. {hint}Known: {', '.join(sorted(schemas))}.")
        try:
            arguments = schema.model_validate(self.args)
        except ValidationError as error:
            first = field_problems(error.errors())[0]
            raise problem(f"args.{first.field}" if first.field else "args", first.message) from None
        # With the defaults written out, a later change of a default does not change a submitted job.
        object.__setattr__(self, "args", arguments.model_dump(mode="json"))
        return self


class ModelSpec(FactorySpec):
    """The network to train."""

    @classmethod
    def _schemas(cls) -> Mapping[str, type[FactoryArguments]]:
        return catalog.MODELS


class DatasetSpec(FactorySpec):
    """The samples to train and evaluate on."""

    @classmethod
    def _schemas(cls) -> Mapping[str, type[FactoryArguments]]:
        return catalog.DATASETS


class SgdSpec(SpecModel):
    """Stochastic gradient descent with momentum, as ``torch.optim.SGD``."""

    name: Literal["sgd"] = "sgd"
    learning_rate: Annotated[float, Field(gt=0, le=1e6)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0, le=1e3)] = 0.0

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise problem("nesterov", "needs momentum > 0. Set optimizer.momentum, or nesterov: false.")
        return self


class AdamWSpec(SpecModel):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), as ``torch.optim.AdamW``."""

    name: Literal["adamw"]
    learning_rate: Annotated[float, Field(gt=0, le=1e6)] = 1e-3
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0, le=1e3)] = 0.01


OptimizerSpec = Annotated[SgdSpec | AdamWSpec, Field(discriminator="name")]


class ScheduleSpec(SpecModel):
    """The learning rate over the steps: a linear warm-up, then constant or half a cosine (Loshchilov & Hutter 2017)."""

    name: Literal["constant", "cosine"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] = 0
    final_fraction: Annotated[float, Field(ge=0, le=1, description="of the base rate, at the last step")] = 0.0


class BatchSpec(SpecModel):
    """The batches of the job; the same whatever the number of workers."""

    size: Annotated[int, Field(ge=1, le=2**24, description="samples of one optimizer step, over all workers")]
    normalization_size: Annotated[
        int | None,
        Field(ge=1, le=2**24, description="samples normalized together; divides size, by default all of it"),
    ] = None
    max_per_rank: Annotated[int | None, Field(ge=1, le=2**24, description="most samples a worker holds at once")] = None

    @property
    def samples_normalized_together(self) -> int:
        """``normalization_size``, or ``size`` where it is not given."""
        return self.size if self.normalization_size is None else self.normalization_size

    @model_validator(mode="after")
    def _normalization_size_divides_size(self) -> Self:
        if self.size % self.samples_normalized_together:
            nearest = min(divisors(self.size), key=lambda n: abs(n - self.samples_normalized_together))
            raise problem(
                "normalization_size",
                f"{self.normalization_size} does not divide size={self.size}. Use a divisor of it, such as {nearest}.",
            )
        return self


class NormSpec(SpecModel):
    """What becomes of the model's BatchNorm layers.

    ``sync`` computes their statistics over all workers; ``local`` leaves each worker to its own samples, so the
    result depends on the number of workers.
    """

    kind: Literal["sync", "local"] = "sync"
    momentum: Annotated[
        float | None, Field(gt=0, le=1, description="of the running statistics; as the model has it")
    ] = None
    eps: Annotated[float | None, Field(gt=0, le=1, description="added to the variance; as the model has it")] = None
    skip_nonfinite: Annotated[
        bool, Field(description="with ``sync``, a batch with a NaN or an Inf leaves the running statistics as they are")
    ] = True


class ResourcesSpec(SpecModel):
    """What each worker is given."""

    cpus_per_rank: Annotated[float, Field(ge=0.01, le=4096)] = 1.0
    gpus_per_rank: Annotated[int, Field(ge=0, le=64, description="training uses the first of them")] = 0
    memory_bytes_per_rank: Annotated[int | None, Field(ge=2**20, le=2**50)] = None


class CheckpointSpec(SpecModel):
    """When the training state is saved, and what is kept."""

    every_steps: Annotated[int, Field(ge=1, le=10**9)] = 100
    keep_last: Annotated[int, Field(ge=1, le=10**6, description="older ones are removed")] = 3


class EvaluationSpec(SpecModel):
    """When the held-out samples are evaluated; always after the last step."""

    every_steps: Annotated[int | None, Field(ge=1, le=10**9)] = None
    batch_size: Annotated[int, Field(ge=1, le=2**24, description="samples a worker evaluates at once")] = 64


class RetrySpec(SpecModel):
    """How often the job is run again after it lost a worker, a node or its supervisor."""

    budget: Annotated[int, Field(ge=0, le=1000)] = 3


class JobSpec(SpecModel):
    """A training job as submitted; immutable.

    Raises:
        pydantic.ValidationError: from the constructor, when fields contradict each other or name what does not
            exist. ``parse_spec`` gives the same as ``InvalidSpec`` with a path and a remedy for each field.
    """

    name: Annotated[str, Field(min_length=1, max_length=120, pattern=r"^[A-Za-z0-9][A-Za-z0-9._ -]*$")]
    labels: Annotated[
        dict[str, Annotated[str, Field(max_length=200)]], Field(max_length=32), AfterValidator(_check_labels)
    ] = Field(default_factory=dict)
    task: Literal["classification"] = "classification"
    model: ModelSpec
    dataset: DatasetSpec
    optimizer: OptimizerSpec = Field(default_factory=SgdSpec)
    schedule: ScheduleSpec = Field(default_factory=ScheduleSpec)
    batch: BatchSpec
    workers: Annotated[int, Field(ge=1, le=4096)] = 1
    steps: Annotated[int | None, Field(ge=1, le=10**9, description="optimizer steps; or give epochs")] = None
    epochs: Annotated[int | None, Field(ge=1, le=10**6, description="passes over the dataset; or give steps")] = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    norm: NormSpec = Field(default_factory=NormSpec)
    precision: Annotated[
        Literal["float64", "float32", "bfloat16"],
        Field(description="bfloat16: autocast over float32 weights"),
    ] = "float32"
    gradient_clip_norm: Annotated[float | None, Field(gt=0)] = None
    resources: ResourcesSpec = Field(default_factory=ResourcesSpec)
    checkpoint: CheckpointSpec = Field(default_factory=CheckpointSpec)
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec)
    retry: RetrySpec = Field(default_factory=RetrySpec)
    timeout_s: Annotated[float | None, Field(gt=0, le=10**8, description="of running time, over all attempts")] = None
    priority: Annotated[int, Field(ge=-1000, le=1000, description="higher starts first")] = 0

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise problem("steps", "give either steps or epochs, and not both.")
        try:
            self.batch_plan()
        except NoPlan as error:
            raise problem(error.field, error.message) from None
        samples = catalog.num_training_samples(self.dataset.factory, self.dataset.args)
        if samples is not None and samples < self.batch.size:
            raise problem(
                "batch.size",
                f"{self.batch.size} is more than the {samples} training samples of {self.dataset.factory}.",
            )
        num_steps = self.num_steps
        if num_steps is not None and self.schedule.warmup_steps > num_steps:
            raise problem(
                "schedule.warmup_steps",
                f"{self.schedule.warmup_steps} is more than the {num_steps} steps of the job.",
            )
        return self

    @property
    def resources_per_rank(self) -> Resources:
        """What each worker is given, for placement."""
        asked = self.resources
        return Resources(
            cpus=asked.cpus_per_rank, gpus=asked.gpus_per_rank, memory_bytes=asked.memory_bytes_per_rank or 0
        )

    def batch_plan(self, world_size: int | None = None) -> BatchPlan:
        """Return how this job's batches are spread over its workers.

        Args:
            world_size: number of ranks; by default ``workers``.

        Raises:
            NoPlan: that world cannot compute them exactly.
        """
        return plan_batch(
            size=self.batch.size,
            normalization_size=self.batch.samples_normalized_together,
            max_per_rank=self.batch.max_per_rank,
            world_size=self.workers if world_size is None else world_size,
        )

    @property
    def num_steps(self) -> int | None:
        """Optimizer steps of the whole job; None where only the dataset's rank can tell.

        An epoch's last, partial mini-batch is dropped.
        """
        if self.steps is not None:
            return self.steps
        samples = catalog.num_training_samples(self.dataset.factory, self.dataset.args)
        assert self.epochs is not None
        return None if samples is None else self.epochs * (samples // self.batch.size)

    @property
    def sha256(self) -> str:
        """Hash of the canonical JSON (keys sorted), hexadecimal."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def parse_spec(data: object) -> JobSpec:
    """Check a specification read from YAML or JSON.

    Args:
        data: the parsed document.

    Raises:
        InvalidSpec: with one problem per field, each with its dotted path and what to do.
    """
    if not isinstance(data, Mapping):
        raise InvalidSpec("A job is a mapping of fields to values, such as `name: digits`.")
    try:
        return JobSpec.model_validate(dict(data))
    except ValidationError as error:
        raise InvalidSpec("The job cannot be run as written.", field_problems(error.errors())) from None


def problem(field: str, message: str) -> PydanticCustomError:
    """Return an error for a validator to raise about a field below the model it checks.

    Args:
        field: dotted path relative to that model.
        message: what is wrong and what to do.
    """
    return PydanticCustomError("spec_problem", "{message}", {"field": field, "message": message})


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
    if path[1:] and path[0] == "optimizer" and path[1] in _OPTIMIZERS:
        del path[1]  # the union's tag; likewise
    context = error.get("ctx", {})
    if error["type"] == "spec_problem":
        path.append(context["field"])
    message = str(error["msg"])
    if error["type"] == "extra_forbidden":
        message = "unknown field. Remove it, or check its spelling against the job reference in docs/jobs.md."
    elif error["type"] == "finite_number":
        message = "must be a finite number, not NaN or infinity."
    elif error["type"] == "missing":
        message = "is required."
    elif error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        path.append("name")
        message = f"must be one of: {', '.join(_OPTIMIZERS)}."
    return FieldProblem(field=".".join(str(part) for part in path), message=message)


_OPTIMIZERS = ("sgd", "adamw")
