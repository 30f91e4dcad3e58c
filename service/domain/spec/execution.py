"""How a job is run: what it uses, what it watches, what it does when something goes wrong."""

from typing import Annotated, Self

from pydantic import Field, ValidationInfo, model_validator

from service.domain.batch_plan import MAX_WORLD_SIZE
from service.domain.spec.base import STORED, SpecModel, problem


class CodeSpec(SpecModel):
    """Code of your own that the job's factories are in."""

    bundle: Annotated[str | None, Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of an uploaded bundle")] = None
    requirements: Annotated[bool, Field(description="install the bundle's requirements.txt first")] = False

    @model_validator(mode="after")
    def _requirements_are_in_a_bundle(self) -> Self:
        if self.requirements and self.bundle is None:
            raise problem("requirements", "there is no bundle to hold a requirements.txt. Set code.bundle.")
        return self


class ResourcesSpec(SpecModel):
    """What each worker is given."""

    cpus_per_rank: Annotated[float, Field(ge=0.01, le=4096)] = 1.0
    gpus_per_rank: Annotated[int, Field(ge=0, le=64, description="training uses the first of them")] = 0
    memory_bytes_per_rank: Annotated[int | None, Field(ge=2**20, le=2**50)] = None


class LoadingSpec(SpecModel):
    """How samples are read and decoded; changes speed and memory, not the result."""

    workers: Annotated[int, Field(ge=0, le=64, description="processes beside each rank that decode")] = 0
    prefetch: Annotated[int, Field(ge=1, le=64, description="batches that each of them reads ahead")] = 2


class DiagnosticsSpec(SpecModel):
    """What is watched beside the loss."""

    norm: Annotated[bool, Field(description="how far each rank's statistics are from those of the batch")] = True
    every_steps: Annotated[int, Field(ge=1, le=10**9)] = 50
    gradient_noise: Annotated[bool, Field(description="the simple noise scale (McCandlish et al. 2018)")] = False
    input_drift: Annotated[
        bool, Field(description="how the moments of each layer's input move (Ioffe & Szegedy 2015, section 1)")
    ] = False


class RehearsalSpec(SpecModel):
    """The first steps run on two world sizes in turn, and compared, before the job itself begins."""

    worlds: tuple[Annotated[int, Field(ge=1, le=MAX_WORLD_SIZE)], Annotated[int, Field(ge=1, le=MAX_WORLD_SIZE)]]
    steps: Annotated[int, Field(ge=1, le=1000)] = 3

    @model_validator(mode="after")
    def _worlds_differ(self, info: ValidationInfo) -> Self:
        if info.context is not STORED and self.worlds[0] == self.worlds[1]:
            raise problem("worlds", "are the same, so they show nothing. Name two different ones.")
        return self


class ExactnessSpec(SpecModel):
    """Whether the result may depend on the number of workers."""

    require: Annotated[bool, Field(description="fail where it would, rather than say so")] = False
    rehearse: RehearsalSpec | None = None


class EvaluationSpec(SpecModel):
    """When the held-out samples are evaluated; always after the last step."""

    every_steps: Annotated[int | None, Field(ge=1, le=10**9)] = None
    batch_size: Annotated[int, Field(ge=1, le=2**24, description="samples a worker evaluates at once")] = 64


class RetrySpec(SpecModel):
    """How often the job is run again after it was interrupted, and how soon."""

    budget: Annotated[int, Field(ge=0, le=1000, description="after a worker, a node or its supervisor was lost")] = 3
    backoff_s: Annotated[
        float, Field(ge=0, le=3600, description="pause before the second retry; doubles with each further one")
    ] = 5.0
    preemptions: Annotated[
        int, Field(ge=0, le=1000, description="how often it may be stopped for a job of higher priority")
    ] = 10
