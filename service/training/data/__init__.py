from service.training.data.augmentation import Transform, build_augmentations
from service.training.data.builders import DATASET_BUILDERS, build_dataset
from service.training.data.loader import Loader
from service.training.data.source import Batch, Dataset, InMemorySource, Sample, Source, Stream, collate

__all__ = [
    "DATASET_BUILDERS",
    "Batch",
    "Dataset",
    "InMemorySource",
    "Loader",
    "Sample",
    "Source",
    "Stream",
    "Transform",
    "build_augmentations",
    "build_dataset",
    "collate",
]
