"""Optimizers and their groups of parameters. A failure here is a weight that moves wrongly or decays against the
specification."""

import math

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from service.domain.spec import OptimizerSpec
from service.training.optimization import build_optimizer
from service.training.optimization.lars import Lars
from service.training.optimization.optimizers import exempt_parameters
from syncbn import convert_sync_batchnorm


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.bn = nn.BatchNorm2d(2)
        self.attention = nn.MultiheadAttention(2, 1)
        self.rows = nn.LayerNorm((3, 2))
        self.scale = nn.Parameter(torch.ones(2))
        self.head = nn.Linear(2, 2)


EXEMPT = [
    "scale",
    "conv.bias",
    "bn.weight",
    "bn.bias",
    "attention.in_proj_bias",
    "attention.out_proj.bias",
    "rows.weight",
    "rows.bias",
    "head.bias",
]
DECAYED = ["conv.weight", "attention.in_proj_weight", "attention.out_proj.weight", "head.weight"]


def build(model, **spec):
    return build_optimizer(TypeAdapter(OptimizerSpec).validate_python(spec), model)


def named_groups(model, optimizer):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def test_norms_biases_and_vectors_are_exempt():
    for model in (Net(), convert_sync_batchnorm(Net())):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        assert [names[id(parameter)] for parameter in exempt_parameters(model)] == EXEMPT


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weight_decay_leaves_norms_and_biases_alone(name):
    model = Net()
    optimizer = build(model, name=name, weight_decay=0.1)
    assert named_groups(model, optimizer) == [DECAYED, EXEMPT]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_where_all_decay_alike_there_is_one_group(name, weight_decay):
    model = Net()
    optimizer = build(model, name=name, weight_decay=weight_decay, decay_norm_and_bias=True)
    assert named_groups(model, optimizer) == [[name for name, _ in model.named_parameters()]]


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_a_fork_may_turn_weight_decay_on_and_off(name):
    model = Net()
    without = build(model, name=name, weight_decay=0.0).state_dict()
    build(model, name=name, weight_decay=0.1).load_state_dict(without)


@pytest.mark.parametrize(("decays", "expected"), [(False, 0.0), (True, 0.1)])
def test_lars_does_not_adapt_norms_and_biases_whether_they_decay_or_not(decays, expected):
    model = Net()
    optimizer = build(model, name="lars", weight_decay=0.1, decay_norm_and_bias=decays)
    assert named_groups(model, optimizer) == [DECAYED, EXEMPT]
    assert [group["adapts"] for group in optimizer.param_groups] == [True, False]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, expected]


def test_a_group_without_parameters_is_left_out():
    model = nn.Linear(2, 2, bias=False)
    assert named_groups(model, build(model, name="sgd", weight_decay=0.1)) == [["weight"]]


def test_sgd_follows_its_formula():
    model = nn.Linear(2, 1, bias=False).double()
    optimizer = build(model, name="sgd", learning_rate=0.5, momentum=0.9, weight_decay=0.1)
    w, v = model.weight.detach().clone(), torch.zeros(1, 2, dtype=torch.float64)
    for gradient in ([1.0, -2.0], [0.5, 3.0]):
        model.weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        v = 0.9 * v + model.weight.grad + 0.1 * w
        w = w - 0.5 * v
    assert torch.allclose(model.weight, w, rtol=1e-15, atol=1e-15)


def test_lars_follows_its_formula():
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(3, 2).double()
    optimizer = build(
        model, name="lars", learning_rate=0.5, momentum=0.9, weight_decay=0.1, trust_coefficient=0.02, eps=1e-3
    )
    values = {name: parameter.detach().flatten().tolist() for name, parameter in model.named_parameters()}
    velocities = {name: [0.0] * len(value) for name, value in values.items()}
    for _ in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            w, g = values[name], parameter.grad.flatten().tolist()
            decay = 0.1 if name == "weight" else 0.0
            rate = 0.5
            if name == "weight":
                rate *= 0.02 * math.hypot(*w) / (math.hypot(*g) + decay * math.hypot(*w) + 1e-3)
            velocities[name] = [
                0.9 * v + rate * (dw + decay * wi) for v, dw, wi in zip(velocities[name], g, w, strict=True)
            ]
            values[name] = [wi - v for wi, v in zip(w, velocities[name], strict=True)]
        optimizer.step()
    for name, parameter in model.named_parameters():
        # Some ten roundings of float64 a step.
        assert parameter.flatten().tolist() == pytest.approx(values[name], rel=1e-13, abs=1e-14)


def test_lars_moves_a_weight_of_zeros_at_the_plain_rate_and_skips_what_has_no_gradient():
    zero, other = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    zero.grad = torch.ones(2, 2)
    Lars([zero, other], lr=0.5, momentum=0.0).step()
    assert torch.equal(zero, torch.full((2, 2), -0.5))
    assert torch.equal(other, torch.ones(2, 2))


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_a_resumed_optimizer_goes_on_bit_by_bit(name, tmp_path):
    def step(model, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    torch.manual_seed(0)
    model = Net()
    optimizer = build(model, name=name, weight_decay=0.1)
    step(model, optimizer, 1)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state")
    step(model, optimizer, 2)

    state = torch.load(tmp_path / "state", weights_only=True)
    resumed = Net()
    resumed.load_state_dict(state["model"])
    resumed_optimizer = build(resumed, name=name, weight_decay=0.1)
    resumed_optimizer.load_state_dict(state["optimizer"])
    step(resumed, resumed_optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
