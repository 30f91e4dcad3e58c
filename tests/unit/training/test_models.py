"""The builtin networks. A failure names the network whose shapes, initialization or names are not what they promise.

What is compared across the networks comes first; what only one of them promises follows.
"""

import copy
import math

import pytest
import torch
from torch import nn

from service.domain.catalog.models import MODELS
from service.domain.spec import ModelSpec, NormSpec
from service.training.errors import BadFactory
from service.training.models import build_model
from service.training.norm import configure_norm
from syncbn import SyncBatchNorm

SMALL = {
    "builtin:detector": ({"width": 4, "num_blocks": 1, "head_depth": 1}, (3, 19, 22)),
    "builtin:mlp": ({"hidden_sizes": [8, 6]}, (2, 3, 5)),
    "builtin:recurrent": ({"hidden_size": 6, "bidirectional": True}, (3, 7)),
    "builtin:resnet18": ({"stem": "cifar"}, (3, 17, 11)),
    "builtin:resnet34": ({}, (1, 40, 33)),
    "builtin:resnet50": ({"stem": "cifar"}, (2, 9, 9)),
    "builtin:small-cnn": ({"channels": [4, 6]}, (2, 7, 5)),
    "builtin:small-resnet": ({"width": 4}, (2, 7, 5)),
    "builtin:unet": ({"depth": 2, "width": 4}, (2, 13, 9)),
    "builtin:unet3d": ({"depth": 2, "width": 2}, (1, 5, 9, 6)),
}
"""Arguments and the shape of a sample with which each network is quick, sizes odd."""

NUM_NORMS = {
    "builtin:detector": 4 + 2 + 2,  # two halvings, a block, two heads
    "builtin:mlp": 2,
    "builtin:recurrent": 2,
    "builtin:resnet18": 20,
    "builtin:resnet34": 36,
    "builtin:resnet50": 53,
    "builtin:small-cnn": 2,
    "builtin:small-resnet": 4,
    "builtin:unet": 10,
    "builtin:unet3d": 10,
}

NUM_OUTPUTS = 5


def build(factory, args=None, shape=None, *, num_outputs=NUM_OUTPUTS, seed=0):
    task = min(MODELS[factory].tasks)
    small_args, small_shape = SMALL[factory]
    spec = ModelSpec(factory=factory, args=small_args if args is None else args)
    return build_model(spec, input_shape=shape or small_shape, num_outputs=num_outputs, task=task, seed=seed)


def inputs_of(shape, num_samples=3):
    return torch.randn(num_samples, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def flat(outputs):
    return (
        torch.cat([value.flatten() for value in outputs.values()]) if isinstance(outputs, dict) else outputs.flatten()
    )


def test_every_network_is_tried_here():
    assert SMALL.keys() == NUM_NORMS.keys() == MODELS.keys()


@pytest.mark.parametrize("factory", sorted(SMALL))
def test_a_network_computes_in_float64_and_every_parameter_gets_a_gradient(factory):
    model = build(factory).double()
    outputs = flat(model(inputs_of(SMALL[factory][1])))
    assert outputs.dtype == torch.float64
    outputs.mul(
        torch.randn(len(outputs), dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    ).sum().backward()
    silent = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert not silent


@pytest.mark.parametrize("factory", sorted(SMALL))
def test_a_network_has_as_many_plain_batch_norms_as_its_paper(factory):
    norms = [layer for layer in build(factory).modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == NUM_NORMS[factory]
    assert {type(layer) for layer in norms} <= {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d}


@pytest.mark.parametrize("factory", sorted(SMALL))
def test_a_network_computes_the_same_with_synchronized_norms(factory):
    plain = build(factory).double()
    synchronized = configure_norm(copy.deepcopy(plain), NormSpec(kind="sync"))
    assert sum(isinstance(layer, SyncBatchNorm) for layer in synchronized.modules()) == NUM_NORMS[factory]
    inputs = inputs_of(SMALL[factory][1])
    # Two ways to sum in float64: last places, which up to 53 norms of small batches amplify.
    torch.testing.assert_close(flat(synchronized(inputs)), flat(plain(inputs)), rtol=1e-7, atol=1e-9)
    assert list(synchronized.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize(
    ("factory", "args", "shape", "expected"),
    [
        ("builtin:mlp", {}, (11,), (NUM_OUTPUTS,)),
        ("builtin:mlp", {}, (2, 3, 4, 5), (NUM_OUTPUTS,)),
        ("builtin:small-cnn", {}, (3, 1), (NUM_OUTPUTS,)),
        ("builtin:small-cnn", {}, (3, 29, 31), (NUM_OUTPUTS,)),
        ("builtin:small-cnn", {}, (1, 5, 4, 3), (NUM_OUTPUTS,)),
        ("builtin:small-resnet", {}, (3, 15, 1), (NUM_OUTPUTS,)),
        ("builtin:resnet18", {}, (3, 33, 65), (NUM_OUTPUTS,)),
        ("builtin:resnet18", {"stem": "cifar"}, (1, 5, 3), (NUM_OUTPUTS,)),
        ("builtin:unet", {"depth": 3, "width": 2}, (1, 8, 8), (NUM_OUTPUTS, 8, 8)),
        ("builtin:unet", {"depth": 3, "width": 2}, (1, 15, 17), (NUM_OUTPUTS, 15, 17)),
        ("builtin:unet", {"depth": 1, "width": 1}, (4, 2, 3), (NUM_OUTPUTS, 2, 3)),
        ("builtin:unet3d", {"depth": 1, "width": 2}, (2, 3, 5, 2), (NUM_OUTPUTS, 3, 5, 2)),
        ("builtin:recurrent", {}, (4, 1), (NUM_OUTPUTS,)),
        ("builtin:recurrent", {"cell": "gru", "pooling": "mean"}, (1, 9), (NUM_OUTPUTS,)),
    ],
)
def test_outputs_have_the_documented_shape_at_odd_sizes(factory, args, shape, expected):
    model = build(factory, args, shape)
    assert model(inputs_of(shape, num_samples=2).float()).shape == (2, *expected)


@pytest.mark.parametrize(
    ("factory", "shape", "word"),
    [
        ("builtin:small-cnn", (9,), r"\(C, H, W\)"),
        ("builtin:small-resnet", (3, 9), r"\(C, H, W\)"),
        ("builtin:resnet50", (9,), r"\(C, H, W\)"),
        ("builtin:unet", (1, 8, 8, 8), r"\(C, H, W\)"),
        ("builtin:unet3d", (1, 8, 8), r"\(C, D, H, W\)"),
        ("builtin:recurrent", (1, 8, 8), r"\(C, T\)"),
        ("builtin:detector", (8, 8), r"\(C, H, W\)"),
    ],
)
def test_samples_of_another_shape_are_refused(factory, shape, word):
    with pytest.raises(BadFactory, match=rf"model\.factory: {factory} takes samples of shape .*{word}"):
        build(factory, {}, shape)


@pytest.mark.parametrize(
    ("shape", "remedy"), [((1, 7, 64), "at most 2, or"), ((1, 1, 1), "Give it samples of at least 8")]
)
def test_images_that_are_too_small_to_be_halved_so_often_are_refused(shape, remedy):
    with pytest.raises(BadFactory, match=rf"model\.args\.depth: builtin:unet .* {remedy}"):
        build("builtin:unet", {"depth": 3}, shape)


def test_a_task_whose_targets_the_outputs_do_not_fit_is_refused():
    spec = ModelSpec(factory="builtin:unet")
    with pytest.raises(BadFactory, match=r"model\.factory: builtin:unet .* not for classification.*builtin:mlp"):
        build_model(spec, input_shape=(1, 8, 8), num_outputs=2, task="classification", seed=0)


@pytest.mark.parametrize("task", ["segmentation", "regression", "custom"])
def test_a_task_whose_targets_the_outputs_fit_is_taken(task):
    spec = ModelSpec(factory="builtin:unet", args={"depth": 1, "width": 1})
    build_model(spec, input_shape=(1, 8, 8), num_outputs=2, task=task, seed=0)


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("factory", "published", "num_tensors"),
    [
        ("builtin:resnet18", 11_689_512, 122),
        ("builtin:resnet34", 21_797_672, 218),
        ("builtin:resnet50", 25_557_032, 320),
    ],
)
def test_resnets_are_those_whose_weights_are_published(factory, published, num_tensors):
    with torch.device("meta"):
        model = build(factory, {}, (3, 224, 224), num_outputs=1000)
    assert num_parameters(model) == published
    assert len(model.state_dict()) == num_tensors


def test_resnet_weights_have_the_names_and_shapes_of_the_published_ones():
    with torch.device("meta"):
        basic = build("builtin:resnet18", {}, (3, 224, 224), num_outputs=1000).state_dict()
        bottleneck = build("builtin:resnet50", {}, (3, 224, 224), num_outputs=1000).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in basic.items()}.items() >= {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.weight": (64,),
        "bn1.running_mean": (64,),
        "bn1.num_batches_tracked": (),
        "layer1.0.conv1.weight": (64, 64, 3, 3),
        "layer2.0.conv1.weight": (128, 64, 3, 3),
        "layer2.0.downsample.0.weight": (128, 64, 1, 1),
        "layer2.0.downsample.1.running_var": (128,),
        "layer4.1.bn2.bias": (512,),
        "fc.weight": (1000, 512),
        "fc.bias": (1000,),
    }.items()
    assert {name: tuple(tensor.shape) for name, tensor in bottleneck.items()}.items() >= {
        "layer1.0.conv1.weight": (64, 64, 1, 1),
        "layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "layer1.2.bn3.weight": (256,),
        "layer3.5.conv2.weight": (256, 256, 3, 3),
        "layer4.2.conv3.weight": (2048, 512, 1, 1),
        "fc.weight": (1000, 2048),
    }.items()
    assert "layer1.0.downsample.0.weight" not in basic


@pytest.mark.parametrize("factory", ["builtin:resnet18", "builtin:resnet50"])
def test_blocks_begin_as_their_shortcut_where_that_is_asked_for(factory):
    model = build(factory, {"stem": "cifar", "zero_init_residual": True}, (3, 8, 8))
    images = torch.rand(2, model.layer1[-1].conv1.in_channels, 4, 4)
    torch.testing.assert_close(model.layer1[-1](images), images, rtol=0, atol=0)
    assert not torch.equal(build(factory, {"stem": "cifar"}, (3, 8, 8)).layer1[-1](images), images)


def test_the_small_stem_keeps_the_resolution():
    seen = []
    for stem in ("cifar", "imagenet"):
        model = build("builtin:resnet18", {"stem": stem}, (3, 32, 32))
        model.layer1.register_forward_hook(lambda layer, inputs, output: seen.append(output.shape[2:]))
        model(torch.zeros(2, 3, 32, 32))
    assert seen == [(32, 32), (8, 8)]


def test_names_of_the_first_networks_stay():
    mlp = build("builtin:mlp", {"hidden_sizes": [4]}, (3,)).state_dict()
    assert list(mlp) == [
        "1.weight",
        *(f"2.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        "4.weight",
        "4.bias",
    ]
    residual = build("builtin:small-resnet", {}, (1, 8, 8)).state_dict()
    assert {
        "stem.0.weight",
        "stem.0.bias",
        "blocks.1.conv2.weight",
        "blocks.0.norm1.running_var",
        "classifier.bias",
    } <= {*residual}


@pytest.mark.parametrize(
    ("factory", "args", "shape", "num_dropouts"),
    [
        ("builtin:mlp", {"hidden_sizes": [4, 4]}, (3,), 2),
        ("builtin:small-cnn", {}, (3, 8), 1),
        ("builtin:recurrent", {}, (3, 8), 1),
    ],
)
def test_dropout_is_a_layer_that_works_in_training_only(factory, args, shape, num_dropouts):
    model = build(factory, {**args, "dropout": 0.5}, shape).eval()
    dropouts = [layer for layer in model.modules() if isinstance(layer, nn.Dropout)]
    assert [layer.p for layer in dropouts] == [0.5] * num_dropouts
    inputs = inputs_of(shape).float()
    assert torch.equal(model(inputs), model(inputs))
    for layer in dropouts:
        layer.train()
    assert not torch.equal(model(inputs), model(inputs))


def test_weights_before_a_relu_have_the_variance_of_their_paper():
    # 2 / (inputs of a cell); the tolerance is five standard errors of a sample of this size.
    unet = build("builtin:unet", {"depth": 1, "width": 64}, (1, 8, 8))
    for weight, num_inputs in ((unet.down[1][0].weight, 64 * 9), (unet.up_convolutions[0].weight, 128)):
        variance = weight.detach().square().mean().item()
        assert variance == pytest.approx(2 / num_inputs, rel=5 * math.sqrt(2 / weight.numel()))


def test_the_unet_for_volumes_has_the_published_size():
    with torch.device("meta"):
        model = build("builtin:unet3d", {"depth": 3, "width": 32}, (3, 132, 132, 116), num_outputs=3)
    scales = sum(layer.num_features for layer in model.modules() if isinstance(layer, nn.BatchNorm3d))
    # Çiçek et al. count one offset per convolution, which here is the norm's β, and no scale γ.
    assert num_parameters(model) - scales == 19_069_955


@pytest.mark.parametrize(("factory", "shape"), [("builtin:unet", (1, 13, 11)), ("builtin:unet3d", (1, 5, 7, 6))])
def test_every_pixel_of_an_odd_size_is_labelled_from_itself(factory, shape):
    model = build(factory, {"depth": 2, "width": 2}, shape, num_outputs=1).double().eval()
    for corner in (0, -1):
        inputs = inputs_of(shape, num_samples=1).requires_grad_()
        place = (0, 0, *[corner] * (len(shape) - 1))
        model(inputs)[place].backward()
        assert inputs.grad[place] != 0


def test_recurrent_norms_take_their_statistics_over_time_and_batch():
    model = build("builtin:recurrent", {"hidden_size": 3, "num_layers": 1}, (2, 7)).double()
    model.norms[0].momentum = 1.0
    sequences = inputs_of((2, 7))
    states, _ = model.layers[0](sequences.transpose(1, 2))
    model(sequences)
    vectors = states.detach().reshape(-1, 3)  # (N · T, features)
    torch.testing.assert_close(model.norms[0].running_mean, vectors.mean(dim=0))
    torch.testing.assert_close(model.norms[0].running_var, vectors.var(dim=0))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_last_states_of_both_directions_decide(cell):
    args = {"cell": cell, "hidden_size": 3, "num_layers": 1, "bidirectional": True}
    model = build("builtin:recurrent", args, (2, 7)).double().eval()
    sequences = inputs_of((2, 7))
    _, last = model.layers[0](sequences.transpose(1, 2))
    hidden = last[0] if cell == "lstm" else last  # (2, N, features)
    fresh_norm = 1 / math.sqrt(1 + model.norms[0].eps)
    torch.testing.assert_close(model(sequences), model.classifier(torch.cat([*hidden], dim=1) * fresh_norm))


def test_the_mean_over_time_decides_where_that_is_asked_for():
    model = build("builtin:recurrent", {"num_layers": 1, "pooling": "mean"}, (2, 7)).double().eval()
    sequences = inputs_of((2, 7))
    states, _ = model.layers[0](sequences.transpose(1, 2))
    fresh_norm = 1 / math.sqrt(1 + model.norms[0].eps)
    torch.testing.assert_close(model(sequences), model.classifier(states.mean(dim=1) * fresh_norm))


def test_recurrent_weights_begin_orthogonal_and_forget_gates_open():
    layer = build("builtin:recurrent", {"hidden_size": 4}, (3, 7)).layers[0]
    for gate in layer.weight_hh_l0.detach().chunk(4):
        torch.testing.assert_close(gate @ gate.T, torch.eye(4))
    bias = (layer.bias_ih_l0 + layer.bias_hh_l0).detach()
    assert bias.tolist() == [0.0] * 4 + [1.0] * 4 + [0.0] * 8  # input, forget, cell, output


@pytest.mark.parametrize(("stride", "grid"), [(4, (5, 6)), (8, (3, 3))])
def test_the_detector_gives_logits_and_distances_of_each_cell(stride, grid):
    model = build("builtin:detector", {"stride": stride, "width": 4}, (3, 18, 23), num_outputs=7)
    assert model.stride == stride
    outputs = model(inputs_of((3, 18, 23), num_samples=2).float())
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "scores": (2, 7, *grid),
        "boxes": (2, 4, *grid),
    }
    assert (outputs["boxes"] > 0).all()
    # What the priors of the heads say, blurred by small random weights.
    assert outputs["scores"].sigmoid().mean().item() == pytest.approx(0.01, rel=0.5)
    assert outputs["boxes"].mean().item() == pytest.approx(math.log(2) * stride, rel=0.2)


@pytest.mark.parametrize("stride", [4, 8])
def test_a_cell_of_the_detector_looks_at_its_own_place(stride):
    args = {"stride": stride, "width": 2, "num_blocks": 0, "head_depth": 1}
    size, row, column = 24 * stride, 10, 13
    model = build("builtin:detector", args, (1, size, size), num_outputs=1).double().eval()
    images = inputs_of((1, size, size), num_samples=1).requires_grad_()
    model(images)["scores"][0, 0, row, column].backward()
    ys, xs = images.grad[0, 0].nonzero(as_tuple=True)
    for pixels, cell in ((ys, row), (xs, column)):
        assert cell * stride <= (pixels.min() + pixels.max() + 1) / 2 < (cell + 1) * stride
