"""The dry run of a job."""

import sys
from collections.abc import Sequence

from fastapi import APIRouter

from service.api.body import RequestDocument
from service.api.fit import fit_problem
from service.api.owner import RequestOwner
from service.api.parts import AppParts, Parts
from service.api.routes.jobs import SPEC_BODY
from service.api.schemas import Amount, Plan, PlannedStart, WorldPlan
from service.api.uploads import check_uploads
from service.domain.elasticity import exact_worlds
from service.domain.job import HELD_MESSAGE
from service.domain.picture import Picture, waits_for
from service.domain.scheduling import Pending, foretell
from service.domain.scheduling.estimate import remaining_s
from service.domain.spec import JobSpec, parse_spec

MAX_WORLDS = 64
# So many jobs that wait are reckoned with.
MAX_QUEUED = 2000
THIS_JOB = "this job"

router = APIRouter(prefix="/jobs", tags=["jobs"])


@router.post("/plan", openapi_extra=SPEC_BODY)
def plan_job(document: RequestDocument, parts: AppParts, owner: RequestOwner) -> Plan:
    """Check a job and say how it would run; starts and stores nothing."""
    spec = parse_spec(document.data)
    check_uploads(spec, parts.uploads.rows)
    obstacle = _obstacle(spec, parts.store.unfinished_before(spec))
    plans = [spec.batch_plan(world_size) for world_size in exact_worlds(spec)[:MAX_WORLDS]]
    batch = plans[0]
    fits, reason = _fit(spec, parts)
    return Plan(
        spec=spec,
        world_size=batch.world_size,
        samples_per_rank=list(batch.counts),
        num_micro_steps=batch.num_micro_steps,
        num_steps=spec.num_steps,
        worlds=[
            WorldPlan(
                world_size=plan.world_size,
                samples_per_rank=list(plan.counts),
                num_micro_steps=plan.num_micro_steps,
                groups=plan.num_groups,
            )
            for plan in plans
        ],
        resources=Amount.of(spec.resources_per_rank.times(batch.world_size)),
        fits=fits,
        reason=reason,
        start=_start(spec, parts, owner, obstacle) if fits else None,
    )


def _fit(spec: JobSpec, parts: Parts) -> tuple[bool | None, str | None]:
    if parts.capacity is not None and (problem := fit_problem(spec, parts.capacity)) is not None:
        return False, f"The job would be refused. {problem}"
    snapshot = parts.store.cluster()
    if snapshot.observed_at is None:
        return None, "The scheduler has not seen the cluster yet."
    problem = fit_problem(spec, snapshot.nodes)
    return (True, None) if problem is None else (False, f"The job would wait for more nodes. {problem}")


def _obstacle(spec: JobSpec, unfinished: Sequence[str]) -> str | None:
    """Say why the job would not start whatever is free; None if it might."""
    if spec.hold:
        return HELD_MESSAGE
    return waits_for(unfinished) if unfinished else None


def _start(spec: JobSpec, parts: Parts, owner: str, obstacle: str | None) -> PlannedStart:
    """Foretell what the scheduler would do with the job, from what it does with the others."""
    if obstacle is not None:
        return PlannedStart(now=False, message=obstacle, position=None, in_s=None)
    store = parts.store
    snapshot, live = store.cluster(), store.live_attempts()
    assert snapshot.observed_at is not None
    picture = Picture(resize_interval_s=0.0, stop_grace_s=0.0)
    picture.recall(live, snapshot.observed_at, 0.0)
    active, going_on = picture.active(live, 0.0), picture.going_on(live, 0.0)
    states = store.queue_states()
    decision, in_s = foretell(
        THIS_JOB,
        [*picture.pending(store.queued_jobs(limit=MAX_QUEUED), store.held_back()), _pending(spec, owner)],
        active,
        snapshot.nodes,
        queues=[state.queue for state in states],
        usage_s={state.queue.name: state.usage_s for state in states},
        going_on=going_on,
    )
    wait = next((wait for wait in decision.waits if wait.job_id == THIS_JOB), None)
    return PlannedStart(
        now=wait is None,
        message=wait and wait.message,
        position=wait and wait.position,
        in_s=in_s,
    )


def _pending(spec: JobSpec, owner: str) -> Pending:
    return Pending(
        id=THIS_JOB,
        queue=spec.queue,
        owner=owner,
        priority=spec.priority,
        sequence=sys.maxsize,
        worlds=exact_worlds(spec),
        per_rank=spec.resources_per_rank,
        layout=spec.placement,
        duration_s=remaining_s(ran_for_s=0.0, expected_s=spec.expected_s, timeout_s=spec.timeout_s),
    )
