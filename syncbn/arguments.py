"""What a call may be given. Every message names the argument and the remedy."""

import torch

from syncbn.errors import ArgumentError, UnsupportedDeviceError

_INPUT_DTYPES = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))
_HALF_DTYPES = frozenset((torch.bfloat16, torch.float16))
_DEVICES_WITHOUT_FLOAT64 = ("mps",)


def check_input(input: torch.Tensor, residual: torch.Tensor | None) -> None:
    """Raises ArgumentError if shape, dtype or device of the batch do not fit."""
    if input.dim() < 2 or input.size(1) == 0:
        raise ArgumentError(
            f"input: expected shape (N, C, *) with at least one channel, got {tuple(input.shape)}; add the missing "
            "dimension (unsqueeze)"
        )
    if input.dtype not in _INPUT_DTYPES:
        raise ArgumentError(
            f"input: expected float64, float32, bfloat16 or float16, got {input.dtype}; convert it (input.float())"
        )
    if input.device.type in _DEVICES_WITHOUT_FLOAT64:
        raise UnsupportedDeviceError(
            f"input: device {input.device} has no float64, which the batch statistics are reduced in; move the layer "
            "and its input to cpu or cuda"
        )
    if residual is None:
        return
    if residual.shape != input.shape:
        raise ArgumentError(
            f"residual: expected the input's shape {tuple(input.shape)}, got {tuple(residual.shape)}; a projection has "
            "to bring it to the same channels and positions"
        )
    if residual.dtype != input.dtype or residual.device != input.device:
        raise ArgumentError(
            f"residual: expected the input's {input.dtype} and {input.device}, got {residual.dtype} and "
            f"{residual.device}; convert it (residual.to(input))"
        )


def check_parameters(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    """Raises ArgumentError if what is given per channel does not fit the batch."""
    if (running_mean is None) != (running_var is None):
        raise ArgumentError("running_mean, running_var: give both or neither")
    # One test for the usual case: a call has up to four of these, and a small batch is normalized in microseconds.
    num_channels, dtype, device = input.size(1), input.dtype, input.device
    for name, values in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if values is not None and not (
            values.dim() == 1
            and values.size(0) == num_channels
            and values.device == device
            and (values.dtype == dtype or (values.dtype == torch.float32 and dtype in _HALF_DTYPES))
        ):
            _refuse_per_channel(name, values, input)


def check_options(
    training: bool,
    momentum: float | None,
    eps: float,
    running_mean: torch.Tensor | None,
    num_batches_tracked: torch.Tensor | None,
) -> None:
    """Raises ArgumentError if the options contradict each other or are out of range."""
    if not training and running_mean is None:
        raise ArgumentError("running_mean: required without training; pass it, or training=True for batch statistics")
    if momentum is None and training and running_mean is not None and num_batches_tracked is None:
        raise ArgumentError("num_batches_tracked: required with momentum=None; pass it, or a momentum")
    if not eps >= 0:
        raise ArgumentError(f"eps: expected a number of at least 0, got {eps}")


def canonical_mask(mask: torch.Tensor | None, input: torch.Tensor) -> torch.Tensor | None:
    """The mask as the kernels take it.

    Args:
        mask: True where a position counts, shape (N, 1, *) or (N, *), where * may broadcast to the input's.
        input: Shape (N, C, *).

    Returns:
        Shape (N, 1, *), contiguous, with the input's spatial sizes.

    Raises:
        ArgumentError: If dtype, device or shape do not fit.
    """
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise ArgumentError(f"mask: expected torch.bool, got {mask.dtype}; compare it with something (mask != 0)")
    if mask.device != input.device:
        raise ArgumentError(f"mask: on {mask.device}, but input is on {input.device}; move it (mask.to(input.device))")
    positions = mask.unsqueeze(1) if mask.dim() == input.dim() - 1 else mask
    wanted = (input.size(0), 1, *input.shape[2:])
    fits = positions.dim() == input.dim() and all(
        have == want or (have == 1 and dim >= 2)
        for dim, (have, want) in enumerate(zip(positions.shape, wanted, strict=True))
    )
    if not fits:
        raise ArgumentError(
            f"mask: expected shape {wanted} or {(wanted[0], *wanted[2:])} for input {tuple(input.shape)}, got "
            f"{tuple(mask.shape)}; a position counts in all channels or in none"
        )
    return positions.expand(wanted).contiguous()


def _refuse_per_channel(name: str, values: torch.Tensor, input: torch.Tensor) -> None:
    if values.shape != input.shape[1:2]:
        raise ArgumentError(
            f"{name}: expected shape ({input.size(1)},) for the {input.size(1)} channels of input "
            f"{tuple(input.shape)}, got {tuple(values.shape)}; num_features has to equal the channels"
        )
    if values.device != input.device:
        raise ArgumentError(
            f"{name}: on {values.device}, but input is on {input.device}; move one to the other (layer.to(device))"
        )
    half_input = input.dtype in _HALF_DTYPES
    raise ArgumentError(
        f"{name}: expected {input.dtype}{' or torch.float32' if half_input else ''} for this input, got "
        f"{values.dtype}; convert the layer (layer.to(dtype)) or the input"
    )
