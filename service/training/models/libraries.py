"""Models of libraries that are installed beside the service."""

import importlib
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from types import ModuleType
from typing import Any

import torch

from service.training.errors import BadFactory


def build_library_model(
    library: str, name: str, arguments: Mapping[str, Any], *, input_shape: tuple[int, ...], num_outputs: int
) -> object:
    """Return a model of timm or torchvision.

    Args:
        library: ``timm`` or ``torchvision``.
        name: the library's for the model.
        arguments: passed on to the library.
        input_shape: of one sample; the libraries' models take images, (C, H, W).
        num_outputs: width of the output.

    Raises:
        BadFactory: the library is not installed or fails to import, has no such model, refuses the arguments, or has no
            model for such samples.
    """
    factory = f"{library}:{name}"
    if len(input_shape) != 3:
        raise BadFactory(f"model.factory: {factory} takes images, (C, H, W); the dataset's samples are {input_shape}.")
    decided = {"num_classes"} | ({"in_chans"} if library == "timm" else set())
    for argument in sorted(decided & arguments.keys()):
        raise BadFactory(f"model.args.{argument}: the dataset decides it; leave it out.")
    if library == "timm":
        timm = _import(library, factory)
        return _create(
            timm.create_model,
            timm.list_models,
            factory,
            dict(arguments, num_classes=num_outputs, in_chans=input_shape[0]),
        )
    if input_shape[0] != 3:
        raise BadFactory(
            f"model.factory: {factory} takes images of 3 channels; the dataset's have {input_shape[0]}. Take "
            f"a builtin or timm model, which have as many as the dataset, or let the dataset give 3."
        )
    models = _import(library, factory).models
    return _create(models.get_model, models.list_models, factory, dict(arguments, num_classes=num_outputs))


def _import(library: str, factory: str) -> ModuleType:
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise BadFactory(f"model.factory: {factory}: importing {library} needs {error.name}, too.") from error
        raise BadFactory(
            f"model.factory: {factory} needs {library}, which is not installed on this node; "
            f"`pip install 'syncbn[{library}]'` on every node, beside torch {torch.__version__}."
        ) from None
    except Exception as error:  # such as operators that were compiled for another torch
        raise BadFactory(
            f"model.factory: {factory}: importing {library} raised {type(error).__name__}: {error}. Install the "
            f"release that belongs to torch {torch.__version__}."
        ) from error


def _create(
    create: Callable[..., object], list_names: Callable[[], Iterable[str]], factory: str, arguments: dict[str, Any]
) -> object:
    library, _, name = factory.partition(":")
    try:
        return create(name, **arguments)
    except Exception as error:
        names = list(list_names())
        hint = ""
        if name.partition(".")[0] not in names:  # what follows a dot names weights
            near = get_close_matches(name, names, n=3)
            hint = f" {library} has no {name}." + (f" Did you mean {' or '.join(near)}?" if near else "")
        raise BadFactory(f"model.factory: {factory} raised {type(error).__name__}: {error}.{hint}") from error
