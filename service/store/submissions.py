"""Jobs that are submitted together: one transaction, an outcome for each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.engine import Connection

from service.domain.errors import IdempotencyConflict, InvalidSpec
from service.domain.job import Job
from service.domain.ports import IdempotencyKey
from service.domain.spec import JobSpec
from service.store import idempotency
from service.store.idempotency import Holder, Name, name_of
from service.store.ids import new_job_id
from service.store.jobs import get_job
from service.store.new_jobs import NewJob, find_relations, insert_jobs


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job to be stored once for its key.

    Attributes:
        spec: what was submitted.
        owner: whose it is.
        key: names the request; None: it has its effect however often it comes.
    """

    spec: JobSpec
    owner: str
    key: IdempotencyKey | None


def submit_all(
    connection: Connection, submissions: Sequence[Submission], time: datetime
) -> list[tuple[Job, bool] | Exception]:
    """Store what was not submitted before.

    Args:
        connection: in a transaction for writing.
        submissions: in order; the first of those with one key is the one that counts.
        time: now.

    Returns:
        For each its job, and whether it was created for it; or why it is refused, which touches no other.
    """
    candidates = [NewJob(id=new_job_id(), spec=one.spec, owner=one.owner) for one in submissions]
    every = list(zip(submissions, candidates, find_relations(connection, candidates), strict=True))
    holders: dict[Name, Holder] = {}
    claims: dict[IdempotencyKey, str] = {}
    for one, candidate, after in every:
        if one.key is not None and not isinstance(after, InvalidSpec) and name_of(one.key) not in holders:
            holders[name_of(one.key)] = (one.key.body_sha256, candidate.id)
            claims[one.key] = candidate.id
    # What cannot be stored may have been, when what it refers to was still there.
    unsure = {one.key for one, _, _ in every if one.key is not None and name_of(one.key) not in holders}
    unsure |= idempotency.claim_keys(connection, claims, time)
    holders.update(idempotency.find_responses(connection, unsure))
    new, relations = [], []
    for one, candidate, after in every:
        is_first = one.key is None or holders.get(name_of(one.key), ("", None))[1] == candidate.id
        if is_first and not isinstance(after, InvalidSpec):
            new.append(candidate)
            relations.append(after)
    created = {job.id: job for job in insert_jobs(connection, new, relations, time)}
    return [
        _outcome(connection, one.key, candidate.id, holders, created, after if isinstance(after, InvalidSpec) else None)
        for one, candidate, after in every
    ]


def _outcome(
    connection: Connection,
    key: IdempotencyKey | None,
    job_id: str,
    holders: Mapping[Name, Holder],
    created: Mapping[str, Job],
    refusal: InvalidSpec | None,
) -> tuple[Job, bool] | Exception:
    holder = None if key is None else holders.get(name_of(key))
    if key is not None and holder is not None and holder[1] != job_id:
        try:
            idempotency.check_body(key, holder[0])
        except IdempotencyConflict as error:
            return error
        return created.get(holder[1]) or get_job(connection, holder[1]), False
    return refusal or (created[job_id], True)
