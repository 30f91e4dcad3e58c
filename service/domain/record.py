"""What the store returns and the API shows."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Base of immutable values."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
