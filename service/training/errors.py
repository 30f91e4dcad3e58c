"""Why a training process ends before its last step.

TrainingError
├── ChannelClosed        the rank actor went away; nobody is left to report to
├── CollectiveFailed     a peer did not answer or went away
├── CheckpointFailed     the training state could not be written
├── CheckpointMismatch   the checkpoint to continue from belongs to another specification
├── DeviceMissing        the job asks for a GPU and this process sees none
└── NotFinite            the loss or its gradient is no longer a finite number
"""


class TrainingError(Exception):
    """Base of the errors of a training process."""


class ChannelClosed(TrainingError):
    """The other end of the channel is gone, or does not read."""


class CollectiveFailed(TrainingError):
    """A peer did not answer or went away."""


class CheckpointFailed(TrainingError):
    """The training state could not be written."""


class CheckpointMismatch(TrainingError):
    """The checkpoint to continue from belongs to another specification."""


class DeviceMissing(TrainingError):
    """The job asks for a GPU and this process sees none."""


class NotFinite(TrainingError):
    """The loss or its gradient is no longer a finite number."""
