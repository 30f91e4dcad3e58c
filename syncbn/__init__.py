"""Synchronized batch norm that gives the same result on CPU and GPU, for any split of the batch over ranks.

To read it: `module` holds the layer's parameters and buffers, `functional` the order of the steps of a call, `steps`
the forward's exchange, `moments` the arithmetic, `kernels` the passes over a batch, `autograd` the backward,
`collectives` and `shared_memory` the all-reduce. `operators` and `identity` are the same steps as torch.compile sees
them; `csrc` is the C++ of kernels and exchange. Around the layer stand `conversion`, `deferral`, `folding`, `freezing`,
`calibration` and `diagnostics`, which import `module` and not each other. `reference` is the truth that tests compare
with.
"""

from syncbn.calibration import recalibrate
from syncbn.conversion import convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.deferral import DeferredStatistics
from syncbn.diagnostics import LayerReport, StatisticsMonitor, monitor
from syncbn.errors import ArgumentError, CollectiveError, ConversionError, DivergenceError, SyncBatchNormError
from syncbn.folding import fold_batchnorm
from syncbn.freezing import freeze, unfreeze
from syncbn.functional import sync_batch_norm
from syncbn.groups import new_sync_group
from syncbn.module import SyncBatchNorm
from syncbn.renormalization import Renormalization

__all__ = [
    "ArgumentError",
    "CollectiveError",
    "ConversionError",
    "DeferredStatistics",
    "DivergenceError",
    "LayerReport",
    "Renormalization",
    "StatisticsMonitor",
    "SyncBatchNorm",
    "SyncBatchNormError",
    "convert_sync_batchnorm",
    "fold_batchnorm",
    "freeze",
    "monitor",
    "new_sync_group",
    "recalibrate",
    "revert_sync_batchnorm",
    "sync_batch_norm",
    "unfreeze",
]
