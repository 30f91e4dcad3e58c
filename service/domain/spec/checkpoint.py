"""When the training state is saved, and what is kept."""

from typing import Annotated, Literal

from pydantic import Field

from service.domain.spec.base import MetricName, SpecModel


class KeepBestSpec(SpecModel):
    """Checkpoints that are kept for the value of a metric at their step."""

    metric: MetricName
    mode: Literal["min", "max"]
    count: Annotated[int, Field(ge=1, le=10**6)] = 1


class CheckpointSpec(SpecModel):
    """When the training state is saved, and what is kept: whatever one of the rules keeps."""

    every_steps: Annotated[int, Field(ge=1, le=10**9)] = 100
    keep_last: Annotated[int, Field(ge=1, le=10**6, description="the newest ones")] = 3
    keep_best: KeepBestSpec | None = None
    keep_every_steps: Annotated[int | None, Field(ge=1, le=10**9, description="those of every n-th step")] = None
    on_failure: Annotated[
        Literal["continue", "stop"],
        Field(description="when one cannot be written: train on without it, or end the attempt"),
    ] = "continue"
