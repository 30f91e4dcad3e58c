"""What the routes take from a query and what they answer; jobs and their parts are the domain's own models."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.domain.batch_plan import MAX_WORLD_SIZE
from service.domain.job import Attempt, Checkpoint, Event, Job, JobStatus
from service.domain.placement import Node, Resources
from service.domain.queue import QueueState, Quota
from service.domain.spec import JobSpec
from service.domain.uploads import Upload

MAX_POSITION = 2**63 - 1
MAX_STEP = 2**31 - 1
PRINTABLE = r"^[^\x00-\x1f\x7f]*$"


class Query(BaseModel):
    """Base of query strings: a misspelt parameter is refused, where ignoring it would answer another question."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class JobQuery(Query):
    """Which jobs to list."""

    status: Annotated[list[JobStatus], Field(max_length=16, description="any of these; repeatable")] = []
    name: Annotated[str | None, Field(max_length=120, pattern=PRINTABLE)] = None
    queue: Annotated[str | None, Field(max_length=63, pattern=PRINTABLE)] = None
    owner: Annotated[str | None, Field(max_length=64, pattern=PRINTABLE)] = None
    label: Annotated[
        list[Annotated[str, Field(max_length=264, pattern=r"^[^=\x00-\x1f\x7f]+=[^\x00-\x1f\x7f]*$")]],
        Field(max_length=32, description="key=value, all of these; repeatable"),
    ] = []
    limit: Annotated[int, Field(ge=1, le=500)] = 50
    cursor: Annotated[str | None, Field(max_length=500, pattern=r"^[!-~]+$", description="the page to show")] = None


class EventQuery(Query):
    """Which events to list."""

    after: Annotated[int, Field(ge=0, le=MAX_POSITION, description="position of the last one seen")] = 0
    limit: Annotated[int, Field(ge=1, le=1000)] = 1000


class MetricQuery(Query):
    """Which metrics to show."""

    name: Annotated[
        list[Annotated[str, Field(max_length=200, pattern=PRINTABLE)]],
        Field(max_length=100, description="such as train/loss; repeatable; all by default"),
    ] = []
    after_step: Annotated[int, Field(ge=-1, le=MAX_STEP, description="leaves out this step and earlier ones")] = -1
    from_step: Annotated[int, Field(ge=0, le=MAX_STEP, description="the first step")] = 0
    to_step: Annotated[int | None, Field(ge=0, le=MAX_STEP, description="the last step; the latest by default")] = None
    max_points: Annotated[
        int | None,
        Field(ge=2, le=10_000, description="most points of a curve, rolled up if there are more; exact by default"),
    ] = None

    @property
    def first_step(self) -> int:
        """The first step that is asked for, in either way."""
        return max(self.from_step, self.after_step + 1)


class LogQuery(Query):
    """Which part of which log to show."""

    attempt: Annotated[int | None, Field(ge=1, le=MAX_STEP, description="the current one by default")] = None
    rank: Annotated[int, Field(ge=0, le=MAX_STEP)] = 0
    offset: Annotated[int | None, Field(ge=0, le=MAX_POSITION, description="first byte; the beginning by default")] = (
        None
    )
    limit: Annotated[int, Field(ge=1, le=2**23, description="most bytes of the answer")] = 2**20
    tail: Annotated[int | None, Field(ge=1, le=10**6, description="the last lines only; not with offset")] = None


class LogSearchQuery(Query):
    """What to look for, and in which logs."""

    q: Annotated[str, Field(min_length=1, max_length=1000, pattern=PRINTABLE, description="part of a line")]
    regex: Annotated[bool, Field(description="q is a regular expression in RE2's syntax")] = False
    ignore_case: bool = False
    attempt: Annotated[
        Annotated[int, Field(ge=1, le=MAX_STEP)] | Literal["all"] | None,
        Field(description="the current one by default"),
    ] = None
    rank: Annotated[int | None, Field(ge=0, le=MAX_STEP, description="all by default")] = None
    limit: Annotated[int, Field(ge=1, le=1000, description="most lines of the answer")] = 100
    cursor: Annotated[str | None, Field(max_length=500, pattern=r"^[!-~]+$", description="where to go on")] = None


class LogMatch(BaseModel):
    """A line that matches."""

    attempt: int
    rank: int
    offset: Annotated[int, Field(description="of the line's first byte")]
    text: Annotated[str, Field(description="the line; of one longer than 2000 characters the part around the match")]
    is_cut: Annotated[bool, Field(description="whether the text is only a part of the line")]


class LogMatches(BaseModel):
    """The lines that match, by attempt, rank and offset."""

    matches: list[LogMatch]
    next_cursor: Annotated[str | None, Field(description="where to go on; null once everything was searched")]


class UploadListQuery(Query):
    """How many uploads to list."""

    limit: Annotated[int, Field(ge=0, le=500)] = 50


class DatasetQuery(Query):
    """What an uploaded file of data is called."""

    name: Annotated[str, Field(max_length=200, description="of the file; its extension says what it is")]


class StreamQuery(Query):
    """Where a stream begins."""

    after: Annotated[
        int, Field(ge=0, le=MAX_POSITION, description="position in the feed; Last-Event-ID goes before it")
    ] = 0


class ResizeBody(BaseModel):
    """How many workers a job is to have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workers: Annotated[int, Field(strict=True, ge=1, le=MAX_WORLD_SIZE, description="one that computes it exactly")]


class ForkBody(BaseModel):
    """Where a fork begins, and what is different in it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: Annotated[
        int | None, Field(strict=True, ge=0, le=MAX_STEP, description="of the checkpoint; the latest by default")
    ] = None
    changes: Annotated[
        dict[Annotated[str, Field(max_length=200, pattern=r"^[^.]+(\.[^.]+){0,9}$|^labels\..+$")], Any],
        Field(max_length=100, description="fields of the job by name, nested or dotted, and their new values"),
    ] = {}


class QueueSettings(BaseModel):
    """How a queue is to be; what is left out is as in a new one."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    weight: Annotated[
        float, Field(gt=0, le=10**6, description="its share, in relation to the other queues that have jobs")
    ] = 1.0
    quota: Annotated[Quota, Field(description="the most that its jobs may hold together")] = Quota()
    quota_per_owner: Annotated[Quota, Field(description="likewise those of one owner")] = Quota()
    paused: Annotated[bool, Field(description="start nothing from it; what runs goes on")] = False


class QueueShown(QueueSettings):
    """A queue and what is in it."""

    name: str
    usage_s: Annotated[float, Field(description="decayed time for which its jobs held the whole cluster, in seconds")]
    num_queued: Annotated[int, Field(description="jobs that wait")]
    num_live: Annotated[int, Field(description="jobs that hold resources")]

    @classmethod
    def of(cls, state: QueueState) -> "QueueShown":
        """Show a queue."""
        counted = {"usage_s": state.usage_s, "num_queued": state.num_queued, "num_live": state.num_live}
        return cls.model_validate(state.queue.model_dump() | counted)


class QueueList(BaseModel):
    """The queues, by name."""

    queues: list[QueueShown]


class JobList(BaseModel):
    """A page of jobs, newest first."""

    jobs: tuple[Job, ...]
    next_cursor: Annotated[str | None, Field(description="cursor of the next page; null on the last one")]


class AttemptList(BaseModel):
    """The attempts of a job, in order."""

    attempts: tuple[Attempt, ...]


class EventList(BaseModel):
    """Events of a job, in order."""

    events: tuple[Event, ...]
    next_after: Annotated[int, Field(description="the `after` of the next request")]


class CheckpointList(BaseModel):
    """The committed checkpoints of a job, by step."""

    checkpoints: tuple[Checkpoint, ...]


class BundleList(BaseModel):
    """Bundles of code, newest first."""

    bundles: tuple[Upload, ...]
    max_bytes: Annotated[int, Field(description="how large one may be")]


class DatasetList(BaseModel):
    """Files of data, newest first."""

    datasets: tuple[Upload, ...]
    max_bytes: Annotated[int, Field(description="how large one may be")]


class Rollup(BaseModel):
    """What the points at neighbouring steps come to, in columns of the same length as the series."""

    bucket_steps: Annotated[int, Field(description="a power of two; a bucket begins at a multiple of it")]
    last_steps: Annotated[list[int], Field(description="of the points of each bucket")]
    counts: Annotated[list[int], Field(description="points with a finite value")]
    nonfinite_counts: Annotated[list[int], Field(description="the others")]
    min: Annotated[list[float | None], Field(description="of the finite values; null where there is none")]
    max: list[float | None]
    last: Annotated[list[float | None], Field(description="at the last step; null where it is not finite")]


class Series(BaseModel):
    """One metric over the steps, in columns of one length; rolled up, a place holds a bucket."""

    steps: Annotated[list[int], Field(description="of the points; the first of each bucket")]
    values: Annotated[
        list[float | None], Field(description="null where the value is not finite; the mean of the finite ones")
    ]
    attempts: Annotated[list[int], Field(description="which reported them; the last one of each bucket")]
    nonfinite: Annotated[
        dict[int, str], Field(description="step → nan, inf or -inf; where the last value of a bucket is not finite")
    ]
    rollup: Annotated[Rollup | None, Field(description="with max_points")] = None


class Metrics(BaseModel):
    """The training curves of a job, by name."""

    series: dict[str, Series]


class Amount(BaseModel):
    """An amount of resources."""

    cpus: float
    gpus: int
    memory_bytes: int

    @classmethod
    def of(cls, resources: Resources) -> "Amount":
        """Show an amount."""
        return cls(cpus=resources.cpus, gpus=resources.gpus, memory_bytes=resources.memory_bytes)


class WorldPlan(BaseModel):
    """How a number of workers computes an optimizer step."""

    world_size: int
    samples_per_rank: Annotated[list[int], Field(description="in the fullest micro-step")]
    num_micro_steps: Annotated[int, Field(description="normalization batches one after another")]
    groups: Annotated[int, Field(description="normalization batches side by side")]


class PlannedStart(BaseModel):
    """When a job would start if it were submitted now."""

    now: Annotated[bool, Field(description="whether it would start at once")]
    message: Annotated[str | None, Field(description="why it would wait; null if it would not")]
    position: Annotated[int | None, Field(description="its place in its queue, from 1; null if it waits in none")]
    in_s: Annotated[
        float | None,
        Field(description="in about so many seconds, by the estimates there are; null where they do not tell"),
    ]


class Plan(BaseModel):
    """What would become of a job if it were submitted."""

    spec: Annotated[JobSpec, Field(description="with every default written out")]
    world_size: Annotated[int, Field(description="the largest one")]
    samples_per_rank: Annotated[list[int], Field(description="in one micro-step")]
    num_micro_steps: Annotated[int, Field(description="normalization batches of one optimizer step, one after another")]
    worlds: Annotated[
        list[WorldPlan],
        Field(description="every number of workers that computes the job exactly, largest first; at most 64"),
    ]
    num_steps: Annotated[int | None, Field(description="null where only the dataset can tell")]
    resources: Annotated[Amount, Field(description="of all workers together")]
    fits: Annotated[
        bool | None, Field(description="whether the cluster, when empty, holds the job; null while it is unknown")
    ]
    reason: Annotated[str | None, Field(description="why it does not fit, or why that is unknown")]
    start: Annotated[PlannedStart | None, Field(description="null where the job does not fit, or that is unknown")]


class ClusterNode(BaseModel):
    """A machine of the cluster."""

    id: str
    address: str
    total: Amount

    @classmethod
    def of(cls, node: Node) -> "ClusterNode":
        """Show a node."""
        return cls(id=node.id, address=node.address, total=Amount.of(node.total))


class Cluster(BaseModel):
    """The cluster as the scheduler last saw it."""

    nodes: list[ClusterNode]
    total: Amount
    observed_at: Annotated[datetime | None, Field(description="null before the scheduler ever saw it")]


class Health(BaseModel):
    """That a process answers."""

    status: str
