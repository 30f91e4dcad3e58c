"""The factories that come with the service: their names, argument schemas and what they need.

Only names and schemas live here, so that a specification is checked without importing torch; the training
package builds the things themselves, and a test proves that both lists agree.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class FactoryArguments(BaseModel):
    """Arguments of a builtin factory; unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MlpArguments(FactoryArguments):
    """A fully connected network: Linear → BatchNorm → ReLU blocks, then a linear classifier."""

    hidden_sizes: Annotated[tuple[Annotated[int, Field(ge=1, le=65536)], ...], Field(min_length=1, max_length=64)] = (
        128,
        128,
    )


class SmallResNetArguments(FactoryArguments):
    """A residual convolutional network for small images (He et al. 2016): a stem and stages of basic blocks."""

    width: Annotated[int, Field(ge=1, le=4096, description="channels of the first stage, doubled at each next")] = 16
    blocks_per_stage: Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(min_length=1, max_length=5)] = (
        1,
        1,
    )


class DigitsArguments(FactoryArguments):
    """scikit-learn's handwritten digits: 1797 real images, 1×8×8, ten classes."""

    test_fraction: Annotated[float, Field(gt=0.0, lt=0.9, description="share kept for evaluation")] = 0.2
    split_seed: Annotated[int, Field(ge=0, lt=2**31, description="which images are kept")] = 0


NUM_DIGITS_IMAGES = 1797

MODELS: Mapping[str, type[FactoryArguments]] = MappingProxyType(
    {"builtin:mlp": MlpArguments, "builtin:small-resnet": SmallResNetArguments}
)
DATASETS: Mapping[str, type[FactoryArguments]] = MappingProxyType({"builtin:digits": DigitsArguments})


def num_training_samples(factory: str, arguments: Mapping[str, object]) -> int | None:
    """Return how many samples a builtin dataset trains on, or None if only its rank can tell.

    Args:
        factory: name in ``DATASETS``.
        arguments: arguments that fit its schema.
    """
    if factory == "builtin:digits":
        fraction = DigitsArguments.model_validate(dict(arguments)).test_fraction
        return NUM_DIGITS_IMAGES - round(NUM_DIGITS_IMAGES * fraction)
    return None
