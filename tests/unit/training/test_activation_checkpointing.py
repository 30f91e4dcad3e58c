"""Activations that are computed again in the backward: less memory, nothing else.

A gradient that differs means that the second forward is not the first one: look at dropout and at batch norms.
"""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import set_checkpoint_debug_enabled

from service.training.activation_checkpointing import checkpoint_activations
from service.training.dropout import DropoutContext, share_dropout
from service.training.models.mlp import Mlp
from service.training.models.unet import unet
from syncbn import convert_sync_batchnorm


def _block(size):
    return nn.Sequential(nn.Linear(size, size), nn.BatchNorm1d(size), nn.ReLU(inplace=True), nn.Dropout(0.3))


class _Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([_block(8), _block(8)])
        self.head = nn.Linear(8, 2)
        self.calls = 0

    def forward(self, inputs):
        self.calls += 1
        for stage in self.stages:
            inputs = inputs + stage(inputs)
        return self.head(inputs)


class _CountsCalls(nn.Linear):
    calls = 0

    def forward(self, inputs):
        self.calls += 1
        return super().forward(inputs)


MODELS = {
    "blocks in a list": (_Nested, (8,)),
    "blocks in a row": (lambda: nn.Sequential(_block(8), _block(8), nn.Linear(8, 2)), (8,)),
    "no blocks": (lambda: Mlp(in_features=8, num_outputs=2, hidden_sizes=[8], dropout=0.3), (8,)),
    "one layer": (lambda: nn.Linear(8, 2), (8,)),
    "a network with skips": (lambda: unet(in_channels=1, num_outputs=2, depth=2, width=4), (1, 8, 8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_running_statistics_are_to_the_last_bit_those_without(name):
    make, shape = MODELS[name]
    inputs = torch.randn(6, *shape, generator=torch.Generator().manual_seed(0))
    ends = []
    for checkpoints in (False, True):
        torch.manual_seed(0)
        model = convert_sync_batchnorm(make())
        context = DropoutContext(seed=0)
        share_dropout(model, context)
        names = list(model.state_dict())
        if checkpoints:
            checkpoint_activations(model)
        assert list(model.state_dict()) == names
        for step in range(2):
            context.begin(step=step, batch=0, num_samples=6, first=0, count=6)
            model(inputs).square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        ends.append((gradients, dict(model.state_dict())))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0)


def test_parts_are_computed_again_and_what_lies_between_them_is_not():
    inner, outer = _CountsCalls(4, 4), _CountsCalls(4, 4)
    model = nn.Sequential(nn.Sequential(inner, nn.ReLU()), outer)
    checkpoint_activations(model)
    model(torch.randn(3, 4)).sum().backward()
    assert (inner.calls, outer.calls) == (2, 1)


def test_less_is_kept_for_the_backward():
    kept = []
    for checkpoints in (False, True):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)) for _ in range(4)))
        if checkpoints:
            checkpoint_activations(model)
        saved = []

        def pack(tensor, saved=saved):
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.randn(5, 16))
        kept.append(sum(tensor.numel() for tensor in saved if tensor.shape[0] == 5))
    assert kept[1] < kept[0]


@pytest.mark.parametrize("mode", ["evaluation", "no gradients"])
def test_nothing_is_kept_or_repeated_where_there_is_no_backward(mode):
    layer = _CountsCalls(4, 4)
    model = nn.Sequential(nn.Sequential(layer, nn.ReLU()))
    checkpoint_activations(model)
    model.train(mode != "evaluation")
    with set_checkpoint_debug_enabled(True), torch.set_grad_enabled(mode == "evaluation"):
        outputs = model(torch.randn(3, 4))
    if mode == "evaluation":
        outputs.sum().backward()
    assert layer.calls == 1


def test_a_copy_of_a_model_computes_with_weights_of_its_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))
    checkpoint_activations(model)
    twin = copy.deepcopy(model)
    inputs = torch.randn(3, 4)
    before = model(inputs)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(inputs), before)
    assert not twin(inputs).any()
    assert not twin.eval()(inputs).any()
