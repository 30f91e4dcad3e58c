"""The builtin models' names, arguments and the tasks whose outputs they give."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from service.domain.catalog.arguments import EXTERNAL_FACTORY, EXTERNAL_LIBRARY, FactoryArguments

PER_SAMPLE = frozenset({"classification", "regression"})
"""Tasks whose outputs are (N, num_outputs)."""

PER_PIXEL = frozenset({"segmentation", "regression"})
"""Tasks whose outputs are (N, num_outputs, *spatial)."""

Width = Annotated[int, Field(ge=1, le=65536)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]


class ModelArguments(FactoryArguments):
    """Arguments of a builtin model.

    Attributes:
        tasks: those of the service's tasks that the model's outputs fit.
    """

    tasks: ClassVar[frozenset[str]]


class MlpArguments(ModelArguments):
    """A fully connected network: Linear → BatchNorm → ReLU blocks, then a linear layer."""

    tasks: ClassVar[frozenset[str]] = PER_SAMPLE

    hidden_sizes: Annotated[tuple[Width, ...], Field(min_length=1, max_length=64)] = (128, 128)
    dropout: Probability = 0.0


class SmallCnnArguments(ModelArguments):
    """A convolutional network for small inputs of one, two or three spatial dimensions."""

    tasks: ClassVar[frozenset[str]] = PER_SAMPLE

    channels: Annotated[tuple[Width, ...], Field(min_length=1, max_length=16)] = (16, 32, 64)
    dropout: Probability = 0.0


class SmallResNetArguments(ModelArguments):
    """A residual convolutional network for small images (He et al. 2016): a stem and stages of basic blocks."""

    tasks: ClassVar[frozenset[str]] = PER_SAMPLE

    width: Annotated[int, Field(ge=1, le=4096, description="channels of the first stage, doubled at each next")] = 16
    blocks_per_stage: Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(min_length=1, max_length=5)] = (
        1,
        1,
    )


class ResNetArguments(ModelArguments):
    """A residual network for ImageNet (He et al. 2016)."""

    tasks: ClassVar[frozenset[str]] = PER_SAMPLE

    stem: Literal["imagenet", "cifar"] = "imagenet"
    zero_init_residual: bool = False


class UnetArguments(ModelArguments):
    """A U-Net for images (Ronneberger et al. 2015), with batch norm."""

    tasks: ClassVar[frozenset[str]] = PER_PIXEL

    depth: Annotated[int, Field(ge=1, le=8, description="how often the resolution is halved")] = 3
    width: Annotated[int, Field(ge=1, le=1024, description="channels of the first level, doubled at each next")] = 16


class Unet3dArguments(ModelArguments):
    """A U-Net for volumes (Çiçek et al. 2016)."""

    tasks: ClassVar[frozenset[str]] = PER_PIXEL

    depth: Annotated[int, Field(ge=1, le=6, description="how often the resolution is halved")] = 3
    width: Annotated[int, Field(ge=1, le=512, description="channels of the first convolution")] = 8


class RecurrentArguments(ModelArguments):
    """A recurrent network for sequences, with batch norm over time and batch (Laurent et al. 2016)."""

    tasks: ClassVar[frozenset[str]] = PER_SAMPLE

    cell: Literal["lstm", "gru"] = "lstm"
    hidden_size: Annotated[int, Field(ge=1, le=65536)] = 64
    num_layers: Annotated[int, Field(ge=1, le=32)] = 2
    bidirectional: bool = False
    pooling: Literal["last", "mean"] = "last"
    dropout: Probability = 0.0


class DetectorArguments(ModelArguments):
    """A one-stage detector without anchors (after FCOS, Tian et al. 2019)."""

    tasks: ClassVar[frozenset[str]] = frozenset({"detection"})

    stride: Literal[4, 8] = 4
    width: Annotated[int, Field(ge=1, le=1024, description="channels of the first stage, doubled at each next")] = 16
    num_blocks: Annotated[int, Field(ge=0, le=64, description="residual blocks at the final resolution")] = 2
    head_depth: Annotated[int, Field(ge=1, le=8, description="convolutions of each head before its last")] = 2


MODELS: Mapping[str, type[ModelArguments]] = MappingProxyType(
    {
        "builtin:detector": DetectorArguments,
        "builtin:mlp": MlpArguments,
        "builtin:recurrent": RecurrentArguments,
        "builtin:resnet18": ResNetArguments,
        "builtin:resnet34": ResNetArguments,
        "builtin:resnet50": ResNetArguments,
        "builtin:small-cnn": SmallCnnArguments,
        "builtin:small-resnet": SmallResNetArguments,
        "builtin:unet": UnetArguments,
        "builtin:unet3d": Unet3dArguments,
    }
)

KNOWN_TASKS = frozenset[str]().union(*(schema.tasks for schema in MODELS.values()))


def unsuited_to_task(factory: str, task: str) -> str | None:
    """Say why a model's outputs do not fit a task; None where they do, or where only training can tell.

    Args:
        factory: name of the model.
        task: name of the task; one that the job brings itself takes any model.
    """
    if task not in KNOWN_TASKS or EXTERNAL_FACTORY.match(factory):
        return None
    if EXTERNAL_LIBRARY.match(factory):
        if task in PER_SAMPLE:
            return None
        return (
            f"{factory} is built as a classifier or regressor, which does not fit the task {task}. Take a builtin "
            "model, or return the library's own from a function of your code, package.module:function."
        )
    suited = MODELS[factory].tasks
    if task in suited:
        return None
    fitting = ", ".join(name for name, schema in MODELS.items() if task in schema.tasks)
    return f"{factory} is for {' or '.join(sorted(suited))}, not for {task}. For that there are {fitting}."
