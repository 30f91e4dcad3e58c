"""Builds the model that a job names: a builtin one, a library's, or one from the job's own code."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from service.domain.catalog.arguments import EXTERNAL_LIBRARY
from service.domain.catalog.models import (
    DetectorArguments,
    MlpArguments,
    RecurrentArguments,
    ResNetArguments,
    SmallCnnArguments,
    SmallResNetArguments,
    Unet3dArguments,
    UnetArguments,
    unsuited_to_task,
)
from service.domain.spec import ModelSpec
from service.training.errors import BadFactory
from service.training.factories import call_factory
from service.training.models.detector import Detector
from service.training.models.libraries import build_library_model
from service.training.models.mlp import Mlp
from service.training.models.recurrent import Recurrent
from service.training.models.resnet import LAYOUTS, ResNet
from service.training.models.small_cnn import SmallCnn
from service.training.models.small_resnet import SmallResNet
from service.training.models.unet import unet, unet3d
from service.training.sampling import derive_seed

Arguments = dict[str, Any]
Shape = tuple[int, ...]


def build_model(spec: ModelSpec, *, input_shape: Shape, num_outputs: int, task: str, seed: int) -> nn.Module:
    """Build and initialize the model that a specification names, the same on every rank.

    The batch norms of builtin models are plain ``torch.nn`` ones.

    Args:
        spec: names it.
        input_shape: of one sample, (C, *).
        num_outputs: width of the output: classes, or values to predict.
        task: name of what is learned; a builtin model whose outputs do not fit it is refused.
        seed: of the job. torch's generator starts from it, for user code as well.

    Raises:
        BadFactory: the model does not fit the task or the samples, its library is missing, or the job's own code
            fails or returns something else.
    """
    reason = unsuited_to_task(spec.factory, task)
    if reason is not None:
        raise BadFactory(f"model.factory: {reason}")
    torch.manual_seed(derive_seed(seed=seed, purpose="model"))
    builder = MODEL_BUILDERS.get(spec.factory)
    if builder is not None:
        return builder(dict(spec.args), input_shape, num_outputs)
    library = EXTERNAL_LIBRARY.match(spec.factory)
    if library is not None:
        model = build_library_model(
            library["library"], library["name"], spec.args, input_shape=input_shape, num_outputs=num_outputs
        )
    else:
        offers = {"input_shape": input_shape, "num_outputs": num_outputs, "seed": seed}
        model = call_factory(spec.factory, spec.args, field="model.factory", offers=offers)
    return _checked(model, spec.factory)


def _checked(model: object, factory: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise BadFactory(
            f"model.factory: {factory} returned {type(model).__module__}.{type(model).__qualname__}; "
            "it must return a torch.nn.Module."
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise BadFactory(
                f"model.factory: {name} of {factory} is lazy and has no shape yet; let the function run the model "
                "once on a tensor of input_shape before it returns it."
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise BadFactory(f"model.factory: {factory} returned a model without a parameter to train.")
    return model


def _mlp(arguments: Arguments, input_shape: Shape, num_outputs: int) -> nn.Module:
    options = MlpArguments.model_validate(arguments)
    return Mlp(in_features=torch.Size(input_shape).numel(), num_outputs=num_outputs, **dict(options))


def _small_cnn(arguments: Arguments, input_shape: Shape, num_outputs: int) -> nn.Module:
    options = SmallCnnArguments.model_validate(arguments)
    num_dimensions = len(input_shape) - 1
    if num_dimensions not in (1, 2, 3):
        raise _wrong_shape("builtin:small-cnn", "(C, T), (C, H, W) or (C, D, H, W)", input_shape)
    return SmallCnn(in_channels=input_shape[0], num_dimensions=num_dimensions, num_outputs=num_outputs, **dict(options))


def _small_resnet(arguments: Arguments, input_shape: Shape, num_outputs: int) -> nn.Module:
    options = SmallResNetArguments.model_validate(arguments)
    _require_dimensions("builtin:small-resnet", "(C, H, W)", input_shape)
    return SmallResNet(in_channels=input_shape[0], num_outputs=num_outputs, **dict(options))


def _resnet(arguments: Arguments, input_shape: Shape, num_outputs: int, *, name: str) -> nn.Module:
    options = ResNetArguments.model_validate(arguments)
    _require_dimensions(f"builtin:{name}", "(C, H, W)", input_shape)
    block, blocks_per_stage = LAYOUTS[name]
    return ResNet(
        block=block,
        blocks_per_stage=blocks_per_stage,
        in_channels=input_shape[0],
        num_outputs=num_outputs,
        **dict(options),
    )


def _unet(arguments: Arguments, input_shape: Shape, num_outputs: int) -> nn.Module:
    options = UnetArguments.model_validate(arguments)
    _require_dimensions("builtin:unet", "(C, H, W)", input_shape)
    _require_depth("builtin:unet", options.depth, input_shape)
    return unet(in_channels=input_shape[0], num_outputs=num_outputs, **dict(options))


def _unet3d(arguments: Arguments, input_shape: Shape, num_outputs: int) -> nn.Module:
    options = Unet3dArguments.model_validate(arguments)
    _require_dimensions("builtin:unet3d", "(C, D, H, W)", input_shape)
    _require_depth("builtin:unet3d", options.depth, input_shape)
    return unet3d(in_channels=input_shape[0], num_outputs=num_outputs, **dict(options))


def _recurrent(arguments: Arguments, input_shape: Shape, num_outputs: int) -> nn.Module:
    options = RecurrentArguments.model_validate(arguments)
    _require_dimensions("builtin:recurrent", "(C, T)", input_shape)
    return Recurrent(in_channels=input_shape[0], num_outputs=num_outputs, **dict(options))


def _detector(arguments: Arguments, input_shape: Shape, num_outputs: int) -> nn.Module:
    options = DetectorArguments.model_validate(arguments)
    _require_dimensions("builtin:detector", "(C, H, W)", input_shape)
    return Detector(in_channels=input_shape[0], num_outputs=num_outputs, **dict(options))


MODEL_BUILDERS: Mapping[str, Callable[[Arguments, Shape, int], nn.Module]] = MappingProxyType(
    {
        "builtin:detector": _detector,
        "builtin:mlp": _mlp,
        "builtin:recurrent": _recurrent,
        **{f"builtin:{name}": partial(_resnet, name=name) for name in LAYOUTS},
        "builtin:small-cnn": _small_cnn,
        "builtin:small-resnet": _small_resnet,
        "builtin:unet": _unet,
        "builtin:unet3d": _unet3d,
    }
)


def _require_dimensions(factory: str, expected: str, input_shape: Shape) -> None:
    if len(input_shape) != expected.count(",") + 1:
        raise _wrong_shape(factory, expected, input_shape)


def _require_depth(factory: str, depth: int, input_shape: Shape) -> None:
    """Refuse a network whose coarsest level would have nothing left of a sample."""
    smallest = min(input_shape[1:])
    if smallest < 2**depth:
        deepest = smallest.bit_length() - 1
        choice = f"Choose at most {deepest}, or give it " if deepest else "Give it "
        raise BadFactory(
            f"model.args.depth: {factory} halves every size {depth} times; the dataset's samples are {input_shape}. "
            f"{choice}samples of at least {2**depth} along each dimension."
        )


def _wrong_shape(factory: str, expected: str, input_shape: Shape) -> BadFactory:
    return BadFactory(
        f"model.factory: {factory} takes samples of shape {expected}; the dataset's are {input_shape}. Choose another "
        "model, or arguments of the dataset that give it such samples."
    )
