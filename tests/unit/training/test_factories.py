"""Functions that a job names. A failure means that a user's mistake is not told apart, or not told where it is."""

import os
import pickle
import sys
from textwrap import dedent

import pytest

from service.domain.catalog import EXTERNAL_FACTORY, EXTERNAL_LIBRARY
from service.training.errors import BadFactory
from service.training.factories import call_factory, import_factory

FIELD = "model.factory"

CODE = {
    "their_code/__init__.py": "",
    "their_code/networks.py": """
        WIDTH = 3

        def build(width, *, depth=1):
            return ("built", width, depth)

        def build_with_offers(width, *, seed, input_shape=None):
            return (width, seed, input_shape)

        def build_with_all(**everything):
            return everything

        def build_badly():
            raise ValueError("no such depth")

        def leave():
            raise SystemExit(2)

        class Network:
            def __init__(self, width=1):
                self.width = width

            @classmethod
            def small(cls):
                return cls(width=2)
    """,
    "their_code/broken.py": "1 / 0",
    "their_code/mistyped.py": "def build(:",
    "their_code/incomplete.py": "import a_package_that_nobody_has",
    "their_code/script.py": "import sys; sys.exit('usage: script FILE')",
    "a_module_of_their_own.py": "def build(): return 'top'",
}


@pytest.fixture(autouse=True)
def code_dir(tmp_path, monkeypatch):
    for name, text in CODE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for module in [name for name in sys.modules if name.partition(".")[0] in ("their_code", "a_module_of_their_own")]:
        del sys.modules[module]


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("package.module:function", EXTERNAL_FACTORY),
        ("module:Class.method", EXTERNAL_FACTORY),
        ("timm_like.models:_build2", EXTERNAL_FACTORY),
        ("timm:vit_base_patch16_224.augreg-in21k", EXTERNAL_LIBRARY),
        ("torchvision:resnet18", EXTERNAL_LIBRARY),
        ("builtin:mlp", None),
        ("builtin:small-resnet", None),
        ("timm:", None),
        ("timm:../weights", None),
        ("other:small-net", None),
        ("package..module:function", None),
        ("package.module:function()", None),
        ("package.module:1st", None),
        ("package.module:function\n", None),
        ("package.module", None),
    ],
)
def test_the_form_of_a_name_says_where_it_leads(name, pattern):
    assert [found for found in (EXTERNAL_FACTORY, EXTERNAL_LIBRARY) if found.match(name)] == [pattern] * bool(pattern)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [("their_code.networks:build", ("built", 4, 1)), ("their_code.networks:build_with_all", {"width": 4})],
)
def test_a_function_is_found_and_called_with_the_arguments(reference, expected):
    assert import_factory(reference, field=FIELD)(width=4) == expected
    assert call_factory(reference, {"width": 4}, field=FIELD) == expected


def test_a_module_without_a_package_and_a_class_and_its_method_are_found():
    assert call_factory("a_module_of_their_own:build", {}, field=FIELD) == "top"
    assert call_factory("their_code.networks:Network", {"width": 5}, field=FIELD).width == 5
    assert call_factory("their_code.networks:Network.small", {}, field=FIELD).width == 2


def test_code_that_arrives_after_the_path_was_listed_is_found(code_dir):
    with pytest.raises(BadFactory):
        import_factory("their_code.late:build", field=FIELD)
    package = code_dir / "their_code"
    listed = package.stat()
    (package / "late.py").write_text("def build(): return 'late'")
    # Python lists a directory again when its time has changed, which clocks are too coarse to promise.
    os.utime(package, ns=(listed.st_atime_ns, listed.st_mtime_ns))
    assert call_factory("their_code.late:build", {}, field=FIELD) == "late"


OFFERS = {"input_shape": (1, 8, 8), "num_outputs": 10, "seed": 3}


def test_offers_go_where_the_signature_has_a_place_for_them():
    call = "their_code.networks:{}".format
    assert call_factory(call("build"), {"width": 1}, field=FIELD, offers=OFFERS) == ("built", 1, 1)
    assert call_factory(call("build_with_offers"), {"width": 1}, field=FIELD, offers=OFFERS) == (1, 3, (1, 8, 8))
    assert call_factory(call("build_with_all"), {"width": 1}, field=FIELD, offers=OFFERS) == {"width": 1, **OFFERS}


def test_what_the_job_says_goes_before_what_is_offered():
    arguments = {"width": 1, "seed": 99}
    reference = "their_code.networks:build_with_offers"
    assert call_factory(reference, arguments, field=FIELD, offers=OFFERS) == (1, 99, (1, 8, 8))


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("builtin:mlp", ["names no function", "package.module:function"]),
        ("their_code.networks", ["names no function"]),
        ("their code:build", ["names no function"]),
        ("nobodys_code:build", ["there is no module 'nobodys_code'", "job's code"]),
        ("their_cod.networks:build", ["there is no module 'their_cod'", "Did you mean their_code"]),
        ("their_code.network:build", ["there is no module 'their_code.network'", "Did you mean their_code.networks?"]),
        ("their_code.networks.deeper:build", ["there is no module 'their_code.networks.deeper'"]),
        ("their_code.networks:biuld", ["module their_code.networks has no 'biuld'", "Did you mean build"]),
        ("their_code.networks:Network.smal", ["has no 'smal'", "Did you mean small?"]),
        ("their_code.networks:WIDTH", ["is of type int", "name a function or a class"]),
    ],
)
def test_a_name_that_leads_nowhere_is_refused_with_the_field_and_what_is_near(reference, words):
    with pytest.raises(BadFactory) as caught:
        import_factory(reference, field=FIELD)
    message = str(caught.value)
    assert message.startswith("model.factory: ")
    assert [word for word in words if word not in message] == []
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


@pytest.mark.parametrize(
    ("module", "cause", "words"),
    [
        ("broken", ZeroDivisionError, "raised ZeroDivisionError: division by zero"),
        ("mistyped", SyntaxError, "raised SyntaxError"),
        ("incomplete", ModuleNotFoundError, "imports 'a_package_that_nobody_has', which is not there"),
        ("script", SystemExit, "raised SystemExit: usage: script FILE"),
    ],
)
def test_a_module_that_fails_to_import_says_why_and_keeps_the_traceback(module, cause, words):
    with pytest.raises(BadFactory, match=words) as caught:
        import_factory(f"their_code.{module}:build", field=FIELD)
    assert f"model.factory: {'importing ' if 'raised' in words else ''}module their_code.{module}" in str(caught.value)
    assert isinstance(caught.value.__cause__, cause)
    assert caught.value.__cause__.__traceback__ is not None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "missing a required argument: 'width'."),
        ({"width": 1, "dept": 2}, "got an unexpected keyword argument 'dept'. Did you mean depth?"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_the_call(arguments, words):
    with pytest.raises(BadFactory) as caught:
        call_factory("their_code.networks:build", arguments, field=FIELD)
    assert str(caught.value) == (f"model.args: they do not fit their_code.networks:build(width, *, depth=1): {words}")


@pytest.mark.parametrize(
    ("function", "cause", "words"),
    [("build_badly", ValueError, "ValueError: no such depth"), ("leave", SystemExit, "SystemExit: 2")],
)
def test_what_a_function_raises_is_the_cause(function, cause, words):
    with pytest.raises(BadFactory, match=rf"^task\.factory: their_code\.networks:{function} raised {words}") as caught:
        call_factory(f"their_code.networks:{function}", {}, field="task.factory")
    assert isinstance(caught.value.__cause__, cause)
    assert caught.value.__cause__.__traceback__.tb_next.tb_frame.f_code.co_name == function
