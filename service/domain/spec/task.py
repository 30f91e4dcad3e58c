"""What is learned: decides the loss and the metrics."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from service.domain.spec.base import SpecModel
from service.domain.spec.factories import CodeReference, FactoryArgs


class ClassificationTask(SpecModel):
    """One class for each sample: cross-entropy."""

    name: Literal["classification"] = "classification"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    class_weights: Annotated[
        tuple[Annotated[float, Field(ge=0, le=1e6)], ...] | None, Field(min_length=1, max_length=65536)
    ] = None


class SegmentationTask(SpecModel):
    """One class for each pixel or voxel: cross-entropy, and a soft Dice loss beside it."""

    name: Literal["segmentation"]
    ignore_index: Annotated[int, Field(ge=-(2**31), lt=2**31, description="label of pixels that do not count")] = 255
    dice_weight: Annotated[float, Field(ge=0, le=1e6, description="of the Dice loss of each sample")] = 0.0


class DetectionTask(SpecModel):
    """Boxes with a class each: focal loss and generalized IoU, as a one-stage detector learns (Tian et al. 2019)."""

    name: Literal["detection"]
    box_weight: Annotated[float, Field(gt=0, le=1e6, description="of the boxes' loss beside the classes'")] = 1.0
    score_threshold: Annotated[float, Field(ge=0, le=1, description="less certain boxes are dropped")] = 0.05
    iou_threshold: Annotated[float, Field(gt=0, le=1, description="of the non-maximum suppression")] = 0.5


class RegressionTask(SpecModel):
    """Real values for each sample."""

    name: Literal["regression"]
    loss: Literal["mse", "l1", "huber"] = "mse"
    huber_delta: Annotated[float, Field(gt=0, le=1e6, description="where ``huber`` turns from square to line")] = 1.0


class CustomTask(SpecModel):
    """A loss, and metrics, of your own code."""

    factory: CodeReference
    args: FactoryArgs = Field(default_factory=dict)


def _from_name(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


def _tag(value: object) -> Any:  # noqa: ANN401 - pydantic takes any hashable, and None for no tag
    if isinstance(value, SpecModel):
        return getattr(value, "name", "custom")
    if not isinstance(value, Mapping):
        return None
    return "custom" if "factory" in value else value.get("name")


TaskSpec = Annotated[
    Annotated[ClassificationTask, Tag("classification")]
    | Annotated[SegmentationTask, Tag("segmentation")]
    | Annotated[DetectionTask, Tag("detection")]
    | Annotated[RegressionTask, Tag("regression")]
    | Annotated[CustomTask, Tag("custom")],
    Discriminator(_tag),
    BeforeValidator(_from_name),
]
