"""Whether a job's result depends on how many ranks run it, as far as can be seen."""

from collections.abc import Collection, Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from service.domain.spec import JobSpec
from service.training.tasks import Loss, Task
from service.training.wording import first_of
from syncbn import SyncBatchNorm


class Exactness:
    """Collects what makes the result depend on the number of ranks.

    Args:
        spec: the job.
        task: what it learns.
        model: as it will be trained.

    Attributes:
        reasons: in words; none, as long as nothing was found.
    """

    reasons: list[str]

    def __init__(self, spec: JobSpec, task: Task, model: nn.Module) -> None:
        self.reasons = []
        # Those of synchronized norms are the same on every rank; that local ones are not is said below.
        self._statistics = {
            f"{path}.{name}" if path else name
            for path, layer in model.named_modules()
            if isinstance(layer, _BatchNorm)
            for name, _ in layer.named_buffers(recurse=False)
        }
        if spec.norm.kind == "local":
            self.reasons.append(
                "norm.kind is local: each worker normalizes its own samples. norm.kind: sync normalizes them together."
            )
        if spec.precision == "float16":
            self.reasons.append(
                "precision is float16: whether a sum overflows, and the step is skipped, depends on the samples that a "
                "worker adds up. bfloat16 does not overflow."
            )
        ghosts = [
            name for name, layer in model.named_modules() if isinstance(layer, SyncBatchNorm) and layer.ghost_size
        ]
        if ghosts:
            self.reasons.append(
                f"model: {first_of(sorted(ghosts))} cuts ghost batches out of each worker's own samples."
            )
        if task.unsuited is not None:
            self.reasons.append(f"task: {task.unsuited}")

    def observe(
        self, loss: Loss, *, changed_buffers: Iterable[str], draws_others: bool, misfits: Collection[str]
    ) -> None:
        """Take in what a forward and a backward did.

        Args:
            loss: of it.
            changed_buffers: names of the model's buffers that changed.
            draws_others: whether random numbers were drawn by anything but ``nn.Dropout*``.
            misfits: paths of dropout layers whose inputs were not laid out by samples.
        """
        found = []
        if not loss.adds_up:
            found.append("task: its loss is a mean whose parts do not add up. Return (sum, weight) from its loss.")
        if draws_others:
            found.append(
                "model: it draws random numbers other than those of nn.Dropout, each worker its own. Use nn.Dropout "
                "layers, or draw nothing."
            )
        if misfits:
            found.append(f"model: {first_of(sorted(misfits))} drops out values that are not laid out by samples.")
        buffers = [name for name in changed_buffers if name not in self._statistics]
        if buffers:
            found.append(f"model: it changes {first_of(sorted(buffers))} in its forward, on each worker by itself.")
        self.add(found)

    def add(self, reasons: Iterable[str]) -> None:
        """Take in reasons, such as those that another rank found."""
        self.reasons += [reason for reason in reasons if reason not in self.reasons]
