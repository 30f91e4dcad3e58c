"""What became of the checkpoints that were written beside the training, told to the rank actor."""

from typing import Literal

from service.domain.journal import Warned
from service.domain.rank_protocol import Staged
from service.training.channel import Channel
from service.training.checkpoint_writer import CheckpointWriter
from service.training.errors import CheckpointFailed


class CheckpointDelivery:
    """Reports checkpoints that were written, and does what the job says about those that could not be.

    Args:
        writer: of the checkpoints.
        channel: to the rank actor.
        on_failure: whether training goes on without a checkpoint that could not be written.
    """

    def __init__(self, writer: CheckpointWriter, channel: Channel, on_failure: Literal["continue", "stop"]) -> None:
        self._writer = writer
        self._channel = channel
        self._on_failure = on_failure

    def deliver_written(self) -> None:
        """Report what has been written since the last call, without waiting.

        Raises:
            CheckpointFailed: one could not be, and the job is to stop then.
        """
        for outcome in self._writer.outcomes(wait=False):
            self._deliver(outcome)

    def deliver_all(self) -> None:
        """Wait for what is being written, and report it.

        Raises:
            CheckpointFailed: the last one could not be written, which is the result of the job; or an earlier one, and
                the job is to stop then.
        """
        outcomes = self._writer.outcomes(wait=True)
        for outcome in outcomes[:-1]:
            self._deliver(outcome)
        for outcome in outcomes[-1:]:
            if isinstance(outcome, CheckpointFailed):
                raise outcome
            self._deliver(outcome)

    def _deliver(self, outcome: Staged | CheckpointFailed) -> None:
        if isinstance(outcome, Staged):
            self._channel.send(outcome)
        elif self._on_failure == "stop":
            raise outcome
        else:
            self._channel.send(Warned(message=f"{outcome} Training goes on; the checkpoint before it stays."))
