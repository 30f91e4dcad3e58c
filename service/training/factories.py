"""Functions that a job names, ``package.module:function``: found and called, with errors that name the job's field."""

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from types import ModuleType
from typing import Any

from service.domain.catalog.arguments import EXTERNAL_FACTORY
from service.training.errors import BadFactory


def import_factory(reference: str, *, field: str) -> Callable[..., Any]:
    """Import what a job names.

    Args:
        reference: ``package.module:function``; after the colon, dots lead into classes.
        field: where the job has it, such as ``model.factory``; errors begin with it.

    Raises:
        BadFactory: it is not such a name; there is no such module or attribute; importing it raised, which is then
            the error's cause; or it cannot be called.
    """
    match = EXTERNAL_FACTORY.match(reference)
    if match is None:
        raise BadFactory(f"{field}: {reference!r} names no function; write it as package.module:function.")
    found: Any = _import_module(match["module"], field=field)
    for name in match["attribute"].split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            where = f"module {found.__name__}" if isinstance(found, ModuleType) else f"{found!r}"
            public = (attribute for attribute in dir(found) if not attribute.startswith("_"))
            raise BadFactory(f"{field}: {where} has no {name!r}.{_did_you_mean(name, public)}") from None
    if not callable(found):
        raise BadFactory(f"{field}: {reference} is of type {type(found).__name__}; name a function or a class.")
    function: Callable[..., Any] = found
    return function


def call_factory(
    reference: str, arguments: Mapping[str, Any], *, field: str, offers: Mapping[str, Any] | None = None
) -> object:
    """Import what a job names and call it with the job's arguments.

    Args:
        reference: ``package.module:function``.
        arguments: what the job gives it, by name.
        field: where the job has the reference: ``model.factory`` says that the arguments are ``model.args``.
        offers: passed by name as well, where its signature has a parameter of that name, or ``**kwargs``, and the job
            does not give that argument itself.

    Raises:
        BadFactory: it cannot be imported, the arguments do not fit its signature, or it raised; what it raised is then
            the error's cause.
    """
    function = import_factory(reference, field=field)
    try:
        signature: inspect.Signature | None = inspect.signature(function)
    except ValueError:  # some functions written in C do not tell it
        signature = None
    call = dict(arguments)
    if signature is not None:
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
        by_name = {
            parameter.name
            for parameter in signature.parameters.values()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        }
        call = {name: value for name, value in (offers or {}).items() if takes_all or name in by_name} | call
        try:
            signature.bind(**call)
        except TypeError as error:
            near = _did_you_mean_argument(call, by_name) if not takes_all else ""
            raise BadFactory(
                f"{field.removesuffix('factory')}args: they do not fit {reference}{signature}: {error}.{near}"
            ) from None
    try:
        result: object = function(**call)
    except (Exception, SystemExit) as error:
        raise BadFactory(f"{field}: {reference} raised {_describe(error)}") from error
    return result


def _import_module(name: str, *, field: str) -> ModuleType:
    # The code may have been unpacked after a directory of sys.path was last listed.
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(f"{missing}."):
            raise BadFactory(
                f"{field}: there is no module {missing!r}.{_did_you_mean_module(missing)} "
                "Is it in the job's code (syncbn submit --code DIRECTORY), or installed on every node?"
            ) from None
        raise BadFactory(
            f"{field}: module {name} imports {missing!r}, which is not there; add it to the job's code or to its "
            "requirements."
        ) from error
    except (Exception, SystemExit) as error:  # a script that is no module may exit as it is imported
        raise BadFactory(f"{field}: importing module {name} raised {_describe(error)}") from error


def _did_you_mean_module(name: str) -> str:
    """Suggest modules that lie where this one was looked for."""
    parent, _, last = name.rpartition(".")
    # The import of a submodule has imported its parent.
    path = getattr(sys.modules.get(parent), "__path__", ()) if parent else None
    found = [module.name for module in pkgutil.iter_modules(path) if not module.name.startswith("_")]
    near = get_close_matches(last, found, n=3)  # compared without the parent, which would make all look alike
    return _suggest(f"{parent}.{module}" if parent else module for module in near)


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    return _suggest(get_close_matches(name, sorted(set(known)), n=3))


def _did_you_mean_argument(given: Iterable[str], known: Iterable[str]) -> str:
    known = set(known)
    return "".join(_did_you_mean(name, known) for name in given if name not in known)


def _suggest(names: Iterable[str]) -> str:
    choice = " or ".join(names)
    return f" Did you mean {choice}?" if choice else ""


def _describe(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
