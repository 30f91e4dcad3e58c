"""The factories that come with the service: their names, argument schemas and what they need.

Only names and schemas live here, so that a specification is checked without importing torch; the training
package builds the things themselves, and a test proves that both lists agree.
"""

from service.domain.catalog.arguments import EXTERNAL_FACTORY, EXTERNAL_LIBRARY, FactoryArguments
from service.domain.catalog.datasets import DATASETS, num_training_samples
from service.domain.catalog.models import MODELS, unsuited_to_task

__all__ = [
    "DATASETS",
    "EXTERNAL_FACTORY",
    "EXTERNAL_LIBRARY",
    "MODELS",
    "FactoryArguments",
    "num_training_samples",
    "unsuited_to_task",
]
