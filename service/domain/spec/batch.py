"""The batches of a job, and the workers that share them."""

from typing import Annotated, Any, Self

from pydantic import Field, GetJsonSchemaHandler, model_serializer, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from service.domain.batch_plan import MAX_WORLD_SIZE, divisors
from service.domain.spec.base import SpecModel, problem


class BatchSpec(SpecModel):
    """The batches of the job; the same whatever the number of workers."""

    size: Annotated[int, Field(ge=1, le=2**24, description="samples of one optimizer step, over all workers")]
    normalization_size: Annotated[
        int | None,
        Field(ge=1, le=2**24, description="samples normalized together; divides size, by default all of it"),
    ] = None
    max_per_rank: Annotated[int | None, Field(ge=1, le=2**24, description="most samples a worker holds at once")] = None
    memory_bytes_per_sample: Annotated[
        int | None, Field(ge=1, le=2**50, description="what each sample adds to a worker's memory")
    ] = None
    memory_bytes_fixed: Annotated[
        int, Field(ge=0, le=2**50, description="what a worker needs however few samples it holds")
    ] = 0
    drop_last: Annotated[bool, Field(description="whether an epoch's last, partial mini-batch is left out")] = True

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


class Workers(SpecModel):
    """How many ranks train together: a number, or a range within which the service chooses and may change its mind."""

    min: Annotated[int, Field(ge=1, le=MAX_WORLD_SIZE)]
    max: Annotated[int, Field(ge=1, le=MAX_WORLD_SIZE)]

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: object) -> object:
        if isinstance(value, bool | float | str):
            raise problem("", "must be a whole number, or {min: …, max: …}.")
        if isinstance(value, int):
            if not 1 <= value <= MAX_WORLD_SIZE:
                raise problem("", f"must be between 1 and {MAX_WORLD_SIZE}.")
            return {"min": value, "max": value}
        return value

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            raise problem("min", f"{self.min} is more than max={self.max}. Swap them.")
        return self

    @model_serializer
    def _to_number(self) -> int | dict[str, int]:
        return self.min if self.min == self.max else {"min": self.min, "max": self.max}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        number: dict[str, Any] = {"type": "integer", "minimum": 1, "maximum": MAX_WORLD_SIZE}
        both = {"type": "object", "properties": {"min": number, "max": number}}
        return {"anyOf": [number, {**both, "required": ["min", "max"], "additionalProperties": False}]}

    @property
    def is_elastic(self) -> bool:
        """Whether the service may choose."""
        return self.min < self.max

    def __str__(self) -> str:
        return f"{self.min}–{self.max}" if self.is_elastic else str(self.min)
