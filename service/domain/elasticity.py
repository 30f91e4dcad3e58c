"""On how many workers a job may run, and how many it may be asked to run on."""

from dataclasses import dataclass, field
from functools import lru_cache

from service.domain.errors import FieldProblem
from service.domain.job import Job
from service.domain.spec import BatchSpec, JobSpec, Workers

# So many worlds are named in an error.
_SHOWN = 12


def worlds_of(job: Job) -> tuple[int, ...]:
    """Return the numbers of workers that a job may be placed on now, largest first; never empty.

    Its owner may have asked for fewer workers than its specification allows.
    """
    worlds = exact_worlds(job.spec)
    if job.workers_wanted is not None:
        worlds = tuple(world for world in worlds if world <= job.workers_wanted)
    # None are left only of a job that an earlier version accepted; it is for its attempt to say what is wrong.
    return worlds or (job.spec.workers.min,)


def exact_worlds(spec: JobSpec) -> tuple[int, ...]:
    """Return the numbers of workers that compute a job exactly, of those that it asks for, largest first."""
    if not spec.workers.is_elastic:
        return (spec.workers.min,)
    return _exact_worlds(
        _Question(
            workers=spec.workers,
            batch=spec.batch,
            memory_bytes_per_rank=spec.resources.memory_bytes_per_rank,
            # The size of the dataset matters where the last mini-batch of an epoch is kept.
            dataset=None if spec.batch.drop_last else spec.dataset.model_dump_json(),
            spec=spec,
        )
    )


def resize_problem(spec: JobSpec, workers: int) -> FieldProblem | None:
    """Say why a job cannot be given so many workers; None if it can."""
    worlds = exact_worlds(spec)
    if workers in worlds:
        return None
    if not spec.workers.is_elastic:
        return FieldProblem(
            field="workers",
            message=f"the job was submitted for {spec.workers.min} worker(s). Only a job with workers: "
            "{min: …, max: …} can be resized; fork it with other workers.",
        )
    possible = ", ".join(str(world) for world in worlds[:_SHOWN]) + (", …" if len(worlds) > _SHOWN else "")
    if not spec.workers.min <= workers <= spec.workers.max:
        why = f"{workers} is not within the workers of the job, {spec.workers.min} to {spec.workers.max}"
    else:
        why = f"{workers} worker(s) cannot compute the job's batches exactly"
    return FieldProblem(field="workers", message=f"{why}. Use one of {possible}.")


@dataclass(frozen=True, kw_only=True)
class _Question:
    """All that the answer depends on; the scheduler asks it again and again."""

    workers: Workers
    batch: BatchSpec
    memory_bytes_per_rank: int | None
    dataset: str | None
    spec: JobSpec = field(compare=False)


@lru_cache(maxsize=4096)
def _exact_worlds(question: _Question) -> tuple[int, ...]:
    return question.spec.exact_worlds()
