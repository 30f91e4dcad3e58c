"""What a training process says, passed on in order; checkpoints are uploaded beside it, in their order."""

import shutil
import socket
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from service.cluster.rank_end import RankEnd
from service.cluster.report_sender import ReportSender
from service.domain.errors import ServiceError, StaleWrite
from service.domain.journal import Warned
from service.domain.ports import UPLOAD_TIMEOUT_S, Launch
from service.domain.rank_protocol import Errored, Finished, FromRank, Staged, parse_from_rank
from service.storage.checkpoints import publish_checkpoint
from service.storage.layout import seal_marker
from service.storage.object_store import ObjectStore


class Conversation:
    """One process's; ``receive`` until its end, then ``close``.

    Args:
        launch: the attempt.
        rank: of the process.
        reports: the way to the supervisor.
        store: run storage, for the checkpoints.
    """

    def __init__(self, launch: Launch, rank: int, reports: ReportSender, store: ObjectStore) -> None:
        self._launch = launch
        self._rank = rank
        self._reports = reports
        self._store = store
        self._pending = b""
        self._uploader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload")
        self._uploads: list[Future[Errored | None]] = []
        self._error: Errored | None = None
        self._refused: Errored | None = None  # the first checkpoint that run storage did not take
        self._finished: Finished | None = None
        self._is_sealed = False  # the service has given the attempt up, and another one may run

    def receive(self, channel: socket.socket) -> bool:
        """Take in what can be read now; False at the end of it.

        Where the job is to stop when a checkpoint cannot be stored, or may not be since the attempt is over, that is
        the end of it too: a process that is hung up on ends at once.
        """
        if self._refused is not None and self._stops_without_checkpoint:
            with suppress(OSError):  # it has hung up itself
                channel.shutdown(socket.SHUT_RDWR)
            return False
        try:
            data = channel.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            return False
        *lines, self._pending = (self._pending + data).split(b"\n")
        self._take([parse_from_rank(line) for line in lines])
        return True

    def close(self, exit_status: int) -> RankEnd:
        """Wait for the uploads and say how it ended."""
        # A checkpoint that could not be stored is a warning while later ones may follow; the last one is the result.
        last_upload = self._uploads[-1].result(UPLOAD_TIMEOUT_S) if self._uploads else None
        self._uploader.shutdown()
        # The end of a rank may overtake its reports on the way to the supervisor, which would close its journal.
        self._reports.arrive()
        finished = self._finished
        hung_up_for = self._refused if self._stops_without_checkpoint and finished is None else None
        return RankEnd(
            exit_status=exit_status,
            step=None if finished is None else finished.step,
            stopped=finished is not None and finished.stopped,
            error=self._error or last_upload or hung_up_for,
            note="" if finished is None else finished.note,
        )

    @property
    def _stops_without_checkpoint(self) -> bool:
        return self._is_sealed or self._launch.spec.checkpoint.on_failure == "stop"

    def _take(self, messages: Sequence[FromRank]) -> None:
        reports: list[Any] = []
        for message in messages:
            if isinstance(message, Errored):
                self._error = message
            elif isinstance(message, Finished):
                self._finished = message
            elif isinstance(message, Staged):
                self._reports.send(reports)
                reports = []
                self._uploads.append(self._uploader.submit(self._upload, message))
            else:
                reports.append(message)
        self._reports.send(reports)

    def _upload(self, staged: Staged) -> Errored | None:
        directory = Path(staged.directory)
        job_id, attempt = self._launch.job_id, self._launch.attempt
        try:
            self._is_sealed = self._store.exists(seal_marker(job_id, attempt))
            if self._is_sealed:
                raise StaleWrite(f"attempt {attempt} has been given up.")
            written = publish_checkpoint(self._store, job_id, attempt, staged.step, directory)
        except (OSError, ServiceError) as error:
            message = f"The checkpoint of step {staged.step} could not be stored: {error}"
            self._reports.send([Warned(message=message, rank=self._rank)])
            refused = Errored(cause="checkpoint", error_type=type(error).__name__, message=message, traceback="")
            self._refused = self._refused or refused
            return refused
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        self._reports.send([written])
        return None
