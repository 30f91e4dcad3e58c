"""The service as Python methods, typed by the domain's models."""

import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, TypeAdapter, ValidationError

from service.client.answers import JobPlan, LogChunk, LogMatch, Series, node_of, queue_state_of
from service.client.bundling import open_bundle
from service.client.connection import Connection
from service.client.discovery import Endpoint
from service.client.download import download_file
from service.client.errors import JobNotFound, ServiceUnreachable, UnexpectedAnswer, WaitTimeout
from service.client.patience import Patience
from service.client.stream import StreamItem, stream_job
from service.client.uploads import send_upload, upload_limit
from service.domain.job import Attempt, Checkpoint, Event, Job, JobStatus
from service.domain.ports import ClusterSnapshot, JobPage
from service.domain.queue import Queue, QueueState
from service.domain.spec import STORED, JobSpec
from service.domain.uploads import Upload

MANIFEST = "manifest.json"
POLL_S = 0.3

Model = TypeVar("Model", bound=BaseModel)
Answered = TypeVar("Answered")
_TIME = TypeAdapter[datetime | None](datetime | None)


class Client:
    """A client of the service; a context manager that closes its connections.

    Args:
        url: where the service is.
        token: what it asks for.
        owner: whose the jobs are that it submits; None: of nobody in particular.
        retry_for_s: how long a request is repeated that was not answered, or answered with 503.
        reconnect_for_s: how long ``stream``, ``wait`` and ``follow_log`` wait for a service that is away; None: for
            ever.
        locate: says where the service is now; asked when it does not answer.
        on_interruption: called when one of those begins to wait for a service that is away.

    Every method raises a ``ClientError``: see ``service.client.errors``.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        owner: str | None = None,
        retry_for_s: float = 5.0,
        reconnect_for_s: float | None = 60.0,
        locate: Callable[[], Endpoint] | None = None,
        on_interruption: Callable[[], None] | None = None,
    ) -> None:
        self._connection = Connection(Endpoint(url=url, token=token), retry_for_s=retry_for_s, locate=locate)
        self._owner = owner
        self._reconnect_for_s = reconnect_for_s
        self._on_interruption = on_interruption

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._connection.close()

    def submit(self, spec: JobSpec, *, idempotency_key: str | None = None) -> Job:
        """Submit a job; repeating it after a lost answer does not submit a second one.

        Args:
            spec: the job.
            idempotency_key: names the request; by default a new one, for this call and its repetitions.
        """
        return self._post("/v1/jobs", spec.model_dump_json(), idempotency_key)

    def plan(self, spec: JobSpec) -> JobPlan:
        """Say what would become of a job if it were submitted; starts nothing."""
        data = self._connection.json("POST", "/v1/jobs/plan", content=spec.model_dump_json(), headers=_JSON)
        return _parse(JobPlan, data)

    def get(self, job_id: str) -> Job:
        """Return a job."""
        return _parse(Job, self._connection.json("GET", _path(job_id)))

    def list_jobs(
        self,
        *,
        statuses: Sequence[JobStatus] = (),
        name: str | None = None,
        queue: str | None = None,
        owner: str | None = None,
        labels: Sequence[tuple[str, str]] = (),
        limit: int = 50,
        cursor: str | None = None,
    ) -> JobPage:
        """Return a page of jobs, newest first, that match everything given."""
        params = {
            "status": [str(status) for status in statuses],
            "name": name,
            "queue": queue,
            "owner": owner,
            "label": [f"{key}={value}" for key, value in labels],
            "limit": limit,
            "cursor": cursor,
        }
        data = self._connection.json("GET", "/v1/jobs", params=_given(params))
        return JobPage(jobs=_parse_all(Job, data, "jobs"), next_cursor=data.get("next_cursor"))

    def cancel(self, job_id: str) -> Job:
        """Cancel a job, or ask for it; asking again changes nothing."""
        return self._post(f"{_path(job_id)}/cancel")

    def pause(self, job_id: str) -> Job:
        """Pause a job, or ask for it; one that runs saves a checkpoint first. Asking again changes nothing."""
        return self._post(f"{_path(job_id)}/pause")

    def resume(self, job_id: str) -> Job:
        """Queue a job again that was paused, has failed or was cancelled; it goes on from its last checkpoint."""
        return self._post(f"{_path(job_id)}/resume")

    def resize(self, job_id: str, workers: int) -> Job:
        """Let an elastic job have so many workers from now on, as soon as there is room for them."""
        return self._post(f"{_path(job_id)}/resize", json.dumps({"workers": workers}))

    def fork(
        self,
        job_id: str,
        *,
        step: int | None = None,
        changes: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Submit a job that goes on from a checkpoint of another one; its metrics begin after that step.

        Args:
            job_id: of the other job.
            step: of the checkpoint; the latest by default.
            changes: fields that differ, nested as in a specification or by dotted paths, such as
                ``{"optimizer.learning_rate": 0.01, "steps": 2000}``. Weights and optimizer state have to fit.
            idempotency_key: names the request; by default a new one, for this call and its repetitions.
        """
        body = json.dumps({"step": step, "changes": dict(changes or {})})
        return self._post(f"{_path(job_id)}/fork", body, idempotency_key)

    def queues(self) -> tuple[QueueState, ...]:
        """Return every queue and what is in it, by name."""
        data = self._connection.json("GET", "/v1/queues")
        return tuple(queue_state_of(one) for one in data["queues"])

    def put_queue(self, queue: Queue) -> QueueState:
        """Make a queue, or give it these settings."""
        content = queue.model_dump_json(exclude={"name"})
        data = self._connection.json("PUT", f"/v1/queues/{quote(queue.name, safe='')}", content=content, headers=_JSON)
        return queue_state_of(data)

    def remove_queue(self, name: str) -> None:
        """Remove a queue whose jobs have all ended."""
        self._connection.request("DELETE", f"/v1/queues/{quote(name, safe='')}")

    def attempts(self, job_id: str) -> tuple[Attempt, ...]:
        """Return the attempts at a job, in order."""
        return _parse_all(Attempt, self._connection.json("GET", f"{_path(job_id)}/attempts"), "attempts")

    def events(self, job_id: str, *, after: int = 0, limit: int = 1000) -> tuple[Event, ...]:
        """Return events after a position, in order."""
        params = {"after": after, "limit": limit}
        return _parse_all(Event, self._connection.json("GET", f"{_path(job_id)}/events", params=params), "events")

    def metrics(
        self,
        job_id: str,
        *,
        names: Iterable[str] = (),
        after_step: int = -1,
        to_step: int | None = None,
        max_points: int | None = None,
    ) -> dict[str, Series]:
        """Return the training curves by name.

        Args:
            job_id: of which job.
            names: of the metrics; none: all of them.
            after_step: leaves out this step and earlier ones.
            to_step: the last step; None: the latest.
            max_points: most points of a curve, 2 to 10 000; one with more is rolled up. None: every point.
        """
        asked = {"name": list(names), "after_step": after_step, "to_step": to_step, "max_points": max_points}
        params = _given(asked)
        data = self._connection.json("GET", f"{_path(job_id)}/metrics", params=params)
        return {name: _parse(Series, columns) for name, columns in data.get("series", {}).items()}

    def log(
        self,
        job_id: str,
        *,
        attempt: int | None = None,
        rank: int = 0,
        offset: int | None = None,
        limit: int | None = None,
        tail: int | None = None,
    ) -> LogChunk:
        """Return a part of what a rank printed.

        Args:
            job_id: of which job.
            attempt: of which attempt; the current one by default.
            rank: of which rank.
            offset: first byte.
            limit: most bytes.
            tail: the last lines only; not with ``offset``.
        """
        params = _given({"attempt": attempt, "rank": rank, "offset": offset, "limit": limit, "tail": tail})
        response = self._connection.request("GET", f"{_path(job_id)}/logs", params=params)
        try:
            return LogChunk(
                attempt=int(response.headers["Log-Attempt"]),
                rank=rank,
                start=int(response.headers["Log-Start-Offset"]),
                content=response.content,
                next_offset=int(response.headers["Log-Next-Offset"]),
                ended=response.headers["Log-Ended"] == "true",
            )
        except (KeyError, ValueError):
            raise UnexpectedAnswer(_OTHER_VERSION) from None

    def follow_log(
        self, job_id: str, *, attempt: int | None = None, rank: int = 0, offset: int = 0
    ) -> Iterator[LogChunk]:
        """Yield what a rank prints until its attempt has ended, or, where none is named, the job.

        Survives a restart of the service. The chunks of a further attempt begin anew at offset 0.
        """
        patience = self._patience()
        number, at = attempt, offset
        while True:
            try:
                chunk = self.log(job_id, attempt=number or None, rank=rank, offset=at)
                job = self.get(job_id) if chunk.ended and not chunk.content else None
            except ServiceUnreachable:
                if not patience.pause():
                    raise
                continue
            patience.renew()
            number, at = chunk.attempt, chunk.next_offset
            if chunk.content:
                yield chunk
            elif job is not None and (attempt is not None or (job.status.is_terminal and number == job.attempt)):
                return
            elif job is not None and job.attempt > number:
                number, at = job.attempt, 0
            else:
                time.sleep(POLL_S)

    def follow_logs(self, job_id: str, *, attempt: int | None = None) -> Iterator[LogChunk]:
        """Yield what all ranks print, as ``follow_log`` does for one; their chunks come in turns."""
        patience = self._patience()
        number = 0
        while True:
            job = _patiently(patience, lambda: self.get(job_id))
            wanted = attempt or job.attempt
            if wanted > number:
                number = wanted
                attempts = _patiently(patience, lambda: self.attempts(job_id))
                world_size = next((one.world_size for one in attempts if one.number == number), 1)
                yield from self._follow_attempt(job_id, number, world_size, patience)
                if attempt is not None:
                    return
            elif job.status.is_terminal:
                return
            else:
                time.sleep(POLL_S)

    def _follow_attempt(self, job_id: str, number: int, world_size: int, patience: Patience) -> Iterator[LogChunk]:
        offsets = dict.fromkeys(range(world_size), 0)
        while offsets:
            is_quiet = True
            for rank, offset in list(offsets.items()):
                chunk = _patiently(patience, partial(self.log, job_id, attempt=number, rank=rank, offset=offset))
                offsets[rank] = chunk.next_offset
                if chunk.content:
                    is_quiet = False
                    yield chunk
                elif chunk.ended:
                    del offsets[rank]
            if is_quiet and offsets:
                time.sleep(POLL_S)

    def search_log(
        self,
        job_id: str,
        text: str,
        *,
        regex: bool = False,
        ignore_case: bool = False,
        rank: int | None = None,
        attempt: int | Literal["all"] | None = None,
    ) -> Iterator[LogMatch]:
        """Yield the lines that ranks of a job printed and that contain a text, as they are found.

        Args:
            job_id: of which job.
            text: part of a line.
            regex: the text is a regular expression in RE2's syntax.
            ignore_case: upper and lower case make no difference.
            rank: of which rank; all by default.
            attempt: of which attempt; the current one by default.
        """
        params = _given({"q": text, "rank": rank, "attempt": attempt, "limit": 1000})
        params |= {"regex": regex, "ignore_case": ignore_case}
        while True:
            data = self._connection.json("GET", f"{_path(job_id)}/logs/search", params=params)
            yield from _parse_all(LogMatch, data, "matches")
            if data.get("next_cursor") is None:
                return
            params["cursor"] = data["next_cursor"]

    def stream(self, job_id: str, *, after: int = 0) -> Iterator[StreamItem]:
        """Yield events and metric points as they come, in order, until the job has ended.

        Survives a restart of the service: nothing is left out and nothing comes twice.

        Args:
            job_id: of which job.
            after: position in the feed; 0 for everything so far.
        """
        return stream_job(self._connection, f"{_path(job_id)}/stream", after=after, patience=self._patience())

    def wait(self, job_id: str, *, timeout_s: float | None = None) -> Job:
        """Return the job once it has ended; one that is paused has not.

        Raises:
            WaitTimeout: it had not within the time.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        patience = self._patience()
        while True:
            try:
                job = self.get(job_id)
            except ServiceUnreachable:
                if not patience.pause():
                    raise
                continue
            patience.renew()
            if job.status.is_terminal:
                return job
            left_s = POLL_S if deadline is None else deadline - time.monotonic()
            if left_s <= 0:
                raise WaitTimeout(f"Job {job_id} is still {job.status} after {timeout_s:g} s; it goes on.")
            time.sleep(min(POLL_S, left_s))

    def checkpoints(self, job_id: str) -> tuple[Checkpoint, ...]:
        """Return the committed checkpoints, by step."""
        return _parse_all(Checkpoint, self._connection.json("GET", f"{_path(job_id)}/checkpoints"), "checkpoints")

    def download(
        self, job_id: str, *, to: Path, step: int | None = None, on_bytes: Callable[[int], None] | None = None
    ) -> Checkpoint:
        """Download the files of a checkpoint into a directory.

        Each file is written under another name, resumed where an earlier try stopped, compared with its SHA-256 and
        only then given its own name; a file that is there already and right is left alone.

        Args:
            job_id: of which job.
            to: the directory; made if it is not there.
            step: of which checkpoint; the latest by default.
            on_bytes: called with the bytes of each piece that arrives.

        Returns:
            The checkpoint, whose files now lie in ``to``, beside its ``manifest.json``.

        Raises:
            DownloadFailed: what arrives is not what the checkpoint says.
        """
        checkpoint = self._checkpoint(job_id, step)
        to.mkdir(parents=True, exist_ok=True)
        folder = f"{_path(job_id)}/checkpoints/{checkpoint.step}/files"
        hashes = {file.name: file.sha256 for file in checkpoint.files}
        # The manifest last: a directory that has one is whole.
        hashes[MANIFEST] = hashes.pop(MANIFEST, checkpoint.manifest_sha256)
        for name, sha256 in hashes.items():
            patience = self._patience()
            source = f"{folder}/{quote(name, safe='')}"
            download_file(
                self._connection, source, to=to, name=name, sha256=sha256, patience=patience, on_bytes=on_bytes
            )
        return checkpoint

    def upload_bundle(
        self, path: Path, *, again: bool = False, on_bytes: Callable[[int], None] | None = None
    ) -> Upload:
        """Upload code, for jobs to name by its hash as ``code.bundle``; nothing is sent that the service has.

        Args:
            path: a directory, packed as ``service.client.bundling.pack_directory`` says, or a zip archive.
            again: send it though the service has it, which repairs a copy that storage has damaged.
            on_bytes: called with the number of bytes of each piece that is sent.

        Raises:
            UploadFailed: it cannot be packed, or is larger than the service takes.
            OSError: it cannot be read.
        """
        with open_bundle(path, upload_limit(self._connection, "/v1/bundles")) as file:
            data = send_upload(
                self._connection,
                "/v1/bundles",
                file,
                what=f"The bundle of {path}",
                again=again,
                patience=self._patience(),
                on_bytes=on_bytes,
            )
        return _parse(Upload, data)

    def upload_dataset(
        self,
        path: Path,
        *,
        name: str | None = None,
        again: bool = False,
        on_bytes: Callable[[int], None] | None = None,
    ) -> Upload:
        """Upload a file of data, for jobs to name as ``upload:`` and its hash; nothing is sent that the service has.

        Args:
            path: a .npz, .zip, .parquet or .tar file.
            name: what to keep it under; by default its own name.
            again: send it though the service has it, which repairs a copy that storage has damaged.
            on_bytes: called with the number of bytes of each piece that is sent.

        Raises:
            UploadFailed: it is larger than the service takes.
            OSError: it cannot be read.
        """
        with path.open("rb") as file:
            data = send_upload(
                self._connection,
                "/v1/datasets",
                file,
                what=str(path),
                name=name or path.name,
                again=again,
                patience=self._patience(),
                on_bytes=on_bytes,
            )
        return _parse(Upload, data)

    def cluster(self) -> ClusterSnapshot:
        """Return the nodes as the scheduler last saw them."""
        data = self._connection.json("GET", "/v1/cluster")
        try:
            nodes = tuple(node_of(node) for node in data["nodes"])
            return ClusterSnapshot(nodes=nodes, observed_at=_TIME.validate_python(data["observed_at"]))
        except (KeyError, TypeError, ValidationError):
            raise UnexpectedAnswer(_OTHER_VERSION) from None

    def _post(self, path: str, content: str | None = None, idempotency_key: str | None = None) -> Job:
        """Ask for something that is done once, however often the request has to be repeated."""
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4()), **({} if content is None else _JSON)}
        if self._owner is not None:
            headers["Syncbn-Owner"] = self._owner
        return _parse(Job, self._connection.json("POST", path, content=content, headers=headers))

    def _patience(self) -> Patience:
        return Patience(self._reconnect_for_s, on_first_pause=self._on_interruption)

    def _checkpoint(self, job_id: str, step: int | None) -> Checkpoint:
        checkpoints = self.checkpoints(job_id)
        chosen = [one for one in checkpoints if step in (None, one.step)]
        if not chosen:
            which = "no checkpoint yet" if step is None else f"no checkpoint of step {step}"
            raise JobNotFound(f"Job {job_id} has {which}. `syncbn checkpoints {job_id}` lists them.", 404)
        return chosen[-1]


_JSON = {"Content-Type": "application/json"}
_OTHER_VERSION = "The service answers in a form that this client does not know. Install the version of the service."


def _path(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"


def _given(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}


def _patiently(patience: Patience, ask: Callable[[], Answered]) -> Answered:
    """Ask until the service answers. Raises ``ServiceUnreachable`` when patience is at its end."""
    while True:
        try:
            answer = ask()
        except ServiceUnreachable:
            if not patience.pause():
                raise
        else:
            patience.renew()
            return answer


def _parse(model: type[Model], data: object) -> Model:
    try:
        return model.model_validate(data, context=STORED)  # of whatever version the service is
    except ValidationError:
        raise UnexpectedAnswer(_OTHER_VERSION) from None


def _parse_all(model: type[Model], data: Mapping[str, Any], key: str) -> tuple[Model, ...]:
    items = data.get(key)
    if not isinstance(items, list):
        raise UnexpectedAnswer(_OTHER_VERSION)
    return tuple(_parse(model, item) for item in items)
