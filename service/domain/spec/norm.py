"""What becomes of the model's BatchNorm layers."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from service.domain.spec.base import SpecModel, problem


class NormSpec(SpecModel):
    """What becomes of the model's BatchNorm layers.

    ``sync`` computes their statistics over the whole normalization batch, on whichever workers it lies. ``local``
    leaves each worker to its own samples, so the result depends on the number of workers. ``frozen`` normalizes with
    the running statistics that the model came with and trains γ and β alone; ``group`` puts group normalization (Wu &
    He 2018) in their place; ``none`` keeps γ and β and normalizes nothing.
    """

    kind: Literal["sync", "local", "frozen", "group", "none"] = "sync"
    group_size: Annotated[
        int | None, Field(ge=1, le=2**16, description="channels of a group, with ``group``; 16 by default")
    ] = None
    momentum: Annotated[
        float | None, Field(gt=0, le=1, description="of the running statistics; as the model has it")
    ] = None
    eps: Annotated[float | None, Field(gt=0, le=1, description="added to the variance; as the model has it")] = None
    skip_nonfinite: Annotated[
        bool, Field(description="with ``sync``, a batch with a NaN or an Inf leaves the running statistics as they are")
    ] = True
    recalibrate: Annotated[
        int | None,
        Field(ge=1, le=10**6, description="mini-batches over which running statistics are computed anew at the end"),
    ] = None

    @model_validator(mode="after")
    def _options_have_a_use(self) -> Self:
        if self.group_size is not None and self.kind != "group":
            raise problem("group_size", f"has no use with kind: {self.kind}. Remove it, or set kind: group.")
        if self.recalibrate is not None and self.kind not in ("sync", "local"):
            raise problem("recalibrate", f"kind: {self.kind} has no running statistics to compute. Remove it.")
        return self
