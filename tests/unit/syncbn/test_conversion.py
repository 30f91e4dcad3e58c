"""Converting models and back. A failure here means that a model lost something on the way."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from syncbn import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.errors import ConversionError


class Renamed(nn.BatchNorm2d):
    """A subclass that keeps its forward."""


class Fused(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).relu()


def model() -> nn.Sequential:
    shared = nn.BatchNorm2d(4, momentum=None)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        shared,
        nn.Sequential(Renamed(4, affine=False), shared, nn.InstanceNorm2d(4), nn.GroupNorm(2, 4)),
        nn.BatchNorm1d(4),
        nn.BatchNorm3d(4, track_running_stats=False, dtype=torch.float64),
        nn.SyncBatchNorm(4),
    )


def classes(module: nn.Module) -> list[type]:
    return [type(m) for m in module.modules()]


def test_every_batch_norm_is_converted_and_nothing_else():
    converted = convert_sync_batchnorm(model())
    assert [type(m).__name__ for m in converted.modules()] == [
        "Sequential", "Conv2d", "SyncBatchNorm", "Sequential", "SyncBatchNorm", "InstanceNorm2d", "GroupNorm",
        "SyncBatchNorm", "SyncBatchNorm", "SyncBatchNorm",
    ]  # fmt: skip
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())  # which DDP refuses on CPU


def test_a_round_trip_is_the_identity():
    net = model()
    net[1].eval()
    net[2][0].custom = "mine"
    net[3].weight.requires_grad_(False)
    calls = []
    handle = net[1].register_forward_hook(lambda *_: calls.append("hook"))
    modules, attributes = list(net.modules()), [dict(vars(m)) for m in net.modules()]
    parameters, state, kinds = list(net.parameters()), copy.deepcopy(net.state_dict()), classes(net)

    assert convert_sync_batchnorm(net) is net
    assert isinstance(net[1], SyncBatchNorm)
    assert net[1] is net[2][1]
    assert not net[1].training
    net[1](torch.randn(2, 4, 5, 5))
    assert calls == ["hook"]
    assert net.state_dict().keys() == state.keys()

    assert revert_sync_batchnorm(net) is net
    assert classes(net) == kinds
    assert all(a is b for a, b in zip(net.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert [vars(m) for m in net.modules()] == attributes
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name])
    handle.remove()
    assert not net[1]._forward_hooks


def test_a_converted_layer_computes_the_same():
    plain = nn.BatchNorm2d(4).double()
    converted = convert_sync_batchnorm(copy.deepcopy(plain))
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(converted(x), plain(x), rtol=1e-12, atol=1e-12)


def test_copies_and_pickles_remember_where_they_came_from():
    converted = convert_sync_batchnorm(model())
    for clone in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert classes(revert_sync_batchnorm(clone)) == classes(model())


def test_converting_again_changes_nothing_but_the_group():
    group = object()
    net = convert_sync_batchnorm(model(), process_group=group)
    convert_sync_batchnorm(net)
    layers = [m for m in net.modules() if isinstance(m, SyncBatchNorm)]
    assert all(layer.process_group is group for layer in layers)
    assert classes(revert_sync_batchnorm(net)) == classes(model())


def test_torch_layers_keep_their_group():
    group = object()
    layer = convert_sync_batchnorm(nn.SyncBatchNorm(4, process_group=group))
    assert layer.process_group is group
    assert revert_sync_batchnorm(layer).process_group is group
    assert type(layer) is nn.SyncBatchNorm


@pytest.mark.parametrize(
    ("shapes", "kind"),
    [
        ([(4, 2)], nn.BatchNorm1d),
        ([(4, 2, 3), (4, 2)], nn.BatchNorm1d),
        ([(4, 2, 3, 3)], nn.BatchNorm2d),
        ([(4, 2, 3, 3, 3)], nn.BatchNorm3d),
    ],
)
def test_a_layer_built_directly_reverts_to_what_takes_its_inputs(shapes, kind):
    layer = SyncBatchNorm(2)
    for shape in shapes:
        layer(torch.randn(shape))
    assert type(revert_sync_batchnorm(layer)) is kind
    for shape in shapes:
        layer(torch.randn(shape))


@pytest.mark.parametrize(("shapes", "seen"), [([], "none"), ([(4, 2), (4, 2, 3, 3)], "2-D, 4-D")])
def test_a_layer_built_directly_is_refused_where_its_inputs_do_not_decide(shapes, seen):
    net = nn.ModuleDict({"first": convert_sync_batchnorm(nn.BatchNorm2d(2)), "second": SyncBatchNorm(2)})
    for shape in shapes:
        net["second"](torch.randn(shape))
    with pytest.raises(ConversionError, match=f"second: built as SyncBatchNorm.*has seen {seen}; run one batch"):
        revert_sync_batchnorm(net)
    assert isinstance(net["first"], SyncBatchNorm)  # refused as a whole


def parametrized() -> nn.Module:
    return parametrize.register_parametrization(nn.BatchNorm2d(4), "weight", nn.Softplus())


def patched() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    layer.forward = lambda input: input
    return layer


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.LazyBatchNorm2d, "1: LazyBatchNorm2d does not know its number of channels yet; run one batch"),
        (lambda: Fused(4), "1: Fused has a forward of its own"),
        (patched, "1: BatchNorm2d has a forward of its own"),
        (parametrized, "1: .*is parametrized; convert the model first"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_what_cannot_be_converted_is_refused_as_a_whole(layer, message):
    net = nn.Sequential(nn.BatchNorm2d(4), layer())
    with pytest.raises(ConversionError, match=message):
        convert_sync_batchnorm(net)
    assert type(net[0]) is nn.BatchNorm2d


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_layer_converts_once_it_knows_its_channels():
    layer = nn.LazyBatchNorm2d()
    layer(torch.randn(2, 4, 3, 3))
    assert type(convert_sync_batchnorm(layer)) is SyncBatchNorm
    assert type(revert_sync_batchnorm(layer)) is nn.BatchNorm2d
