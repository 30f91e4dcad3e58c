"""Folding batch norms into what is before them: outputs have to be equal, and what cannot be folded left alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from syncbn import SyncBatchNorm, convert_sync_batchnorm
from syncbn.errors import ConversionError
from syncbn.folding import fold_batchnorm
from syncbn.freezing import freeze


def settled(module: nn.Module) -> nn.Module:
    """With statistics and parameters as training leaves them."""
    torch.manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for tensor in (layer.weight, layer.bias, layer.running_mean):
                if tensor is not None:
                    nn.init.normal_(tensor)
            if layer.running_var is not None:
                nn.init.uniform_(layer.running_var, 0.1, 2)
    return module


def num_batch_norms(module: nn.Module) -> int:
    return sum(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in module.modules())


def assert_same_outputs(folded: nn.Module, module: nn.Module, x: torch.Tensor) -> None:
    assert not folded.training
    # Two roundings of each weight instead of one, summed over a hundred products of order one, in x's precision.
    tolerance = 200 * torch.finfo(x.dtype).eps
    torch.testing.assert_close(folded(x), module.eval()(x), rtol=tolerance, atol=tolerance)


MAPS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, bias=False), nn.BatchNorm1d, (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d, (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3), nn.BatchNorm3d, (2, 4, 4, 4, 4)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d, (2, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d, (2, 6, 5, 5)),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, stride=2, dilation=2, padding_mode="reflect", padding=2), nn.BatchNorm2d,
                (2, 4, 9, 9)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d, (2, 4, 5)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, bias=False), nn.BatchNorm2d, (2, 4, 5, 5)),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 6, 3), nn.BatchNorm3d, (2, 4, 3, 3, 3)),
    "transposed_grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d, (2, 4, 5, 5)),
    "linear": (lambda: nn.Linear(4, 6, bias=False), nn.BatchNorm1d, (5, 4)),
}  # fmt: skip


@pytest.mark.parametrize("synchronized", [True, False])
@pytest.mark.parametrize("case", MAPS)
def test_outputs_stay(case, synchronized):
    make, kind, shape = MAPS[case]
    net = settled(nn.Sequential(make(), kind(6)))
    if synchronized:
        convert_sync_batchnorm(net)
    folded = fold_batchnorm(net)
    assert [type(m) for m in folded] == [type(net[0]), nn.Identity]
    assert_same_outputs(folded, net, torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weights_are_rounded_once(dtype):
    net = settled(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6))).to(dtype)
    folded = fold_batchnorm(net)
    conv, norm = net
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    half_unit = torch.finfo(dtype).eps / 2 * (1.01 if dtype != torch.float64 else 4)  # the truth itself is float64
    exact = conv.weight.double() * scale.view(-1, 1, 1, 1)
    assert folded[0].weight.dtype == folded[0].bias.dtype == dtype
    torch.testing.assert_close(folded[0].weight.double(), exact, rtol=half_unit, atol=0)
    exact = norm.bias.double() - norm.running_mean.double() * scale
    torch.testing.assert_close(folded[0].bias.double(), exact, rtol=half_unit, atol=half_unit)


@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}, {"eps": 0.1}])
def test_batch_norms_of_every_kind(options):
    net = settled(nn.Sequential(nn.Conv2d(4, 6, 3), SyncBatchNorm(6, **options)))
    folded = fold_batchnorm(net)
    assert num_batch_norms(folded) == 0
    assert_same_outputs(folded, net, torch.randn(2, 4, 5, 5))


@pytest.mark.parametrize(("activation", "kind"), [("relu", nn.ReLU), ("leaky_relu", nn.LeakyReLU), ("silu", nn.SiLU)])
def test_a_fused_activation_remains(activation, kind):
    layer = SyncBatchNorm(6, activation=activation, negative_slope=0.3)
    net = settled(nn.Sequential(nn.Conv2d(4, 6, 3), layer))
    folded = fold_batchnorm(net)
    assert type(folded[1]) is kind
    assert_same_outputs(folded, net, torch.randn(2, 4, 5, 5))


class Block(nn.Module):
    """A residual block; with `fused`, its last batch norm adds the shortcut."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.bn2 = SyncBatchNorm(4, activation="relu") if fused else nn.BatchNorm2d(4)
        self.shortcut = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.fused = fused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv2(F.relu(self.bn1(self.conv1(x))))
        if self.fused:
            return self.bn2(y, self.shortcut(x))
        return F.relu(self.bn2(y) + self.shortcut(x))


def test_a_resnet():
    net = settled(convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Block(), Block())))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    folded = fold_batchnorm(net)
    assert num_batch_norms(folded) == 0
    assert_same_outputs(folded, net, torch.randn(2, 3, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training or num_batch_norms(net) == 7


def test_a_batch_norm_that_adds_a_residual_is_left_alone():
    net = settled(Block(fused=True))
    folded = fold_batchnorm(net)
    assert isinstance(folded.bn1, nn.Identity)
    assert isinstance(folded.bn2, SyncBatchNorm)
    assert_same_outputs(folded, net, torch.randn(2, 4, 8, 8))


def test_frozen_layers_are_folded():
    net = settled(freeze(convert_sync_batchnorm(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)))))
    assert num_batch_norms(fold_batchnorm(net)) == 0


def test_what_learns_and_where_it_lies_in_memory_is_kept():
    net = settled(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))).to(memory_format=torch.channels_last)
    net[0].weight.requires_grad_(False)
    folded = fold_batchnorm(net)
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not folded[0].weight.requires_grad
    assert folded[0].bias.requires_grad


class Uses(nn.Module):
    """A convolution and a batch norm, in an order of a function's choice."""

    def __init__(self, call, **layers: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self, x)


def output_used_twice(m: Uses, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    return m.norm(y) + y


class Activated(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).relu()


def hooked() -> nn.Module:
    layer = nn.Conv2d(4, 4, 3, padding=1)
    layer.register_forward_hook(lambda module, args, output: output * 2)
    return layer


LEFT_ALONE = {
    "another use of the output": lambda: Uses(output_used_twice),
    "a convolution called twice": lambda: Uses(lambda m, x: m.norm(m.conv(m.conv(x)))),
    "a batch norm called twice": lambda: Uses(lambda m, x: m.norm(m.norm(m.conv(x)))),
    "something between": lambda: Uses(lambda m, x: m.norm(m.conv(x).relu())),
    "the other order": lambda: Uses(lambda m, x: m.conv(m.norm(x))),
    "another use of the weight": lambda: Uses(lambda m, x: m.norm(m.conv(x)) * m.conv.weight.sum()),
    "a mask": lambda: Uses(lambda m, x: m.norm(m.conv(x), mask=x[:, 0] > 0), norm=SyncBatchNorm(4)),
    "no running statistics": lambda: Uses(
        lambda m, x: m.norm(m.conv(x)), norm=nn.BatchNorm2d(4, track_running_stats=False)
    ),
    "a forward of its own": lambda: convert_sync_batchnorm(Uses(lambda m, x: m.norm(m.conv(x)), norm=Activated(4))),
    "a hook": lambda: Uses(lambda m, x: m.norm(m.conv(x)), conv=hooked()),
    "a parametrization": lambda: Uses(
        lambda m, x: m.norm(m.conv(x)), conv=parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1))
    ),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_folding_would_change_is_left_alone(case):
    net = settled(LEFT_ALONE[case]())
    folded = fold_batchnorm(net)
    assert num_batch_norms(folded) == 1
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(folded(x), net.eval()(x))


class Branching(nn.Module):
    """Its forward depends on values, which torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x))
        return y if y.mean() > 0 else -y


def test_pairs_say_what_cannot_be_traced():
    net = settled(Branching())
    with pytest.raises(ConversionError, match=r"torch.fx cannot trace it \(TraceError: .*pairs=\[\("):
        fold_batchnorm(net)
    folded = fold_batchnorm(net, pairs=[("conv", "norm")])
    assert isinstance(folded.norm, nn.Identity)
    assert_same_outputs(folded, net, torch.randn(2, 4, 5, 5))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("0", "nowhere")], "the model has no module 'nowhere'"),
        ([("2", "1")], "2 and 1 cannot be folded: a ReLU is neither a convolution nor linear"),
        ([("0", "2")], "0 and 2 cannot be folded: a ReLU is not a batch norm"),
        ([("0", "3")], "0 and 3 cannot be folded: the batch norm has no running statistics"),
        ([("0", "4")], "the Conv2d has 6 outputs, the batch norm 5 channels"),
        ([("0", "1"), ("0", "1")], "pairs: 0 occurs in more than one"),
    ],
)
def test_pairs_that_cannot_be_folded_are_refused(pairs, message):
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), SyncBatchNorm(6, track_running_stats=False), nn.BatchNorm2d(5)
    )
    with pytest.raises(ConversionError, match=message):
        fold_batchnorm(net, pairs=pairs)


def test_a_linear_layer_on_sequences_is_left_alone():
    net = settled(nn.Sequential(nn.Linear(4, 6), SyncBatchNorm(6)))
    x = torch.randn(2, 6, 4)  # batch norm's channels are the sequence's positions
    net(x)
    folded = fold_batchnorm(net)
    assert torch.equal(folded(x), net.eval()(x))
