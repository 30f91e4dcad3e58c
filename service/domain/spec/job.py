"""What a user submits: one model for the API, YAML files and the command line."""

import hashlib
import json
import re
from itertools import islice
from typing import Annotated, Literal, Self, TypedDict

from pydantic import AfterValidator, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from service.domain import catalog
from service.domain.batch_plan import MAX_WORLD_SIZE, BatchPlan, MemoryHint, NoPlan, has_plan, plan_batch
from service.domain.placement import Resources
from service.domain.queue import DEFAULT_QUEUE, QUEUE_NAME_PATTERN
from service.domain.spec.base import STORED, SpecModel, problem
from service.domain.spec.batch import BatchSpec, Workers
from service.domain.spec.checkpoint import CheckpointSpec
from service.domain.spec.execution import (
    CodeSpec,
    DiagnosticsSpec,
    EvaluationSpec,
    ExactnessSpec,
    LoadingSpec,
    ResourcesSpec,
    RetrySpec,
)
from service.domain.spec.factories import AugmentationSpec, CodeReference, DatasetSpec, ModelSpec
from service.domain.spec.norm import NormSpec
from service.domain.spec.optimization import EarlyStoppingSpec, EmaSpec, OptimizerSpec, ScheduleSpec, SgdSpec
from service.domain.spec.task import ClassificationTask, TaskSpec

LABEL_PATTERN = re.compile(r"[a-z0-9]([a-z0-9._/-]{0,61}[a-z0-9])?")


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


class _Batch(TypedDict):
    """What ``plan_batch`` takes of a specification."""

    size: int
    normalization_size: int
    max_per_rank: int | None
    memory: MemoryHint | None


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
    code: CodeSpec = Field(default_factory=CodeSpec)
    task: TaskSpec = Field(default_factory=ClassificationTask)
    model: ModelSpec
    dataset: DatasetSpec
    augmentation: Annotated[tuple[AugmentationSpec, ...], Field(max_length=32)] = ()
    train_function: Annotated[
        CodeReference | None, Field(description="package.module:function that trains in place of the service's loop")
    ] = None
    optimizer: OptimizerSpec = Field(default_factory=SgdSpec)
    schedule: ScheduleSpec = Field(default_factory=ScheduleSpec)
    batch: BatchSpec
    workers: Workers = Field(default_factory=lambda: Workers(min=1, max=1))
    steps: Annotated[int | None, Field(ge=1, le=10**9, description="optimizer steps; or give epochs")] = None
    epochs: Annotated[int | None, Field(ge=1, le=10**6, description="passes over the dataset; or give steps")] = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    norm: NormSpec = Field(default_factory=NormSpec)
    precision: Annotated[
        Literal["float64", "float32", "bfloat16", "float16"],
        Field(description="bfloat16 and float16: autocast over float32 weights, float16 with loss scaling"),
    ] = "float32"
    gradient_clip_norm: Annotated[float | None, Field(gt=0)] = None
    ema: EmaSpec | None = None
    early_stopping: EarlyStoppingSpec | None = None
    nonfinite: Annotated[
        Literal["stop", "skip"],
        Field(description="when loss or gradient is NaN or infinite: fail, or leave the weights as they are"),
    ] = "stop"
    compile: Annotated[bool, Field(description="through torch.compile")] = False
    channels_last: Annotated[bool, Field(description="memory format of images and weights")] = False
    activation_checkpointing: Annotated[
        bool, Field(description="compute activations again in the backward instead of keeping them")
    ] = False
    loading: LoadingSpec = Field(default_factory=LoadingSpec)
    diagnostics: DiagnosticsSpec = Field(default_factory=DiagnosticsSpec)
    exactness: ExactnessSpec = Field(default_factory=ExactnessSpec)
    resources: ResourcesSpec = Field(default_factory=ResourcesSpec)
    checkpoint: CheckpointSpec = Field(default_factory=CheckpointSpec)
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec)
    export: Annotated[
        tuple[Literal["state_dict", "pt2", "onnx"], ...],
        Field(max_length=3, description="made with the last checkpoint"),
    ] = ()
    retry: RetrySpec = Field(default_factory=RetrySpec)
    timeout_s: Annotated[float | None, Field(gt=0, le=10**8, description="of running time, over all attempts")] = None
    priority: Annotated[int, Field(ge=-1000, le=1000, description="higher starts first, within its queue")] = 0
    queue: Annotated[str, Field(pattern=QUEUE_NAME_PATTERN, description="that it waits in")] = DEFAULT_QUEUE
    placement: Annotated[
        Literal["pack", "spread"], Field(description="workers on as few nodes as possible, or on as many")
    ] = "pack"
    after: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")], ...],
        Field(max_length=100, description="ids of jobs that have to succeed first"),
    ] = ()
    hold: Annotated[bool, Field(description="do not start it before it is resumed")] = False
    start_deadline_s: Annotated[
        float | None, Field(gt=0, le=10**8, description="fail if it has not started so long after it was submitted")
    ] = None
    expected_s: Annotated[
        float | None,
        Field(gt=0, le=10**8, description="how long it will run, so that it may go first where it delays nobody"),
    ] = None

    @classmethod
    def from_stored(cls, text: str) -> Self:
        """Return a job that was accepted before, from its JSON, whatever is asked of new ones by now.

        Raises:
            pydantic.ValidationError: it has not the shape of a specification at all.
        """
        return cls.model_validate_json(text, context=STORED)

    @model_validator(mode="after")
    def _parts_agree(self, info: ValidationInfo) -> Self:
        if info.context is STORED:
            return self
        if (self.steps is None) == (self.epochs is None):
            raise problem("steps", "give either steps or epochs, and not both.")
        samples = catalog.num_training_samples(self.dataset.factory, self.dataset.args)
        if samples is not None and samples < self.batch.size:
            raise problem(
                "batch.size",
                f"{self.batch.size} is more than the {samples} training samples of {self.dataset.factory}. "
                "Use at most so many.",
            )
        self._check_workers()
        num_steps = self.num_steps
        if num_steps is not None and self.schedule.warmup_steps > num_steps:
            raise problem(
                "schedule.warmup_steps",
                f"{self.schedule.warmup_steps} is more than the {num_steps} steps of the job. Use at most so many.",
            )
        return self

    @model_validator(mode="after")
    def _options_fit_the_rest(self, info: ValidationInfo) -> Self:
        if info.context is STORED:
            return self
        if self.precision == "float16" and self.nonfinite == "stop":
            # Its scaler finds the largest scale by going beyond it: skipping such steps is how it works.
            object.__setattr__(self, "nonfinite", "skip")
        if self.early_stopping is not None and self.evaluation.every_steps is None:
            raise problem(
                "early_stopping.metric", "nothing is evaluated before the last step. Set evaluation.every_steps."
            )
        if len(set(self.export)) < len(self.export):
            raise problem("export", "names a format twice. Name each once.")
        if len(set(self.after)) < len(self.after):
            raise problem("after", "names a job twice. Name each once.")
        unsuited = catalog.unsuited_to_task(self.model.factory, getattr(self.task, "name", "custom"))
        if unsuited is not None and self.train_function is None:
            raise problem("model.factory", unsuited)
        self._check_exactness()
        return self

    def _check_exactness(self) -> None:
        """What is known to depend on the number of workers can be neither required nor shown not to."""
        if self.train_function is not None:
            field, why = "train_function", "nobody can tell what a training loop of your own does with its workers"
        elif self.norm.kind == "local":
            field, why = "norm.kind", "with local each worker normalizes its own samples"
        elif self.precision == "float16":
            field, why = "precision", "with float16 the steps that are skipped depend on what a worker adds up"
        else:
            return
        asked = "exactness.require" if self.exactness.require else "exactness.rehearse"
        if self.exactness.require or self.exactness.rehearse is not None:
            raise problem(field, f"{why}, so the result is not exact. Change it, or remove {asked}.")

    def _check_workers(self) -> None:
        """Every world that was asked for by itself has to be exact; of a range, at least one."""
        try:
            if not self.workers.is_elastic:
                self.batch_plan(self.workers.min)
                self.tail_plan(self.workers.min)
            elif not any(self._has_plan(world) for world in range(self.workers.max, self.workers.min - 1, -1)):
                self.batch_plan(self.workers.max)
                self.tail_plan(self.workers.max)
        except NoPlan as error:
            raise problem(error.field, error.message) from None
        samples = catalog.num_training_samples(self.dataset.factory, self.dataset.args)
        if self.workers.is_elastic and not self.batch.drop_last and samples is None:
            raise problem(
                "batch.drop_last",
                "how many samples the last mini-batch of an epoch holds, and so which numbers of workers can share it, "
                "is only known once the dataset is read. Set drop_last: true, or one number of workers.",
            )
        rehearsal = self.exactness.rehearse
        for world_size in rehearsal.worlds if rehearsal is not None else ():
            if world_size > self.workers.min:
                raise problem(
                    "exactness.rehearse.worlds",
                    f"{world_size} is more than the {self.workers.min} workers that there are at least. "
                    "Use at most so many.",
                )
            try:
                self.batch_plan(world_size)
                self.tail_plan(world_size)
            except NoPlan as error:
                raise problem("exactness.rehearse.worlds", error.message) from None

    @property
    def resources_per_rank(self) -> Resources:
        """What each worker is given, for placement."""
        asked = self.resources
        return Resources(
            cpus=asked.cpus_per_rank, gpus=asked.gpus_per_rank, memory_bytes=asked.memory_bytes_per_rank or 0
        )

    @property
    def memory_hint(self) -> MemoryHint | None:
        """What is known of the memory of a rank, where enough is."""
        if self.resources.memory_bytes_per_rank is None or self.batch.memory_bytes_per_sample is None:
            return None
        return MemoryHint(
            bytes_per_rank=self.resources.memory_bytes_per_rank,
            bytes_fixed=self.batch.memory_bytes_fixed,
            bytes_per_sample=self.batch.memory_bytes_per_sample,
        )

    def batch_plan(self, world_size: int) -> BatchPlan:
        """Return how this job's batches are spread over so many ranks.

        Raises:
            NoPlan: that world cannot compute them exactly.
        """
        return plan_batch(**self._batch_of(self.batch.size), world_size=world_size)

    def tail_plan(self, world_size: int, num_samples: int | None = None) -> BatchPlan | None:
        """Return how an epoch's last, partial mini-batch is spread; None where there is none, or it is left out.

        Args:
            world_size: number of ranks.
            num_samples: of an epoch; None for what the catalog knows.

        Raises:
            NoPlan: that world cannot compute it exactly.
        """
        tail = self._tail_size(num_samples)
        if not tail:
            return None
        try:
            return plan_batch(**self._batch_of(tail), world_size=world_size)
        except NoPlan as error:
            near = sorted(range(1, min(tail, MAX_WORLD_SIZE) + 1), key=lambda world: abs(world - world_size))
            fitting = (world for world in near if self._has_plan(world, num_samples))
            others = [f", or use {world} worker(s)" for world in islice(fitting, 1)]
            raise NoPlan(
                error.field,
                f"the last mini-batch of an epoch holds {tail} samples: {error.reason}",
                f"Set batch.drop_last: true{''.join(others)}.",
            ) from None

    def exact_worlds(self, limit: int | None = None) -> tuple[int, ...]:
        """Return the numbers of workers that compute this job exactly, of those it asks for, largest first.

        Args:
            limit: none above it.
        """
        largest = self.workers.max if limit is None else min(limit, self.workers.max)
        return tuple(world for world in range(largest, self.workers.min - 1, -1) if self._has_plan(world))

    @property
    def num_steps(self) -> int | None:
        """Optimizer steps of the whole job; None where only the dataset's rank can tell."""
        if self.steps is not None:
            return self.steps
        samples = catalog.num_training_samples(self.dataset.factory, self.dataset.args)
        assert self.epochs is not None
        return None if samples is None else self.epochs * self.steps_per_epoch(samples)

    def steps_per_epoch(self, num_samples: int) -> int:
        """Return the mini-batches of an epoch of so many samples."""
        return num_samples // self.batch.size if self.batch.drop_last else -(-num_samples // self.batch.size)

    @property
    def sha256(self) -> str:
        """Hash of the canonical JSON (keys sorted), hexadecimal."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def _batch_of(self, size: int) -> _Batch:
        return _Batch(
            size=size,
            normalization_size=min(size, self.batch.samples_normalized_together),
            max_per_rank=self.batch.max_per_rank,
            memory=self.memory_hint,
        )

    def _tail_size(self, num_samples: int | None = None) -> int:
        """Return the samples of an epoch's last, partial mini-batch; 0 where there is none, or none is known of."""
        if self.batch.drop_last:
            return 0
        if num_samples is None:
            num_samples = catalog.num_training_samples(self.dataset.factory, self.dataset.args)
        return 0 if num_samples is None else num_samples % self.batch.size

    def _has_plan(self, world_size: int, num_samples: int | None = None) -> bool:
        sizes = [size for size in (self.batch.size, self._tail_size(num_samples)) if size]
        return all(has_plan(**self._batch_of(size), world_size=world_size) for size in sizes)
