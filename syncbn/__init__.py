"""Synchronized batch norm that gives the same result on CPU and GPU, for any split of the batch over ranks."""

from syncbn.calibration import recalibrate
from syncbn.conversion import convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.deferral import DeferredStatistics
from syncbn.diagnostics import LayerReport, StatisticsMonitor, monitor
from syncbn.folding import fold_batchnorm
from syncbn.freezing import freeze, unfreeze
from syncbn.functional import sync_batch_norm
from syncbn.groups import new_sync_group
from syncbn.module import SyncBatchNorm
from syncbn.renormalization import Renormalization

__all__ = [
    "DeferredStatistics",
    "LayerReport",
    "Renormalization",
    "StatisticsMonitor",
    "SyncBatchNorm",
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
