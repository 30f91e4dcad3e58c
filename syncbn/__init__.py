"""Synchronized batch norm that gives the same result on CPU and GPU, for any split of the batch over ranks."""

from syncbn.conversion import convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.functional import sync_batch_norm
from syncbn.module import SyncBatchNorm

__all__ = ["SyncBatchNorm", "convert_sync_batchnorm", "revert_sync_batchnorm", "sync_batch_norm"]
