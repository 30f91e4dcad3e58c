"""The training process of a rank: its entry point, and how it ends."""

import logging
import os
import sys
import time
import traceback
from contextlib import closing, suppress

import torch

from service.domain.rank_protocol import Cause, Errored, RankTask
from service.domain.spec import STORED
from service.training.channel import Channel
from service.training.errors import ChannelClosed, CheckpointFailed
from service.training.loop import train
from service.training.out_of_memory import is_out_of_memory
from service.training.world import is_collective_failure

_log = logging.getLogger(__name__)
_MAX_TEXT_CHARACTERS = 32_768


def main(task_json: str, channel_fd: int) -> int:
    """Run a task in this process, freshly forked, with its output already going to the rank's log.

    Args:
        task_json: a ``RankTask``.
        channel_fd: one end of a connected stream socket pair, for the messages of ``service.domain.rank_protocol``.

    Returns:
        The exit status: 0 after ``Finished``, 1 after ``Errored``. When a peer or the rank actor is gone the process
        ends here and now, with 1: a process group that lost a rank cannot be taken down in an orderly way.
    """
    _log_to_stdout()
    with closing(Channel(channel_fd)) as channel:
        return _run(task_json, channel)


def _run(task_json: str, channel: Channel) -> int:
    try:
        task = RankTask.model_validate_json(task_json, context=STORED)
        torch.set_num_threads(task.num_threads)
        channel.send(train(task, channel))
    except ChannelClosed as error:
        _log.error("%s", error)
        _exit_at_once()
    except BaseException as error:
        cause = _cause(error)
        _log.error("ends with an error (%s)", cause, exc_info=error)
        try:
            channel.send(_describe(error, cause))
        except ChannelClosed as closed:
            _log.error("%s", closed)
        if cause == "collective":
            _exit_at_once()
        return 1
    return 0


def _cause(error: BaseException) -> Cause:
    if isinstance(error, CheckpointFailed):
        return "checkpoint"
    if is_collective_failure(error):
        return "collective"
    return "memory" if is_out_of_memory(error) else "user"


def _describe(error: BaseException, cause: Cause) -> Errored:
    return Errored(
        cause=cause,
        error_type=type(error).__qualname__,
        message=_sendable(str(error)),
        traceback=_sendable("".join(traceback.format_exception(error))),
    )


def _sendable(text: str) -> str:
    # The end of a traceback says most. JSON takes no lone surrogates, which a file name in a message may hold.
    return text[-_MAX_TEXT_CHARACTERS:].encode(errors="backslashreplace").decode()


def _exit_at_once() -> None:
    with suppress(OSError):  # the disk of the log may be full
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(1)


def _log_to_stdout() -> None:
    handler = logging.StreamHandler(sys.stdout)
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
