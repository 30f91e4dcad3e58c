"""What the library raises.

* SyncBatchNormError
  * ArgumentError (also a ValueError)
    * SingleValueError
  * UnsupportedDeviceError (also a RuntimeError)
  * CollectiveError (also a RuntimeError)
    * DivergenceError
  * ConversionError (also a ValueError)

Each one also derives from the built-in that `torch.nn` would raise in its place, so existing handlers keep working.
Each takes its message alone and therefore survives pickling.
"""


class SyncBatchNormError(Exception):
    """Base of every error of this package."""


class ArgumentError(SyncBatchNormError, ValueError):
    """An argument of a call is wrong; the message names it and the remedy."""


class SingleValueError(ArgumentError):
    """The whole group holds one value per channel: its variance is zero and says nothing."""


class UnsupportedDeviceError(SyncBatchNormError, RuntimeError):
    """The device cannot hold the float64 sums that the statistics are reduced in."""


class CollectiveError(SyncBatchNormError, RuntimeError):
    """A collective failed; the message names the rank, the step and the usual causes."""


class DivergenceError(CollectiveError):
    """Ranks met in one collective from different layers or directions; the message names who is where."""


class ConversionError(SyncBatchNormError, ValueError):
    """A layer cannot be converted, reverted, frozen or folded; the message names its path in the model."""
