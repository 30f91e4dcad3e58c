"""What becomes of a model's batch norms, for each ``norm.kind``.

If names or values of parameters change, checkpoints no longer load and initial weights no longer belong to the seed; if
the reference formula differs, a kind is not what it says.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from service.domain.spec import NormSpec
from service.training.errors import BadFactory
from service.training.norm import GROUP_SIZE, configure_norm, has_batch_norm
from syncbn import SyncBatchNorm, convert_sync_batchnorm

KINDS = ["sync", "local", "frozen", "group", "none"]


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 3)
        self.norm = nn.BatchNorm2d(24, eps=1e-3, momentum=0.2)
        self.again = self.norm  # one layer in two places
        self.block = nn.Sequential(nn.Conv2d(24, 6, 1), nn.BatchNorm2d(6, affine=False))

    def forward(self, images):
        return self.block(self.again(F.relu(self.norm(self.conv(images)))))


def _net():
    torch.manual_seed(0)
    model = _Net()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name and tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model


def _configure(model, **fields):
    return configure_norm(model, NormSpec(**fields))


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_keep_their_names_and_values_and_order(kind):
    before, model = _net(), _net()
    assert _configure(model, kind=kind) is model
    expected, found = dict(before.named_parameters()), dict(model.named_parameters())
    assert list(found) == list(expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    if kind in ("sync", "local", "frozen"):  # plain BatchNorm keys, which load into nn.BatchNorm2d
        state = model.state_dict()
        torch.testing.assert_close({name: state[name] for name in before.state_dict()}, before.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_in_two_places_stays_one(kind):
    model = _configure(_net(), kind=kind)
    assert model.norm is model.again


@pytest.mark.parametrize(
    ("kind", "type_"),
    [("sync", SyncBatchNorm), ("local", nn.BatchNorm2d), ("frozen", SyncBatchNorm), ("group", nn.GroupNorm)],
)
def test_layers_become_what_the_kind_says(kind, type_):
    model = _configure(_net(), kind=kind)
    assert type(model.norm) is type_
    assert type(model.block[1]) is type_
    assert has_batch_norm(model) == (kind in ("sync", "local", "frozen"))


def test_without_a_norm_gamma_and_beta_stay():
    model = _configure(_net(), kind="none")
    inputs = torch.randn(2, 24, 4, 4)
    expected = inputs * model.norm.weight[:, None, None] + model.norm.bias[:, None, None]
    torch.testing.assert_close(model.norm(inputs), expected)
    other = torch.randn(2, 6, 4, 4)
    assert torch.equal(model.block[1](other), other)
    assert not has_batch_norm(model)


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 7), (5, 4, 3, 3), (5, 4, 2, 3, 2)])
def test_gamma_and_beta_alone_take_inputs_of_any_dimension(shape):
    norms = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    layer = norms[len(shape)](4)
    nn.init.uniform_(layer.weight)
    inputs = torch.randn(shape)
    expected = torch.stack([inputs[:, c] * layer.weight[c] + layer.bias[c] for c in range(4)], dim=1)
    model = _configure(nn.Sequential(layer), kind="none")
    torch.testing.assert_close(model(inputs), expected)


@pytest.mark.parametrize(
    ("channels", "asked", "groups"),
    [
        (24, None, 2),  # sizes of 12 are nearest to 16
        (64, None, 4),
        (64, 8, 8),
        (6, 16, 1),
        (7, 2, 7),  # sizes of 1 or 7
        (1, None, 1),
    ],
)
def test_group_norm_has_groups_of_about_the_size_asked_for(channels, asked, groups):
    model = _configure(nn.Sequential(nn.BatchNorm2d(channels, eps=1e-3)), kind="group", group_size=asked)
    (layer,) = model
    assert (layer.num_groups, layer.num_channels, layer.eps) == (groups, channels, 1e-3)
    assert GROUP_SIZE == 16
    inputs = torch.randn(3, channels, 4, 4)
    by_group = inputs.reshape(3, groups, -1)
    mean, var = by_group.mean(-1, keepdim=True), by_group.var(-1, keepdim=True, unbiased=False)
    torch.testing.assert_close(layer(inputs), ((by_group - mean) / (var + 1e-3).sqrt()).reshape_as(inputs))


def test_frozen_layers_normalize_with_what_they_came_with_and_train_gamma_and_beta():
    model, reference = _configure(_net(), kind="frozen"), _net().eval()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    inputs = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(model(inputs), reference(inputs))
    model(inputs).square().sum().backward()
    assert model.norm.weight.grad.abs().sum() > 0
    assert model.norm.bias.grad.abs().sum() > 0
    torch.testing.assert_close(dict(model.named_buffers()), buffers, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["sync", "local", "frozen"])
def test_momentum_and_eps_of_the_job_go_before_those_of_the_model(kind):
    model = _configure(_net(), kind=kind, momentum=0.03, eps=0.5)
    assert {(layer.momentum, layer.eps) for layer in (model.norm, model.block[1])} == {(0.03, 0.5)}
    untouched = _configure(_net(), kind=kind)
    assert (untouched.norm.momentum, untouched.norm.eps) == (0.2, 1e-3)
    assert (untouched.block[1].momentum, untouched.block[1].eps) == (0.1, 1e-5)


@pytest.mark.parametrize("skips", [True, False])
def test_whether_batches_that_are_not_finite_count_is_handed_on(skips):
    model = _configure(_net(), kind="sync", skip_nonfinite=skips)
    assert model.norm.skip_nonfinite == skips


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_a_batch_norm_itself_is_replaced(kind):
    inputs = torch.randn(8, 4)
    model = _configure(nn.BatchNorm1d(4), kind=kind)
    assert model(inputs).shape == (8, 4)
    assert list(dict(model.named_parameters())) == ["weight", "bias"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_batch_norms_is_left_as_it_is(kind):
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.InstanceNorm1d(2))
    types = [type(layer) for layer in model]
    assert [type(layer) for layer in _configure(model, kind=kind)] == types
    assert not has_batch_norm(model)


def test_a_layer_that_cannot_be_synchronized_names_the_field():
    class Own(nn.BatchNorm2d):
        def forward(self, input):
            return input * 2

    with pytest.raises(BadFactory, match=r"^model: .*norm\.kind: sync"):
        _configure(nn.Sequential(Own(4)), kind="sync")


class _BatchNormAct(nn.BatchNorm2d):
    """Adds an activation, as timm's does."""

    def forward(self, input):
        return F.relu(super().forward(input))


@pytest.mark.parametrize("kind", ["group", "none"])
@pytest.mark.parametrize("make", [_BatchNormAct, lambda channels: SyncBatchNorm(channels, activation="relu")])
def test_what_a_batch_norm_adds_is_not_dropped(kind, make):
    with pytest.raises(BadFactory, match=rf"^model: 1 is a \S*BatchNorm\S*, .*norm\.kind: {kind}"):
        _configure(nn.Sequential(nn.Identity(), make(4)), kind=kind)


def test_an_activation_of_a_synchronized_norm_is_not_dropped_by_a_local_one():
    with pytest.raises(BadFactory, match=r"^model: the model itself is a SyncBatchNorm, .*norm\.kind: local"):
        _configure(SyncBatchNorm(4, activation="relu"), kind="local")
    assert type(_configure(nn.Sequential(_BatchNormAct(4)), kind="local")[0]) is _BatchNormAct  # it stays


@pytest.mark.parametrize(("kind", "expected"), [("none", lambda x: 2 * x), ("group", lambda x: 2 * F.group_norm(x, 1))])
def test_a_norm_without_beta_stays_without(kind, expected):
    layer = SyncBatchNorm(4, bias=False)
    nn.init.constant_(layer.weight, 2.0)
    model = _configure(nn.Sequential(layer), kind=kind)
    inputs = torch.randn(3, 4, 5)
    torch.testing.assert_close(model(inputs), expected(inputs))
    assert list(dict(model.named_parameters())) == ["0.weight"]


@pytest.mark.parametrize(
    "make", [nn.SyncBatchNorm, SyncBatchNorm, lambda channels: convert_sync_batchnorm(nn.BatchNorm2d(channels))]
)
def test_layers_that_synchronize_become_local(make):
    layer, reference = make(4), nn.BatchNorm2d(4)
    nn.init.uniform_(layer.weight)
    reference.load_state_dict(layer.state_dict())
    model = _configure(nn.Sequential(layer), kind="local")
    assert not isinstance(model[0], nn.SyncBatchNorm | SyncBatchNorm)
    assert model[0].weight is layer.weight
    inputs = torch.randn(6, 4, 3, 3)
    for _ in range(2):  # in training, then in evaluation
        assert torch.equal(model(inputs), reference(inputs))
        torch.testing.assert_close(model[0].state_dict(), reference.state_dict(), rtol=0, atol=0)
        model.eval()
        reference.eval()
