"""What is learned: losses that add up over samples, and metrics over all ranks."""

from service.training.tasks.builders import build_task
from service.training.tasks.task import Loss, Ratio, Task, TaskMetrics, WorldGather, WorldSum

__all__ = ["Loss", "Ratio", "Task", "TaskMetrics", "WorldGather", "WorldSum", "build_task"]
