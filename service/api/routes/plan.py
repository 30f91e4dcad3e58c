"""The dry run of a job."""

from fastapi import APIRouter

from service.api.body import RequestDocument
from service.api.fit import fit_problem
from service.api.parts import AppParts, Parts
from service.api.routes.jobs import SPEC_BODY
from service.api.schemas import Amount, Plan, WorldPlan
from service.api.uploads import check_uploads
from service.domain.elasticity import exact_worlds
from service.domain.spec import JobSpec, parse_spec

MAX_WORLDS = 64

router = APIRouter(prefix="/jobs", tags=["jobs"])


@router.post("/plan", openapi_extra=SPEC_BODY)
def plan_job(document: RequestDocument, parts: AppParts) -> Plan:
    """Check a job and say how it would run; starts and stores nothing."""
    spec = parse_spec(document.data)
    check_uploads(spec, parts.uploads.rows)
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
    )


def _fit(spec: JobSpec, parts: Parts) -> tuple[bool | None, str | None]:
    if parts.capacity is not None and (problem := fit_problem(spec, parts.capacity)) is not None:
        return False, f"The job would be refused. {problem}"
    snapshot = parts.store.cluster()
    if snapshot.observed_at is None:
        return None, "The scheduler has not seen the cluster yet."
    problem = fit_problem(spec, snapshot.nodes)
    return (True, None) if problem is None else (False, f"The job would wait for more nodes. {problem}")
