"""The builtin optimizers, and which weights they decay."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from service.domain.spec import AdamWSpec, LarsSpec, OptimizerSpec
from service.training.optimization.lars import Lars

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def build_optimizer(spec: OptimizerSpec, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer that a specification names, for the parameters of a model.

    Norms' γ and β, biases and whatever else has at most one dimension are not decayed, unless
    ``decay_norm_and_bias`` says so. LARS takes their rate as it is either way (You et al. 2017, section 5). The groups
    of parameters, and their order in them, are functions of the model and the specification.

    Args:
        spec: which optimizer.
        model: on the device where it is trained.
    """
    if isinstance(spec, LarsSpec):
        return Lars(
            _groups(spec, model, of_exempt={"adapts": False}),
            lr=spec.learning_rate,
            momentum=spec.momentum,
            weight_decay=spec.weight_decay,
            trust_coefficient=spec.trust_coefficient,
            eps=spec.eps,
        )
    groups = _groups(spec, model, of_exempt={})
    # One kernel for a step's whole arithmetic: on two cores it takes a fifth to a half of the time of the default.
    if isinstance(spec, AdamWSpec):
        return torch.optim.AdamW(
            groups, lr=spec.learning_rate, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, fused=True
        )
    return torch.optim.SGD(
        groups,
        lr=spec.learning_rate,
        momentum=spec.momentum,
        nesterov=spec.nesterov,
        weight_decay=spec.weight_decay,
        fused=True,
    )


def exempt_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return norms' γ and β, biases and other parameters of at most one dimension, in the model's order."""
    of_norms = {
        parameter
        for layer in model.modules()
        if isinstance(layer, _NORMS)
        for parameter in layer.parameters(recurse=False)
    }
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter in of_norms or parameter.ndim <= 1 or name.rpartition(".")[2].startswith("bias")
    ]


def _groups(spec: OptimizerSpec, model: nn.Module, *, of_exempt: dict[str, Any]) -> list[dict[str, Any]]:
    """Split a model's parameters; a group that would be empty is left out.

    Which groups there are does not depend on the size of the decay, so that a fork may change it.
    """
    settings = dict(of_exempt)
    if not spec.decay_norm_and_bias:
        settings["weight_decay"] = 0.0
    parameters = list(model.parameters())
    exempt = set(exempt_parameters(model)) if settings else set()
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in parameters if parameter not in exempt]},
        {"params": [parameter for parameter in parameters if parameter in exempt], **settings},
    ]
    return [group for group in groups if group["params"]]
