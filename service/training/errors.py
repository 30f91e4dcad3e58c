"""Why a training process ends before its last step.

TrainingError
├── ChannelClosed        the rank actor went away; nobody is left to report to
├── CollectiveFailed     a peer did not answer or went away
├── CheckpointFailed     the training state could not be written
├── CheckpointMismatch   the checkpoint to continue from belongs to another specification
├── BadFactory           code that the job names cannot be imported, called or used
├── BadSample            a sample does not fit the dataset, the task or the model
├── DatasetError         the files that a job names cannot be read, or do not hold what it says
├── DeviceMissing        the job asks for a GPU and this process sees none
├── NotExact             the result depends on the number of workers, and the job says that it must not
├── NotFinite            the loss or its gradient is no longer a finite number
└── UnknownMetric        the job decides by a metric that its evaluations do not give
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


class BadFactory(TrainingError):
    """Code that the job names cannot be imported, called or used."""


class BadSample(TrainingError):
    """A sample does not fit the dataset, the task or the model."""


class DatasetError(TrainingError):
    """The files that a job names cannot be read, or do not hold what it says."""


class DeviceMissing(TrainingError):
    """The job asks for a GPU and this process sees none."""


class NotExact(TrainingError):
    """The result depends on the number of workers, and the job says that it must not."""


class NotFinite(TrainingError):
    """The loss or its gradient is no longer a finite number."""


class UnknownMetric(TrainingError):
    """The job decides by a metric that its evaluations do not give."""
