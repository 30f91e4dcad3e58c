from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Self

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.errors import ArgumentError
from syncbn.functional import sync_batch_norm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SyncBatchNorm(_BatchNorm):
    """Batch norm whose batch is that of every rank in a process group (Ioffe & Szegedy 2015, Algorithm 1).

    Arguments, parameters, buffers and state_dict are those of `torch.nn.SyncBatchNorm`; checkpoints of it and of
    `torch.nn.BatchNorm1d/2d/3d` load here, and the other way round. It runs on CPU as well as on GPU, and without
    torch.distributed it equals local batch norm.

    In training, and always where there are no running statistics (`track_running_stats=False`), the statistics are
    the whole group's: every rank has to run the layer together with the others. In evaluation the running statistics
    normalize, and nothing is communicated. `sync_batch_norm` describes uneven and empty ranks, and what has to agree
    between ranks for the backward not to wait for ever.

    A deep copy shares the process group. A pickle does not hold it: the unpickled layer uses the default group until
    `process_group` is set.

    Shape:
        (N, C, *) to (N, C, *), at least two dimensions, N ≥ 0, in the dtype and memory format of the input.

    Args:
        num_features: C.
        eps: Added to the variance, in the units of x².
        momentum: Weight of a batch in the running statistics; None for the cumulative average over all batches.
        affine: Whether to learn γ (weight) and β (bias).
        track_running_stats: Whether to keep running statistics.
        process_group: Group to synchronize over; None for the default one at the time of the call.
        device: Device of parameters and buffers.
        dtype: Dtype of parameters and running statistics.
        bias: Whether to learn β, where `affine`.

    Raises:
        ArgumentError: If `num_features` or `eps` is out of range.
    """

    process_group: ProcessGroup | None = None
    # Facts for revert_sync_batchnorm. They are class attributes so that a converted layer needs no __init__.
    _origin: type[_BatchNorm] | None = None
    _input_dims: frozenset[int] = frozenset()

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: ProcessGroup | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        if num_features < 1:
            raise ArgumentError(f"num_features: expected at least 1, got {num_features}")
        if not eps >= 0:
            raise ArgumentError(f"eps: expected a number of at least 0, got {eps}")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.process_group = process_group

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalizes `input`.

        Args:
            input: Shape (N, C, *).

        Raises:
            SyncBatchNormError: See `sync_batch_norm`.
        """
        if input.dim() not in self._input_dims:
            self._input_dims = self._input_dims | {input.dim()}
        # As in torch.nn: the buffers decide whether evaluation has statistics, the flag whether training updates them.
        training = self.training or (self.running_mean is None and self.running_var is None)
        tracks = not self.training or self.track_running_stats
        return sync_batch_norm(
            input,
            self.running_mean if tracks else None,
            self.running_var if tracks else None,
            self.weight,
            self.bias,
            training=training,
            momentum=self.momentum,
            eps=self.eps,
            process_group=self.process_group,
            num_batches_tracked=self.num_batches_tracked if tracks else None,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        memo[id(self.process_group)] = self.process_group
        clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return clone

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "process_group": None}
