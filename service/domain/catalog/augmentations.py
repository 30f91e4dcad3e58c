"""The builtin augmentations' names and arguments."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated

from pydantic import Field

from service.domain.catalog.arguments import FactoryArguments

Fill = Annotated[float, Field(ge=-1e6, le=1e6, description="what comes in from outside of the image")]
MaskFill = Annotated[int, Field(ge=-(2**31), lt=2**31, description="likewise in a mask; the task's ignore_index, say")]


class FlipArguments(FactoryArguments):
    """Mirrors an image, with its mask or boxes."""

    probability: Annotated[float, Field(ge=0, le=1)] = 0.5


class RandomCropArguments(FactoryArguments):
    """Cuts a part out of an image that may first be padded on all sides."""

    size: Annotated[
        tuple[Annotated[int, Field(ge=1, le=65536)], Annotated[int, Field(ge=1, le=65536)]] | None,
        Field(description="height and width of the part; by default those of the image"),
    ] = None
    padding: Annotated[int, Field(ge=0, le=65536, description="pixels on each side")] = 4
    fill: Fill = 0.0
    mask_fill: MaskFill = 0


class TranslateArguments(FactoryArguments):
    """Shifts an image by whole pixels, along each axis on its own."""

    max_pixels: Annotated[int, Field(ge=0, le=65536, description="in either direction")] = 4
    fill: Fill = 0.0
    mask_fill: MaskFill = 0


class NoiseArguments(FactoryArguments):
    """Adds Gaussian noise to the input."""

    std: Annotated[float, Field(ge=0, le=1e6, description="in units of the input")] = 0.1


AUGMENTATIONS: Mapping[str, type[FactoryArguments]] = MappingProxyType(
    {
        "horizontal-flip": FlipArguments,
        "vertical-flip": FlipArguments,
        "random-crop": RandomCropArguments,
        "translate": TranslateArguments,
        "noise": NoiseArguments,
    }
)
