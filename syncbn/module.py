from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Self

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.activation import Activation, check_activation
from syncbn.arguments import canonical_mask, check_input
from syncbn.errors import ArgumentError
from syncbn.functional import Options, laid_out_as, normalize_batch
from syncbn.groups import LOCAL
from syncbn.identity import new_identity
from syncbn.renormalization import check_renormalization

if TYPE_CHECKING:
    from syncbn.activation import ActivationName
    from syncbn.groups import Group
    from syncbn.renormalization import Renormalization
    from syncbn.steps import Probe
    from syncbn.tracking import Collector


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
        process_group: Group to synchronize over, or a one-dimensional DeviceMesh; None for the default one at the
            time of the call, "local" for this rank alone. `new_sync_group` makes groups.
        device: Device of parameters and buffers.
        dtype: Dtype of parameters and running statistics.
        bias: Whether to learn β, where `affine`.
        activation: None, "relu", "leaky_relu" or "silu", applied in the same pass.
        negative_slope: Slope of leaky_relu below zero.
        skip_nonfinite: Whether a batch with a NaN or an Inf leaves the running statistics as they are, and is counted
            in the buffer `num_nonfinite_batches` (not in the state_dict) instead. The output shows it either way.
        ghost_size: Samples to a ghost batch (Hoffer et al. 2017): each rank normalizes that many of its samples
            together, the last of them with what is left over, and nothing is communicated. Running statistics then
            differ between ranks, as those of torch.nn.BatchNorm do. None for the whole batch.
        renormalization: Limits of batch renormalization (Ioffe 2017); None for batch norm.

    Attributes:
        name: What errors call the layer; conversion sets its path in the model.
        frozen: Whether training mode is refused, see `freeze`.
        num_nonfinite_batches: Counter of batches left out, shape (), int64; there only with `skip_nonfinite`.

    Raises:
        ArgumentError: If an argument is out of range, or two contradict each other.
    """

    num_nonfinite_batches: torch.Tensor | None
    # Class attributes, so that a converted layer needs no __init__.
    process_group: Group = None
    activation: ActivationName | None = None
    negative_slope: float = 0.01
    ghost_size: int | None = None
    renormalization: Renormalization | None = None
    name: str = "a SyncBatchNorm"
    frozen: bool = False
    _collector: Collector | None = None
    _probe: Probe | None = None
    _identity: torch.Tensor | None = None
    # Facts for revert_sync_batchnorm.
    _origin: type[_BatchNorm] | None = None
    _input_dims: frozenset[int] = frozenset()

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Group = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: ActivationName | None = None,
        negative_slope: float = 0.01,
        skip_nonfinite: bool = False,
        ghost_size: int | None = None,
        renormalization: Renormalization | None = None,
    ) -> None:
        if num_features < 1:
            raise ArgumentError(f"num_features: expected at least 1, got {num_features}")
        if not eps >= 0:
            raise ArgumentError(f"eps: expected a number of at least 0, got {eps}")
        check_activation(activation, negative_slope)
        if renormalization is not None:
            check_renormalization(renormalization, track_running_stats)
        if skip_nonfinite and not track_running_stats:
            raise ArgumentError(
                "skip_nonfinite: protects the running statistics, and there are none; pass track_running_stats=True, "
                "or skip_nonfinite=False"
            )
        if ghost_size is not None and ghost_size < 1:
            raise ArgumentError(f"ghost_size: expected at least 1 sample, or None, got {ghost_size}")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.process_group = process_group
        self.activation, self.negative_slope = activation, negative_slope
        self.ghost_size, self.renormalization = ghost_size, renormalization
        self.skip_nonfinite = skip_nonfinite
        self._identity = new_identity(self)

    @property
    def skip_nonfinite(self) -> bool:
        """Whether batches with a NaN or an Inf leave the running statistics as they are."""
        return self._buffers.get("num_nonfinite_batches") is not None

    @skip_nonfinite.setter
    def skip_nonfinite(self, skip: bool) -> None:
        if not skip:
            self._buffers.pop("num_nonfinite_batches", None)
            self._non_persistent_buffers_set.discard("num_nonfinite_batches")
        elif not self.skip_nonfinite and self.running_mean is not None:
            count = torch.zeros((), dtype=torch.int64, device=self.running_mean.device)
            self.register_buffer("num_nonfinite_batches", count, persistent=False)

    def forward(
        self, input: torch.Tensor, residual: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Normalizes `input`, adds `residual`, applies the activation.

        Args:
            input: Shape (N, C, *).
            residual: Added before the activation, shape (N, C, *).
            mask: True where a position is valid, shape (N, 1, *) or (N, *); elsewhere nothing counts, and output and
                gradients are 0.

        Raises:
            SyncBatchNormError: See `sync_batch_norm`.
        """
        if not torch.compiler.is_compiling() and input.dim() not in self._input_dims:
            self._input_dims = self._input_dims | {input.dim()}
        # As in torch.nn: the buffers decide whether evaluation has statistics, the flag whether training updates them.
        training = self.training or (self.running_mean is None and self.running_var is None)
        if training and self.ghost_size is not None:
            return self._normalize_ghosts(input, residual, mask, self.ghost_size)
        return self._normalize(input, residual, mask, training, self.process_group)

    def train(self, mode: bool = True) -> Self:
        """Sets training mode; a frozen layer stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def _normalize(
        self,
        input: torch.Tensor,
        residual: torch.Tensor | None,
        mask: torch.Tensor | None,
        training: bool,
        process_group: Group,
    ) -> torch.Tensor:
        tracks = not self.training or self.track_running_stats
        buffers = (
            self.running_mean if tracks else None,
            self.running_var if tracks else None,
            self.num_batches_tracked if tracks else None,
            self._buffers.get("num_nonfinite_batches"),
        )
        options = Options(
            training=training,
            momentum=self.momentum,
            eps=self.eps,
            process_group=process_group,
            activation=Activation(self.activation, self.negative_slope),
            renormalization=self.renormalization,
            # Operators look name and collector up by the identity, so that a compiler need not know them.
            name="" if torch.compiler.is_compiling() else self.name,
            identity=self._identity,
            collector=None if torch.compiler.is_compiling() else self._collector,
            probe=self._probe,
        )
        return normalize_batch(input, buffers, self.weight, self.bias, residual, mask, options)

    def _normalize_ghosts(
        self, input: torch.Tensor, residual: torch.Tensor | None, mask: torch.Tensor | None, ghost_size: int
    ) -> torch.Tensor:
        check_input(input, residual)  # of the whole: slices of something larger would fit
        mask = canonical_mask(mask, input)
        num_ghosts = max(1, input.size(0) // ghost_size)
        outputs = []
        for index in range(num_ghosts):
            end = (index + 1) * ghost_size if index + 1 < num_ghosts else input.size(0)
            ghost = slice(index * ghost_size, end)
            outputs.append(
                self._normalize(
                    input[ghost],
                    None if residual is None else residual[ghost],
                    None if mask is None else mask[ghost],
                    True,
                    LOCAL,
                )
            )
        return laid_out_as(input, torch.cat(outputs))

    def reset_running_stats(self) -> None:
        """Sets the running statistics, and the counters, to those of a new layer."""
        super().reset_running_stats()
        count = self._buffers.get("num_nonfinite_batches")
        if count is not None:
            count.zero_()

    def extra_repr(self) -> str:
        """Arguments as torch prints them, and this layer's own where they are not the default."""
        options = {
            "activation": self.activation,
            "ghost_size": self.ghost_size,
            "renormalization": self.renormalization,
            "skip_nonfinite": self.skip_nonfinite or None,
            "frozen": self.frozen or None,
        }
        usual: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return usual + "".join(f", {key}={value}" for key, value in options.items() if value is not None)

    def __copy__(self) -> Self:
        return self._with(self.__dict__ | {"_parameters": self._parameters.copy(), "_buffers": self._buffers.copy()})

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self.process_group)] = self.process_group
        clone = self._with({})
        memo[id(self)] = clone
        clone.__dict__.update(copy.deepcopy(self._state(), memo))
        return clone

    def __getstate__(self) -> dict[str, Any]:
        # A group belongs to this process.
        return {**self._state(), "process_group": self.process_group if self.process_group == LOCAL else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._identity = new_identity(self)

    def _with(self, state: dict[str, Any]) -> Self:
        clone = type(self).__new__(type(self))
        clone.__dict__.update(state)
        clone.__dict__.pop("_collector", None)
        clone.__dict__.pop("_probe", None)
        clone.__dict__["_identity"] = new_identity(clone)
        return clone

    def _state(self) -> dict[str, Any]:
        """All but what belongs to this very object."""
        mine = ("_collector", "_probe", "_identity")
        return {key: value for key, value in self.__dict__.items() if key not in mine}
