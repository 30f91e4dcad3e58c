"""Internal covariate shift: how the moments of each layer's input move while the network trains."""

from itertools import chain
from typing import Any

import torch
from torch import nn

from service.training.world import World

_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class InputDrift:
    """Measures the inputs of a model's convolutions and fully connected layers on some steps (Ioffe & Szegedy 2015).

    For each layer, over all samples of the mini-batch and all ranks, the mean μ and the standard deviation σ of each
    channel; ``drift`` is how far they have moved since the step that was measured before: the mean over channels of
    |μ − μ′| / σ′ + |ln(σ / σ′)|. A layer whose input keeps its distribution has a drift near 0.

    Args:
        model: its layers are hooked until the end of the process; a hook that is not measuring costs a microsecond.
        world: the ranks, which all measure the same steps.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        self._world = world
        self._is_measuring = False
        self._sums: dict[str, torch.Tensor] = {}
        self._before: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for path, layer in model.named_modules():
            if isinstance(layer, _WEIGHTED):
                hook = self._hook(path, is_linear=isinstance(layer, nn.Linear))
                layer.register_forward_pre_hook(hook, with_kwargs=True)

    def begin(self) -> None:
        """Measure from now on."""
        self._is_measuring, self._sums = True, {}

    def end(self) -> dict[str, float]:
        """Return what was measured: ``input/PATH/{mean,std,drift}``; all ranks call it together."""
        self._is_measuring = False
        if not self._sums:
            return {}
        # One exchange for all layers.
        totals = self._world.sum_tensor(torch.cat([sums.reshape(-1) for sums in self._sums.values()])).cpu()
        found = {}
        sizes = [sums.numel() for sums in self._sums.values()]
        for path, part in zip(self._sums, totals.split_with_sizes(sizes), strict=True):
            count, first, second = part.reshape(3, -1)
            mean = first / count
            std = (second / count - mean.square()).clamp(min=0).sqrt()
            found[f"input/{path}/mean"] = float(mean.mean())
            found[f"input/{path}/std"] = float(std.mean())
            if path in self._before:
                found[f"input/{path}/drift"] = _drift(self._before[path], (mean, std))
            self._before[path] = mean, std
        drifts = [value for name, value in found.items() if name.endswith("/drift")]
        if drifts:
            found["input/drift"] = sum(drifts) / len(drifts)
        return found

    def _hook(self, path: str, *, is_linear: bool) -> Any:  # noqa: ANN401 - as register_forward_pre_hook takes it
        def measure(_: nn.Module, arguments: tuple[torch.Tensor, ...], by_name: dict[str, torch.Tensor]) -> None:
            if not self._is_measuring or not torch.is_grad_enabled():
                return
            inputs = next(chain(arguments, by_name.values())).detach()
            channels = (inputs if is_linear else inputs.movedim(1, -1)).flatten(0, -2)
            values = channels.to(torch.float64)  # (n, C)
            count = torch.full_like(values[0], len(values))
            sums = torch.stack([count, values.sum(0), values.square().sum(0)])
            self._sums[path] = self._sums[path] + sums if path in self._sums else sums

        return measure


def _drift(before: tuple[torch.Tensor, torch.Tensor], now: tuple[torch.Tensor, torch.Tensor]) -> float:
    (mean_before, std_before), (mean, std) = before, now
    alive = (std_before > 0) & (std > 0)  # a channel that never varies, such as a border, has no scale
    if not alive.any():
        return 0.0
    moved = (mean - mean_before).abs()[alive] / std_before[alive]
    return float((moved + (std[alive] / std_before[alive]).log().abs()).mean())
