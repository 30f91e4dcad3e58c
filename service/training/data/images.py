"""Encoded images become tensors."""

import io
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from service.domain.catalog.datasets import ImageArguments
from service.training.errors import BadSample

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_IMAGENET_GRAY_MEAN, _IMAGENET_GRAY_STD = (0.449,), (0.226,)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the pixels of an image come to lie: x ↦ scale·x − offset.

    Attributes:
        scale: along x and along y.
        offset: likewise, in pixels of the result.
        size: of the image before the cut: width and height.
    """

    scale: tuple[float, float]
    offset: tuple[int, int]
    size: tuple[int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageDecoder:
    """Decodes images to one size and standardizes them.

    Attributes:
        size: height and width of the result.
        crop: whether what does not fit is cut off; otherwise the image is stretched.
        grayscale: one channel instead of three.
        mean: (C, 1, 1), float32, of channels of 0 to 255.
        std: likewise.
    """

    size: tuple[int, int]
    crop: bool
    grayscale: bool
    mean: NDArray[np.float32]
    std: NDArray[np.float32]

    @classmethod
    def of(cls, options: ImageArguments) -> Self:
        """Return the decoder that arguments describe."""
        mean = options.mean or (_IMAGENET_GRAY_MEAN if options.grayscale else _IMAGENET_MEAN)
        std = options.std or (_IMAGENET_GRAY_STD if options.grayscale else _IMAGENET_STD)

        def per_channel(values: tuple[float, ...]) -> NDArray[np.float32]:
            return 255 * np.asarray(values, np.float32).reshape(-1, 1, 1)

        return cls(
            size=options.size,
            crop=options.fit == "center-crop",
            grayscale=options.grayscale,
            mean=per_channel(mean),
            std=per_channel(std),
        )

    def decode(self, data: bytes, *, name: str) -> tuple[torch.Tensor, Placement]:
        """Decode an image.

        Args:
            data: a file.
            name: of the file, for errors.

        Returns:
            The pixels, (C, H, W), float32, and where they came from.

        Raises:
            BadSample: it is no image, or a broken one.
        """
        image = _to_channels(_open(data, name), "L" if self.grayscale else "RGB", name)
        placement = self.place((image.width, image.height))
        pixels = np.asarray(self._fit(image, placement, Image.Resampling.BILINEAR), np.float32)
        channels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        return torch.from_numpy((channels - self.mean) / self.std), placement

    def decode_mask(self, data: bytes, *, name: str) -> torch.Tensor:
        """Decode an image of labels, (H, W), int64, which is resized without mixing them. Raises ``BadSample``."""
        image = _open(data, name)
        if image.mode not in ("1", "L", "P", "I", "I;16"):
            raise BadSample(f"dataset: mask {name} is a {image.mode} image; labels are stored in a single channel.")
        fitted = self._fit(image, self.place((image.width, image.height)), Image.Resampling.NEAREST)
        return torch.from_numpy(np.asarray(fitted).astype(np.int64))

    def place(self, size: tuple[int, int]) -> Placement:
        """Return where an image comes to lie.

        Args:
            size: its width and height.
        """
        height, width = self.size
        scale = (width / size[0], height / size[1])
        if not self.crop:
            return Placement(scale=scale, offset=(0, 0), size=(width, height))
        larger = max(scale)
        resized = (max(width, round(size[0] * larger)), max(height, round(size[1] * larger)))
        return Placement(
            scale=(resized[0] / size[0], resized[1] / size[1]),
            offset=((resized[0] - width) // 2, (resized[1] - height) // 2),
            size=resized,
        )

    def _fit(self, image: Image.Image, placement: Placement, resample: Image.Resampling) -> Image.Image:
        (left, top), (height, width) = placement.offset, self.size
        if image.size != placement.size:
            image = image.resize(placement.size, resample)
        return image if image.size == (width, height) else image.crop((left, top, left + width, top + height))


def _open(data: bytes, name: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except Exception as error:
        # Pillow's decoders raise whatever comes to their mind on broken data.
        raise BadSample(
            f"dataset: {name} cannot be decoded: {type(error).__name__}: {error}. Replace or remove it."
        ) from error
    return image


def _to_channels(image: Image.Image, mode: str, name: str) -> Image.Image:
    """Return an image of the mode, or of mode F where 16 bits have to become 0 to 255 without a loss."""
    if image.mode.startswith("I"):  # Pillow would clip at 255
        pixels = np.asarray(image, np.float32) / np.float32(257)
        return Image.fromarray(pixels)
    if image.mode == "F":
        raise BadSample(f"dataset: {name} has floating-point pixels, of an unknown range; use builtin:npz for those.")
    if image.mode in ("RGBA", "LA", "PA", "P", "La", "RGBa"):  # what shines through is black
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert(mode)
