"""Jobs that are submitted together: one transaction, an outcome for each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.engine import Connection

from service.domain.errors import IdempotencyConflict, InvalidSpec
from service.domain.job import Job
from service.domain.ports import IdempotencyKey
from service.store import idempotency
from service.store.idempotency import Holder, Name, name_of
from service.store.jobs import get_job
from service.store.new_jobs import NewJob, find_relations, insert_jobs


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job to be stored once for its key.

    Attributes:
        new: the job; its id is used if it is the first of its key.
        key: names the request; None: it has its effect however often it comes.
    """

    new: NewJob
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
    relations = find_relations(connection, [one.new for one in submissions])
    holders: dict[Name, Holder] = {}
    claims: dict[IdempotencyKey, str] = {}
    for one, after in zip(submissions, relations, strict=True):
        if one.key is not None and not isinstance(after, InvalidSpec) and name_of(one.key) not in holders:
            holders[name_of(one.key)] = (one.key.body_sha256, one.new.id)
            claims[one.key] = one.new.id
    # What cannot be stored may have been, when what it refers to was still there.
    unsure = {
        one.key
        for one, after in zip(submissions, relations, strict=True)
        if one.key is not None and isinstance(after, InvalidSpec) and name_of(one.key) not in holders
    }
    unsure |= idempotency.claim_keys(connection, claims, time)
    holders.update(idempotency.find_responses(connection, unsure))
    new, their_relations = [], []
    for one, after in zip(submissions, relations, strict=True):
        is_first = one.key is None or holders.get(name_of(one.key), ("", None))[1] == one.new.id
        if is_first and not isinstance(after, InvalidSpec):
            new.append(one.new)
            their_relations.append(after)
    created = {job.id: job for job in insert_jobs(connection, new, their_relations, time)}
    return [
        _outcome(connection, one, after, holders, created) for one, after in zip(submissions, relations, strict=True)
    ]


def _outcome(
    connection: Connection,
    submission: Submission,
    relations: object,
    holders: Mapping[Name, Holder],
    created: Mapping[str, Job],
) -> tuple[Job, bool] | Exception:
    job_id = submission.new.id
    holder = None if submission.key is None else holders.get(name_of(submission.key))
    if submission.key is not None and holder is not None:
        body_sha256, job_id = holder
        try:
            idempotency.check_body(submission.key, body_sha256)
        except IdempotencyConflict as error:
            return error
        if job_id != submission.new.id:
            return created.get(job_id) or get_job(connection, job_id), False
    if isinstance(relations, InvalidSpec):
        return relations
    return created[job_id], True
