"""The builtin datasets' names and arguments."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from service.domain.catalog.arguments import FactoryArguments

NUM_DIGITS_IMAGES = 1797
NUM_DIABETES_PATIENTS = 442
MAX_CANVAS_PIXELS = 2**27

SplitSeed = Annotated[int, Field(ge=0, lt=2**31, description="which samples are kept for evaluation")]
Path = Annotated[
    str, Field(min_length=1, max_length=4096, description="a path on every node, a URL, or upload: and a SHA-256")
]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Size = tuple[Annotated[int, Field(ge=1, le=16384)], Annotated[int, Field(ge=1, le=16384)]]
NumClasses = Annotated[int | None, Field(ge=2, le=2**20, description="by default as many as the labels name")]


class HeldOutArguments(FactoryArguments):
    """Which share of a fixed collection is kept for evaluation."""

    test_fraction: Annotated[float, Field(gt=0.0, lt=0.9, description="share kept for evaluation")] = 0.2
    split_seed: SplitSeed = 0


class DigitsArguments(HeldOutArguments):
    """scikit-learn's handwritten digits: 1797 real images, 1×8×8, ten classes."""

    layout: Annotated[
        Literal["image", "sequence"],
        Field(description="image: 1×8×8; sequence: 8 features (a row's pixels) × 8 steps (rows)"),
    ] = "image"


class DiabetesArguments(HeldOutArguments):
    """scikit-learn's diabetes data: ten measurements of 442 patients, and its course (Efron et al. 2004)."""

    standardize_targets: Annotated[bool, Field(description="by mean and std of the training split")] = True


class DigitCanvasesArguments(HeldOutArguments):
    """Real digits on canvases: training and evaluation canvases show different originals."""

    num_training: Annotated[int, Field(ge=1, le=10**6, description="canvases to train on")] = 1000
    num_held_out: Annotated[int, Field(ge=1, le=10**6, description="canvases to evaluate")] = 200
    height: Annotated[int, Field(ge=8, le=4096)] = 48
    width: Annotated[int, Field(ge=8, le=4096)] = 48
    max_digits: Annotated[int, Field(ge=1, le=64, description="a canvas has one to that many")] = 3
    scale: Annotated[int, Field(ge=1, le=64, description="pixels of the canvas to one of the original's 8×8")] = 2
    noise: Annotated[float, Field(ge=0, le=100, description="std of what is added; digits are 0 to 1")] = 0.1

    @model_validator(mode="after")
    def _digits_fit(self) -> Self:
        if 8 * self.scale > min(self.height, self.width):
            raise _problem(
                "scale",
                f"a digit is {8 * self.scale} pixels wide, more than the canvas. Lower it, or enlarge the canvas.",
            )
        if (self.num_training + self.num_held_out) * self.height * self.width > MAX_CANVAS_PIXELS:
            raise _problem(
                "num_training",
                f"all canvases together have more than {MAX_CANVAS_PIXELS} pixels; ask for fewer or smaller.",
            )
        return self


class DigitsSegmentationArguments(DigitCanvasesArguments):
    """Which pixel belongs to which digit: 0 is background, 1 to 10 are the digits 0 to 9."""


class DigitsDetectionArguments(DigitCanvasesArguments):
    """Where the digits are, and which."""


class OwnFilesArguments(FactoryArguments):
    """Where a person's files are, and which share of their samples is kept for evaluation."""

    path: Path
    test_fraction: Annotated[float, Field(ge=0.0, lt=1.0, description="share kept for evaluation")] = 0.2
    split_seed: SplitSeed = 0


class NpzArguments(OwnFilesArguments):
    """Arrays of a NumPy archive."""

    inputs: Annotated[Name, Field(description="array of N inputs")] = "inputs"
    targets: Annotated[Name, Field(description="array of N targets")] = "targets"
    held_out_inputs: Annotated[Name | None, Field(description="instead of test_fraction")] = None
    held_out_targets: Annotated[Name | None, Field(description="instead of test_fraction")] = None
    num_classes: NumClasses = None
    normalize: Annotated[bool, Field(description="each channel by mean and std of the training split")] = True

    @model_validator(mode="after")
    def _held_out_arrays_come_together(self) -> Self:
        if (self.held_out_inputs is None) != (self.held_out_targets is None):
            missing = "held_out_inputs" if self.held_out_inputs is None else "held_out_targets"
            raise _problem(missing, "give both held_out_inputs and held_out_targets, or neither.")
        return self


class ImageArguments(FactoryArguments):
    """What an encoded image becomes."""

    size: Annotated[Size, Field(description="height and width of the inputs")] = (224, 224)
    fit: Annotated[
        Literal["center-crop", "resize"],
        Field(description="center-crop: the shorter side is made to fit, the rest cut off; resize: stretched"),
    ] = "center-crop"
    grayscale: Annotated[bool, Field(description="one channel instead of three")] = False
    mean: Annotated[
        tuple[Annotated[float, Field(ge=-1e3, le=1e3)], ...] | None,
        Field(min_length=1, max_length=3, description="subtracted from the channels, 0 to 1; ImageNet's by default"),
    ] = None
    std: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1e3)], ...] | None,
        Field(min_length=1, max_length=3, description="they are then divided by; ImageNet's by default"),
    ] = None

    @model_validator(mode="after")
    def _one_number_per_channel(self) -> Self:
        channels = 1 if self.grayscale else 3
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != channels:
                raise _problem(name, f"needs {channels} numbers, one per channel.")
        return self


class ImageFolderArguments(ImageArguments, OwnFilesArguments):
    """Images in one folder per class."""

    training_folder: Annotated[
        str, Field(max_length=4096, description="below path, the one that holds the classes")
    ] = ""
    held_out_folder: Annotated[
        Annotated[str, Field(min_length=1, max_length=4096)] | None,
        Field(description="likewise, instead of test_fraction"),
    ] = None


class ParquetArguments(OwnFilesArguments):
    """Columns of Parquet files."""

    inputs: Annotated[
        tuple[Name, ...],
        Field(min_length=1, max_length=4096, description="columns of numbers, or one column of lists of numbers"),
    ]
    targets: Annotated[
        tuple[Name, ...],
        Field(min_length=1, max_length=4096, description="one column of labels, or columns of floating-point values"),
    ]
    held_out_path: Annotated[Path | None, Field(description="instead of test_fraction")] = None
    input_shape: Annotated[
        tuple[Annotated[int, Field(ge=1, le=2**20)], ...] | None,
        Field(min_length=1, max_length=4, description="of one input: channels first"),
    ] = None
    num_classes: NumClasses = None
    normalize: Annotated[bool, Field(description="each channel by mean and std of the training split")] = True


class WebDatasetArguments(ImageArguments):
    """Samples in tar files."""

    shards: Annotated[
        Annotated[str, Field(min_length=1, max_length=4096)]
        | tuple[Annotated[str, Field(min_length=1, max_length=4096)], ...],
        Field(description="paths, URLs or uploads of tar files; {000..007} stands for eight of them"),
    ]
    held_out_shards: Annotated[
        Annotated[str, Field(min_length=1, max_length=4096)]
        | tuple[Annotated[str, Field(min_length=1, max_length=4096)], ...]
        | None,
        Field(description="instead of test_fraction"),
    ] = None
    test_fraction: Annotated[float, Field(ge=0.0, lt=1.0, description="share kept for evaluation")] = 0.2
    split_seed: SplitSeed = 0
    inputs: Annotated[Name, Field(description="extensions of the inputs")] = "png;jpg;jpeg;npy"
    targets: Annotated[Name, Field(description="extensions of the targets")] = "cls;json"
    json_field: Annotated[Name | None, Field(description="of a JSON target, where it is a mapping")] = None
    target_kind: Annotated[
        Literal["class", "value", "mask", "boxes"],
        Field(description="a label; numbers; an image of labels; or boxes and labels"),
    ] = "class"
    num_classes: NumClasses = None


DATASETS: Mapping[str, type[FactoryArguments]] = MappingProxyType(
    {
        "builtin:diabetes": DiabetesArguments,
        "builtin:digits": DigitsArguments,
        "builtin:digits-detection": DigitsDetectionArguments,
        "builtin:digits-segmentation": DigitsSegmentationArguments,
        "builtin:image-folder": ImageFolderArguments,
        "builtin:npz": NpzArguments,
        "builtin:parquet": ParquetArguments,
        "builtin:webdataset": WebDatasetArguments,
    }
)


def num_training_samples(factory: str, arguments: Mapping[str, object]) -> int | None:
    """Return how many samples a dataset trains on, or None if only its rank can tell.

    Args:
        factory: name of the dataset.
        arguments: arguments that fit its schema, where it is a builtin one.
    """
    count = _KNOWN_LENGTHS.get(factory)
    return None if count is None else count(DATASETS[factory].model_validate(dict(arguments)))


def num_held_out(num_samples: int, test_fraction: float) -> int:
    """Return how many of a collection's samples are kept for evaluation."""
    return round(num_samples * test_fraction)


def _rest_of(num_samples: int) -> Callable[[Any], int]:
    return lambda arguments: num_samples - num_held_out(num_samples, arguments.test_fraction)


def _num_canvases(arguments: Any) -> int:  # noqa: ANN401 - the schema that belongs to the name
    count: int = arguments.num_training
    return count


_KNOWN_LENGTHS: Mapping[str, Callable[[Any], int]] = MappingProxyType(
    {
        "builtin:diabetes": _rest_of(NUM_DIABETES_PATIENTS),
        "builtin:digits": _rest_of(NUM_DIGITS_IMAGES),
        "builtin:digits-detection": _num_canvases,
        "builtin:digits-segmentation": _num_canvases,
    }
)


def _problem(field: str, message: str) -> PydanticCustomError:
    # What service.domain.spec turns into a field below dataset.args and what to do.
    return PydanticCustomError("spec_problem", "{message}", {"field": field, "message": message})
