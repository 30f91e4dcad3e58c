"""The task that a specification names."""

from service.domain.spec import (
    ClassificationTask,
    CustomTask,
    DetectionTask,
    RegressionTask,
    SegmentationTask,
    TaskSpec,
)
from service.training.tasks.classification import Classification
from service.training.tasks.custom import Custom
from service.training.tasks.detection import Detection
from service.training.tasks.regression import Regression
from service.training.tasks.segmentation import Segmentation
from service.training.tasks.task import Task


def build_task(spec: TaskSpec) -> Task:
    """Build the task that a specification names.

    Args:
        spec: the job's ``task``.

    Raises:
        BadFactory: the job's own code cannot be used.
    """
    match spec:
        case ClassificationTask():
            return Classification(label_smoothing=spec.label_smoothing, class_weights=spec.class_weights)
        case SegmentationTask():
            return Segmentation(ignore_index=spec.ignore_index, dice_weight=spec.dice_weight)
        case DetectionTask():
            return Detection(
                box_weight=spec.box_weight,
                score_threshold=spec.score_threshold,
                iou_threshold=spec.iou_threshold,
            )
        case RegressionTask():
            return Regression(loss=spec.loss, huber_delta=spec.huber_delta)
        case CustomTask():
            return Custom(spec.factory, spec.args)
