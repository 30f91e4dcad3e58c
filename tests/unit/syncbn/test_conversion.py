"""Converting models and back. A failure here means that a model lost something on the way."""

import copy
import functools
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from syncbn import DeferredStatistics, SyncBatchNorm, convert_sync_batchnorm, monitor, revert_sync_batchnorm
from syncbn.errors import ArgumentError, ConversionError
from syncbn.freezing import freeze
from syncbn.renormalization import Renormalization


class Renamed(nn.BatchNorm2d):
    """A subclass that keeps its forward, and adds something."""

    label = "mine"


class Fused(nn.BatchNorm2d):
    """As backbones fuse activations: a module of its own, and a further argument."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.act = nn.Hardtanh()

    def forward(self, input: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.act(super().forward(input)) * scale


def decorated(function):
    @functools.wraps(function)
    def call(*args):
        return function(*args)

    return call


class Scaling:
    """A mixin; in front of a batch norm its super() is that batch norm."""

    @decorated
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * self.normalized(input)

    def normalized(self, input: torch.Tensor) -> torch.Tensor:
        return super(Scaling, self).forward(input)  # noqa: UP008


class Mixed(Scaling, nn.BatchNorm2d):
    pass


class Own(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, self.training)
        return x.relu()


class OwnBelow(Own):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class Explicit(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.BatchNorm2d.forward(self, input).relu()


class Sometimes(nn.BatchNorm2d):
    """Its code names super().forward, which training does not reach."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input - input.mean() if self.training else super().forward(input)


class OwnSync(nn.SyncBatchNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).relu()


class Activated(nn.BatchNorm2d):
    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.activation = nn.ReLU()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.activation(super().forward(input))


class Derived(SyncBatchNorm):
    pass


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
        "Sequential", "Conv2d", "SyncBatchNorm", "Sequential", "SyncRenamed", "InstanceNorm2d", "GroupNorm",
        "SyncBatchNorm", "SyncBatchNorm", "SyncBatchNorm",
    ]  # fmt: skip
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())  # which DDP refuses on CPU
    assert all(isinstance(converted.get_submodule(path), SyncBatchNorm) for path in ("1", "2.0", "3", "4", "5"))
    assert converted[2][0].label == "mine"


def hooked(module: nn.Module) -> list[str]:
    """Hooks of every kind; what it returns grows as they run."""
    calls: list[str] = []
    module.register_forward_pre_hook(lambda *_: calls.append("forward_pre"))
    module.register_forward_hook(lambda *_: calls.append("forward"))
    module.register_full_backward_hook(lambda *_: calls.append("backward"))
    module.register_state_dict_pre_hook(lambda *_: calls.append("state_dict_pre"))
    return calls


@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_a_round_trip_is_the_identity(skip_nonfinite):
    net = nn.Sequential(*model(), Fused(4), Mixed(4))
    net[1].eval()
    net[2][0].custom = "mine"
    net[2][0].name = "its own"
    net[3].weight.requires_grad_(False)
    calls = hooked(net[1])
    modules, attributes = list(net.modules()), [copy.copy(vars(m)) for m in net.modules()]
    tables = [{key: dict(value) for key, value in each.items() if isinstance(value, dict)} for each in attributes]
    hidden = [set(m._non_persistent_buffers_set) for m in net.modules()]
    tensors = [*net.parameters(), *net.buffers()]
    state, kinds = copy.deepcopy(net.state_dict()), classes(net)

    assert convert_sync_batchnorm(net, skip_nonfinite=skip_nonfinite) is net
    assert isinstance(net[1], SyncBatchNorm)
    assert net[1] is net[2][1]
    assert not net[1].training
    assert list(net.state_dict()) == list(state)
    calls.clear()
    net[1](torch.randn(2, 4, 5, 5, requires_grad=True)).sum().backward()
    assert calls == ["forward_pre", "forward", "backward"]
    net[6].train()
    net[6](torch.randn(2, 4, 5, 5))  # leaves its notes behind
    net[6].load_state_dict({key[2:]: value for key, value in state.items() if key.startswith("6.")})

    assert revert_sync_batchnorm(net) is net
    assert classes(net) == kinds
    assert all(a is b for a, b in zip(net.modules(), modules, strict=True))
    assert all(a is b for a, b in zip([*net.parameters(), *net.buffers()], tensors, strict=True))
    assert [vars(m) for m in net.modules()] == attributes
    assert [{key: vars(m)[key] for key in table} for m, table in zip(modules, tables, strict=True)] == tables
    assert [m._non_persistent_buffers_set for m in net.modules()] == hidden
    assert list(net.state_dict()) == list(state)
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name])


def test_layers_are_named_after_their_place():
    net = nn.ModuleDict({"backbone": model(), "head": nn.BatchNorm1d(4)})
    net["head"].name = "mine"
    convert_sync_batchnorm(net["backbone"])
    assert net["backbone"][2][0].name == "2.0"
    convert_sync_batchnorm(net)
    assert [net["backbone"][2][0].name, net["backbone"][1].name, net["head"].name] == [
        "backbone.2.0", "backbone.1", "mine",
    ]  # fmt: skip
    assert "name" not in vars(convert_sync_batchnorm(nn.BatchNorm1d(4)))


def test_the_guard_against_nonfinite_batches_comes_and_goes():
    net = convert_sync_batchnorm(model(), skip_nonfinite=True)
    assert [m.skip_nonfinite for m in net.modules() if isinstance(m, SyncBatchNorm)] == [True, True, True, False, True]
    convert_sync_batchnorm(net)
    assert net[1].skip_nonfinite  # left as it is
    net[1](torch.full((2, 4, 3, 3), torch.nan))
    assert net[1].num_nonfinite_batches == 1
    assert not any("nonfinite" in name for name, _ in revert_sync_batchnorm(net).named_buffers())


@pytest.mark.parametrize("kind", [Fused, Mixed])
@pytest.mark.parametrize("training", [True, False])
def test_a_forward_that_goes_through_super_keeps_its_behaviour(kind, training):
    plain = kind(4).double().train(training)
    nn.init.uniform_(plain.weight)
    nn.init.uniform_(plain.running_mean)
    converted = convert_sync_batchnorm(copy.deepcopy(plain))
    assert isinstance(converted, kind)
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    arguments = (x, 0.5) if kind is Fused else (x,)
    torch.testing.assert_close(converted(*arguments), plain(*arguments), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(converted.running_var, plain.running_var, rtol=1e-12, atol=1e-12)
    assert type(revert_sync_batchnorm(converted)) is kind


def save_and_load(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), save_and_load]
)
def test_a_made_class_survives_copies(duplicate):
    net = convert_sync_batchnorm(nn.Sequential(Fused(4)))
    clone = duplicate(net)
    x = torch.randn(3, 4, 5, 5)
    assert type(clone[0]) is type(net[0])
    assert clone[0].name == "0"
    assert torch.equal(clone(x), net(x))
    assert type(revert_sync_batchnorm(clone)[0]) is Fused


def test_a_made_class_compiles_without_a_break():
    net = convert_sync_batchnorm(nn.Sequential(Fused(4)))
    plain = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(3, 4, 5, 5)
        # Fused differently, so to float32's rounding of outputs of order one.
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-6, atol=1e-6)


def test_a_call_that_did_not_synchronize_raises():
    layer = convert_sync_batchnorm(nn.Sequential(Sometimes(4)))
    x = torch.randn(3, 4, 5, 5)
    with pytest.raises(ConversionError, match=r"0: the forward of Sometimes did not call super\(\).forward"):
        layer(x)
    layer.eval()(x)


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


def labelled() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    layer.frozen = "by hand"
    return layer


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.LazyBatchNorm2d, "1: LazyBatchNorm2d does not know its number of channels yet; run one batch"),
        (lambda: Own(4), "1: Own has a forward of its own, which does not leave"),
        (lambda: OwnBelow(4), "1: OwnBelow has a forward of its own"),
        (lambda: Explicit(4), "1: Explicit has a forward of its own"),
        (lambda: OwnSync(4), "1: OwnSync derives from torch.nn.SyncBatchNorm"),
        (patched, "1: BatchNorm2d has a forward of its own"),
        (lambda: Activated(4), "1: Activated has an attribute 'activation', which .* rename it"),
        (labelled, "1: BatchNorm2d has an attribute 'frozen', which .* rename it"),
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


@pytest.mark.parametrize("group", ["locl", ""])
def test_a_group_that_is_none_is_refused(group):
    with pytest.raises(ArgumentError, match='process_group: expected a group, "local" or None'):
        convert_sync_batchnorm(nn.BatchNorm2d(4), process_group=group)


def test_the_local_group_is_kept_by_pickles_and_forgotten_by_revert():
    layer = convert_sync_batchnorm(nn.BatchNorm2d(4), process_group="local")
    layer = pickle.loads(pickle.dumps(layer))
    assert layer.process_group == "local"
    assert "process_group" not in vars(revert_sync_batchnorm(layer))


@pytest.mark.parametrize(
    ("option", "value"), [("activation", "relu"), ("ghost_size", 2), ("renormalization", Renormalization())]
)
def test_options_that_torch_does_not_have_are_not_dropped(option, value):
    net = nn.Sequential(nn.BatchNorm2d(4), SyncBatchNorm(4, **{option: value}))
    with pytest.raises(ConversionError, match=rf"1: has {option}, which torch.nn's batch norm has not"):
        revert_sync_batchnorm(convert_sync_batchnorm(net))
    setattr(net[1], option, None)
    net[1](torch.randn(4, 4, 3, 3))
    assert type(revert_sync_batchnorm(net)[1]) is nn.BatchNorm2d
    assert option not in vars(net[1])


def test_a_layer_without_bias_reverts():
    layer = SyncBatchNorm(4, bias=False)
    x = torch.randn(3, 4, 5, 5)
    expected = layer(x)
    torch.testing.assert_close(revert_sync_batchnorm(layer)(x), expected, rtol=1e-6, atol=1e-6)  # float32, order one


def test_a_class_derived_from_ours_is_not_dropped():
    layer = Derived(4)
    layer(torch.randn(3, 4, 5, 5))
    with pytest.raises(ConversionError, match="the module itself: Derived was derived from SyncBatchNorm"):
        revert_sync_batchnorm(layer)


def test_reverting_forgets_that_a_layer_was_frozen():
    net = nn.Sequential(nn.BatchNorm2d(4))
    before = set(vars(net[0]))
    freeze(convert_sync_batchnorm(net))
    revert_sync_batchnorm(net)
    assert set(vars(net[0])) == before
    assert not net[0].training
    assert not net[0].weight.requires_grad
    assert net.train()[0].training


def test_a_watched_layer_is_not_reverted():
    layer = convert_sync_batchnorm(nn.BatchNorm1d(3))
    with DeferredStatistics(layer), pytest.raises(ConversionError, match=r"close\(\)"):
        revert_sync_batchnorm(layer)
    with monitor(layer), pytest.raises(ConversionError, match=r"close\(\)"):
        revert_sync_batchnorm(layer)
    assert type(revert_sync_batchnorm(layer)) is nn.BatchNorm1d


def test_a_sync_batch_norm_of_torch_is_not_given_a_group_that_it_does_not_know():
    layer = convert_sync_batchnorm(nn.SyncBatchNorm(3), "local")
    with pytest.raises(ConversionError, match="local"):
        revert_sync_batchnorm(layer)
