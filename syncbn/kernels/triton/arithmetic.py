"""What the kernels compute per value and per channel, on the device."""

import triton
import triton.language as tl

from syncbn.kernels.triton.constants import LEAKY_RELU, RELU, SILU

_RELU = tl.constexpr(RELU)
_LEAKY_RELU = tl.constexpr(LEAKY_RELU)
_SILU = tl.constexpr(SILU)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """f(z); a NaN stays one."""
    if ACTIVATION == _RELU:
        z = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == _LEAKY_RELU:
        z = tl.where(z <= 0, z * SLOPE, z)
    elif ACTIVATION == _SILU:
        z = z / (1 + tl.exp(-z))
    return z


@triton.jit
def undo_activation(dy, z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """f'(z) · dy. For relu and leaky_relu z may be y, which has its sign; at zero the gradient is that below it."""
    if ACTIVATION == _RELU:
        dy = tl.where(z <= 0, 0.0, dy)
    elif ACTIVATION == _LEAKY_RELU:
        dy = tl.where(z <= 0, dy * SLOPE, dy)
    elif ACTIVATION == _SILU:
        sigmoid = 1 / (1 + tl.exp(-z))
        dy = dy * (sigmoid * (1 + z * (1 - sigmoid)))
    return dy


@triton.jit
def batch_statistics(payload, channel, exists, num_channels, eps):
    """Mean, Σ(x − mean)² and 1/σ of channels from the reduced `[Σx, Σx², n]`, float64; as `moments.finalize`."""
    total = tl.load(payload + channel, mask=exists, other=0.0)
    squares = tl.load(payload + num_channels + channel, mask=exists, other=0.0)
    one_nth = 1 / tl.maximum(tl.load(payload + 2 * num_channels), 1.0)
    mean = total * one_nth
    deviations = squares - mean * total
    deviations = tl.where(deviations < 0, 0.0, deviations)  # tl.maximum would drop a NaN
    return mean, deviations, 1 / tl.sqrt(deviations * one_nth + eps)


@triton.jit
def affine(mean, invstd, weight, bias, channel, exists, COMPUTE: tl.constexpr):
    """Coefficients of y = (x − pivot) · scale + shift; as `moments.affine`."""
    pivot = mean.to(COMPUTE)
    scale = invstd
    if weight is not None:
        scale *= tl.load(weight + channel, mask=exists, other=0.0).to(tl.float64)
    shift = (pivot.to(tl.float64) - mean) * scale
    if bias is not None:
        shift += tl.load(bias + channel, mask=exists, other=0.0).to(tl.float64)
    return pivot, scale.to(COMPUTE), shift.to(COMPUTE)
