"""Images in one folder per class."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from service.domain.catalog.datasets import ImageFolderArguments
from service.training.data.context import DataContext
from service.training.data.files import FileTree, open_tree
from service.training.data.images import ImageDecoder
from service.training.data.source import Dataset, Sample, Source
from service.training.data.splits import split_rows
from service.training.errors import DatasetError

_EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")


def build_image_folder(arguments: Mapping[str, object], context: DataContext) -> Dataset:
    """List the images; each is decoded when it is needed. Inputs (C, H, W), float32; targets are labels.

    Classes are numbered by the names of their folders, in sorted order.
    """
    options = ImageFolderArguments.model_validate(dict(arguments))
    tree = open_tree(options.path, context, field="dataset.args.path")
    decoder = ImageDecoder.of(options)
    images = _list(tree, options.training_folder, where=options.path, field="dataset.args.training_folder")
    classes = sorted({name for _, name in images})
    labels = {name: label for label, name in enumerate(classes)}

    def source(chosen: Sequence[tuple[str, str]]) -> ImageFolderSource:
        names = [name for name, _ in chosen]
        return ImageFolderSource(tree, names, np.array([labels[name] for _, name in chosen], np.int64), decoder)

    if options.held_out_folder is None:
        rows = split_rows(len(images), test_fraction=options.test_fraction, seed=options.split_seed)
        training, held_out = ([images[row] for row in chosen] for chosen in rows)
    else:
        training = images
        held_out = _list(tree, options.held_out_folder, where=options.path, field="dataset.args.held_out_folder")
        unknown = sorted({name for _, name in held_out} - labels.keys())
        if unknown:
            raise DatasetError(
                f"dataset.args.held_out_folder: {options.held_out_folder} has a class {unknown[0]!r} that is not "
                f"trained on; the classes are {', '.join(classes[:20])}."
            )
    return Dataset(training=source(training), held_out=source(held_out), num_outputs=max(len(classes), 2))


class ImageFolderSource(Source):
    """Images that are decoded when they are read.

    Args:
        tree: where they lie.
        names: of N files in it.
        labels: (N,).
        decoder: of the files.
    """

    reads_ahead = True

    def __init__(self, tree: FileTree, names: Sequence[str], labels: NDArray[np.int64], decoder: ImageDecoder) -> None:
        self._tree = tree
        self._names = names
        self._labels = torch.from_numpy(labels)
        self._decoder = decoder

    def __len__(self) -> int:
        return len(self._names)

    def sample(self, index: int) -> Sample:
        """Read and decode one. Raises ``BadSample``, with the file's name."""
        name = self._names[index]
        image, _ = self._decoder.decode(self._tree.read(name), name=name)
        return Sample(image, self._labels[index])


def _list(tree: FileTree, folder: str, *, where: str, field: str) -> list[tuple[str, str]]:
    """Return names of images and of their classes, sorted by name."""
    prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
    found = []
    for name in tree.names:
        if name.startswith(prefix) and name.lower().endswith(_EXTENSIONS):
            class_name, slash, _ = name[len(prefix) :].partition("/")
            hidden = any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
            if slash and not hidden:
                found.append((name, class_name))
    if not found:
        inside = f"{folder} of {where}" if folder else where
        folders = sorted({name.partition("/")[0] for name in tree.names if "/" in name})
        raise DatasetError(
            f"{field}: {inside} has no images in folders of their classes. It needs class/image.png, with one of: "
            f"{' '.join(_EXTENSIONS)}." + (f" Folders there: {', '.join(folders[:20])}." if folders else "")
        )
    return found
