"""What a user submits, part by part."""

from service.domain.spec.base import STORED, SpecModel, problem
from service.domain.spec.batch import BatchSpec, Workers
from service.domain.spec.checkpoint import CheckpointSpec, KeepBestSpec
from service.domain.spec.execution import (
    CodeSpec,
    DiagnosticsSpec,
    EvaluationSpec,
    ExactnessSpec,
    LoadingSpec,
    RehearsalSpec,
    ResourcesSpec,
    RetrySpec,
)
from service.domain.spec.factories import AugmentationSpec, DatasetSpec, FactorySpec, ModelSpec
from service.domain.spec.job import JobSpec
from service.domain.spec.norm import NormSpec
from service.domain.spec.optimization import (
    AdamWSpec,
    EarlyStoppingSpec,
    EmaSpec,
    LarsSpec,
    OptimizerSpec,
    ScheduleSpec,
    SgdSpec,
)
from service.domain.spec.parsing import parse_spec
from service.domain.spec.problems import field_problems
from service.domain.spec.task import (
    ClassificationTask,
    CustomTask,
    DetectionTask,
    RegressionTask,
    SegmentationTask,
    TaskSpec,
)

__all__ = [
    "STORED",
    "AdamWSpec",
    "AugmentationSpec",
    "BatchSpec",
    "CheckpointSpec",
    "ClassificationTask",
    "CodeSpec",
    "CustomTask",
    "DatasetSpec",
    "DetectionTask",
    "DiagnosticsSpec",
    "EarlyStoppingSpec",
    "EmaSpec",
    "EvaluationSpec",
    "ExactnessSpec",
    "FactorySpec",
    "JobSpec",
    "KeepBestSpec",
    "LarsSpec",
    "LoadingSpec",
    "ModelSpec",
    "NormSpec",
    "OptimizerSpec",
    "RegressionTask",
    "RehearsalSpec",
    "ResourcesSpec",
    "RetrySpec",
    "ScheduleSpec",
    "SegmentationTask",
    "SgdSpec",
    "SpecModel",
    "TaskSpec",
    "Workers",
    "field_problems",
    "parse_spec",
    "problem",
]
