"""What all parts of a specification have in common."""

from types import MappingProxyType
from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints
from pydantic_core import PydanticCustomError

# A metric's name, such as eval/accuracy.
MetricName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+(/[A-Za-z0-9_.@-]+)+$", max_length=200)]

STORED = MappingProxyType({"stored": True})
"""The context in which a specification is read back that was accepted before; what is asked of new ones may differ."""


class SpecModel(BaseModel):
    """Base of the parts of a specification: immutable, finite numbers only, unknown fields refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def problem(field: str, message: str) -> PydanticCustomError:
    """Return an error for a validator to raise about a field below the model it checks.

    Args:
        field: dotted path relative to that model.
        message: what is wrong and what to do.
    """
    return PydanticCustomError("spec_problem", "{message}", {"field": field, "message": message})
