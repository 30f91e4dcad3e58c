"""Random changes of training samples: functions of (seed, epoch, sample), whoever applies them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from service.domain.catalog.augmentations import (
    FlipArguments,
    NoiseArguments,
    RandomCropArguments,
    TranslateArguments,
)
from service.domain.spec import AugmentationSpec
from service.training.data.randomness import randomness_kept, seed_all
from service.training.data.source import Sample
from service.training.errors import BadFactory, BadSample
from service.training.factories import call_factory
from service.training.sampling import derive_seed

Augmentation = Callable[[Sample, torch.Generator], Sample]
"""One change of a sample; all that it draws comes from the generator, which lies on the CPU."""


class Transform(Protocol):
    """What is done to a training sample before it is stacked."""

    @property
    def reads_ahead(self) -> bool:
        """Whether a thread may apply it while the model computes: it touches no state that is shared."""

    def __call__(self, sample: Sample, *, epoch: int, index: int) -> Sample:
        """Return another sample; the given one is left as it is.

        Args:
            sample: as its source has it.
            epoch: pass over the samples, from 0.
            index: number of the sample.
        """


def build_augmentations(specs: Sequence[AugmentationSpec], seed: int) -> Transform | None:
    """Return what applies augmentations one after another; None where there are none.

    Args:
        specs: of the job.
        seed: of the job.

    Raises:
        BadFactory: an augmentation of the user's cannot be imported, called or used.
    """
    if not specs:
        return None  # so that a batch in memory is read as a whole
    return _Augmentations(
        steps=tuple(_build(spec, position) for position, spec in enumerate(specs)),
        seed=seed,
    )


@dataclass(frozen=True, kw_only=True)
class _Augmentations:
    steps: tuple[Augmentation, ...]
    seed: int

    @property
    def reads_ahead(self) -> bool:
        return not any(isinstance(step, _UserAugmentation) for step in self.steps)

    def __call__(self, sample: Sample, *, epoch: int, index: int) -> Sample:
        generator = torch.Generator()
        for position, augment in enumerate(self.steps):
            purpose = f"augmentation/{position}/{epoch}"
            generator.manual_seed(derive_seed(seed=self.seed, purpose=purpose, index=index))
            sample = augment(sample, generator)
        return sample


def _build(spec: AugmentationSpec, position: int) -> Augmentation:
    field = f"augmentation.{position}"
    if spec.factory is None:
        assert spec.name is not None
        return _BUILDERS[spec.name](spec.args, field)
    reference = spec.factory
    augment = call_factory(reference, spec.args, field=f"{field}.factory")
    if not callable(augment):
        raise BadFactory(
            f"{field}.factory: {reference} returned {type(augment).__name__}; let it return a function "
            "(sample, generator) -> sample."
        )
    return _UserAugmentation(augment=augment, field=field, reference=reference)


@dataclass(frozen=True, kw_only=True)
class _UserAugmentation:
    augment: Callable[[Sample, torch.Generator], Any]
    field: str
    reference: str

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        # Many draw from the generators that all of a process shares, whatever they are handed.
        with randomness_kept():
            seed_all(derive_seed(seed=generator.initial_seed(), purpose="shared generators"))
            result = self.augment(sample, generator)
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], torch.Tensor):
            raise BadFactory(
                f"{self.field}.factory: what {self.reference} returned gave {type(result).__name__} for a sample; "
                "return a Sample, or a pair of the input, a tensor, and the target."
            )
        return Sample(*result)


class _Geometric(ABC):
    """Changes an image together with the mask or the boxes that belong to it."""

    def __init__(self, field: str) -> None:
        self.field = field

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        if sample.input.ndim < 3:
            raise BadSample(
                f"{self.field}: inputs of shape {tuple(sample.input.shape)} are no images (channels, height, width); "
                "remove the augmentation."
            )
        return self.change(sample, generator)

    @abstractmethod
    def change(self, sample: Sample, generator: torch.Generator) -> Sample:
        """Change an image, (C, *, H, W)."""


class _Flip(_Geometric):
    def __init__(self, options: FlipArguments, field: str, *, axis: int) -> None:
        super().__init__(field)
        self._probability = options.probability
        self._axis = axis  # -1: left and right; -2: top and bottom

    def change(self, sample: Sample, generator: torch.Generator) -> Sample:
        if torch.rand((), generator=generator).item() >= self._probability:
            return sample
        length = sample.input.shape[self._axis]
        low, high = (0, 2) if self._axis == -1 else (1, 3)

        def flip_boxes(boxes: torch.Tensor) -> torch.Tensor:
            flipped = boxes.clone()
            flipped[:, low], flipped[:, high] = length - boxes[:, high], length - boxes[:, low]
            return flipped

        flipped = sample.input.flip(self._axis)
        return Sample(flipped, _change_target(sample, lambda mask: mask.flip(self._axis), flip_boxes))


class _Window(_Geometric):
    """Shows an image through a window: what lies outside of the image is filled."""

    def __init__(self, options: RandomCropArguments | TranslateArguments, field: str) -> None:
        super().__init__(field)
        self._options = options

    def change(self, sample: Sample, generator: torch.Generator) -> Sample:
        options = self._options
        image = (sample.input.shape[-2], sample.input.shape[-1])
        if isinstance(options, RandomCropArguments):
            size, margin = options.size or image, options.padding
        else:
            size, margin = image, options.max_pixels
        starts = []
        for axis, length, shown in zip(("height", "width"), image, size, strict=True):
            room = length + 2 * margin - shown
            if room < 0:
                raise BadSample(
                    f"{self.field}.args.size: {shown} is more than the {axis} of an image with its padding, "
                    f"{length} + 2·{margin}; lower it, or raise padding."
                )
            starts.append(int(torch.randint(room + 1, (), generator=generator)) - margin)
        top, left = starts
        height, width = size
        padding = (-left, left + width - image[1], -top, top + height - image[0])  # negative: cut off

        def move_boxes(boxes: torch.Tensor) -> torch.Tensor:
            moved = boxes - boxes.new_tensor([left, top, left, top])
            limits = boxes.new_tensor([width, height, width, height])
            return torch.minimum(moved.clamp(min=0), limits)

        target = _change_target(sample, lambda mask: F.pad(mask, padding, value=options.mask_fill), move_boxes)
        return Sample(F.pad(sample.input, padding, value=options.fill), target)


@dataclass(frozen=True)
class _Noise:
    std: float

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        inputs = sample.input if sample.input.is_floating_point() else sample.input.float()
        noise = torch.randn(inputs.shape, generator=generator, dtype=inputs.dtype)
        return Sample(inputs + self.std * noise, sample.target)


def _change_target(
    sample: Sample,
    change_mask: Callable[[torch.Tensor], torch.Tensor],
    change_boxes: Callable[[torch.Tensor], torch.Tensor],
) -> Any:  # noqa: ANN401 - see Sample.target
    """Change what belongs to places in the image; boxes of which nothing is left go, with all that belongs to them."""
    target = sample.target
    if isinstance(target, dict):
        changed = {name: _change_if_mask(value, sample.input, change_mask) for name, value in target.items()}
        if "boxes" in target:
            boxes = change_boxes(target["boxes"])
            kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
            changed["boxes"] = boxes
            changed = {
                name: value[kept] if isinstance(value, torch.Tensor) and value.shape[:1] == kept.shape else value
                for name, value in changed.items()
            }
        return changed
    return _change_if_mask(target, sample.input, change_mask)


def _change_if_mask(
    value: Any,  # noqa: ANN401 - see Sample.target
    image: torch.Tensor,
    change: Callable[[torch.Tensor], torch.Tensor],
) -> Any:  # noqa: ANN401
    is_mask = isinstance(value, torch.Tensor) and value.ndim >= 2 and value.shape[-2:] == image.shape[-2:]
    return change(value) if is_mask else value


_BUILDERS: Mapping[str, Callable[[Mapping[str, object], str], Augmentation]] = MappingProxyType(
    {
        "horizontal-flip": lambda args, field: _Flip(FlipArguments.model_validate(dict(args)), field, axis=-1),
        "vertical-flip": lambda args, field: _Flip(FlipArguments.model_validate(dict(args)), field, axis=-2),
        "random-crop": lambda args, field: _Window(RandomCropArguments.model_validate(dict(args)), field),
        "translate": lambda args, field: _Window(TranslateArguments.model_validate(dict(args)), field),
        "noise": lambda args, field: _Noise(NoiseArguments.model_validate(dict(args)).std),
    }
)
