"""Models of the job's own code and of libraries: a failure means that one is built wrongly, or refused without reason.

The libraries are stood in for: they are not installed where the service is tested, since they would bring a torch of
their own. The signatures are those of timm 1.0 and torchvision 0.24.
"""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from service.domain.spec import ModelSpec
from service.training.errors import BadFactory
from service.training.models import build_model


def build(factory, args=None, *, input_shape=(3, 8, 8), task="classification", seed=0):
    spec = ModelSpec(factory=factory, args=args or {})
    return build_model(spec, input_shape=input_shape, num_outputs=10, task=task, seed=seed)


@pytest.fixture
def their_code(monkeypatch):
    """Return a module that a job may name."""
    module = ModuleType("their_code")
    monkeypatch.setitem(sys.modules, "their_code", module)
    return module


class Network(nn.Module):
    def __init__(self, width, input_shape, num_outputs, seed):
        super().__init__()
        self.facts = (width, input_shape, num_outputs, seed)
        self.linear = nn.Linear(2, 2)


def test_a_function_of_the_job_is_told_about_the_data(their_code):
    their_code.Network = Network
    assert build("their_code:Network", {"width": 4}, seed=5).facts == (4, (3, 8, 8), 10, 5)


def test_a_function_of_the_job_draws_the_same_weights_on_every_rank(their_code):
    their_code.build = lambda: nn.Linear(3, 3)
    torch.manual_seed(1)
    first = build("their_code:build").weight
    torch.manual_seed(2)
    assert torch.equal(build("their_code:build").weight, first)
    assert not torch.equal(build("their_code:build", seed=1).weight, first)


@pytest.mark.parametrize("task", ["classification", "segmentation", "detection", "custom"])
def test_a_function_of_the_job_may_build_for_any_task(their_code, task):
    their_code.build = lambda: nn.Linear(3, 3)
    build("their_code:build", task=task)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (None, r"returned builtins\.NoneType; it must return a torch\.nn\.Module"),
        (nn.Linear, r"returned builtins\.type; it must return a torch\.nn\.Module"),
        (nn.LazyLinear(3), r"weight of their_code:build is lazy.*input_shape"),
        (nn.Sequential(nn.LazyBatchNorm1d(affine=False)), r"0\.running_mean of their_code:build is lazy"),
        (nn.ReLU(), "without a parameter to train"),
        (nn.Linear(2, 2).requires_grad_(False), "without a parameter to train"),
    ],
)
# torch calls its lazy layers experimental, with a warning.
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_what_is_no_model_to_train_is_refused(their_code, result, words):
    their_code.build = lambda: result
    with pytest.raises(BadFactory, match=rf"^model\.factory: .*{words}"):
        build("their_code:build")


def test_a_function_of_the_job_that_fails_is_not_the_services_fault(their_code):
    their_code.build = lambda: nn.Linear(-1, 3)
    with pytest.raises(BadFactory, match=r"^model\.factory: their_code:build raised RuntimeError") as caught:
        build("their_code:build")
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.fixture
def timm(monkeypatch):
    library = ModuleType("timm")

    def create_model(model_name, pretrained=False, **kwargs):
        if model_name.partition(".")[0] != "resnet18":
            raise RuntimeError(f"Unknown model ({model_name})")
        if kwargs.pop("drop_rate", 0.0) > 1:
            raise ValueError("dropout probability has to be between 0 and 1")
        model = nn.Conv2d(kwargs.pop("in_chans"), kwargs.pop("num_classes"), 1)
        model.facts = (model_name, pretrained, kwargs)
        return model

    library.create_model = create_model
    library.list_models = lambda: ["resnet18", "resnet34", "vgg11"]
    monkeypatch.setitem(sys.modules, "timm", library)


@pytest.fixture
def torchvision(monkeypatch):
    library, models = ModuleType("torchvision"), ModuleType("torchvision.models")

    def get_model(name, **config):
        if name != "resnet18":
            raise ValueError(f"Unknown model {name}")
        model = nn.Linear(3, config.pop("num_classes"))
        model.facts = (name, config)
        return model

    models.get_model = get_model
    models.list_models = lambda: ["resnet18", "resnet34"]
    library.models = models
    monkeypatch.setitem(sys.modules, "torchvision", library)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)


@pytest.mark.usefixtures("timm")
def test_timm_builds_for_the_channels_and_classes_of_the_data():
    model = build("timm:resnet18.a1_in1k", {"pretrained": True, "global_pool": "max"}, input_shape=(5, 8, 8))
    assert model.facts == ("resnet18.a1_in1k", True, {"global_pool": "max"})
    assert (model.in_channels, model.out_channels) == (5, 10)


@pytest.mark.usefixtures("torchvision")
def test_torchvision_builds_for_the_classes_of_the_data():
    model = build("torchvision:resnet18", {"weights": None})
    assert model.facts == ("resnet18", {"weights": None})
    assert model.out_features == 10


@pytest.mark.usefixtures("timm", "torchvision")
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_library_draws_the_same_weights_on_every_rank(library):
    first, second, other = (build(f"{library}:resnet18", seed=seed).weight for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.usefixtures("torchvision")
def test_torchvision_takes_no_other_channels_than_three():
    with pytest.raises(
        BadFactory, match=r"^model\.factory: torchvision:resnet18 takes images of 3 channels; .* have 1\."
    ):
        build("torchvision:resnet18", input_shape=(1, 8, 8))


@pytest.mark.usefixtures("timm", "torchvision")
@pytest.mark.parametrize(
    ("factory", "args", "options", "words"),
    [
        ("timm:resnet18", {"num_classes": 3}, {}, r"model\.args\.num_classes: the dataset decides it"),
        ("timm:resnet18", {"in_chans": 3}, {}, r"model\.args\.in_chans: the dataset decides it"),
        ("torchvision:resnet18", {"num_classes": 3}, {}, r"model\.args\.num_classes: the dataset decides it"),
        ("timm:resnet18", {"drop_rate": 2}, {}, r"raised ValueError: dropout probability .* 1\.$"),
        ("timm:resnet81", {}, {}, r"timm has no resnet81\. Did you mean resnet18"),
        ("torchvision:resnet81", {}, {}, r"torchvision has no resnet81\. Did you mean resnet18"),
        ("torchvision:xyz", {}, {}, r"torchvision has no xyz\.$"),
        ("timm:resnet18", {}, {"input_shape": (3, 8)}, r"takes images, \(C, H, W\); .* \(3, 8\)"),
        (
            "timm:resnet18",
            {},
            {"task": "segmentation"},
            r"does not fit the task segmentation.*package\.module:function",
        ),
        ("torchvision:resnet18", {}, {"task": "detection"}, "does not fit the task detection"),
    ],
)
def test_what_a_library_cannot_build_is_refused_with_the_reason(factory, args, options, words):
    with pytest.raises(BadFactory, match=rf"^model\.(factory|args).*{words}" if "args" not in words else words):
        build(factory, args, **options)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_library_that_is_not_installed_is_named_with_the_command(monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(BadFactory) as caught:
        build(f"{library}:resnet18")
    message = str(caught.value)
    assert message.startswith(f"model.factory: {library}:resnet18 needs {library}, which is not installed")
    assert f"pip install 'syncbn[{library}]'" in message
    assert torch.__version__ in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "raise RuntimeError('operator torchvision::nms does not exist')",
            "raised RuntimeError: operator .* Install the",
        ),
        ("import a_package_that_nobody_has", "needs a_package_that_nobody_has"),
    ],
)
def test_a_library_that_fails_to_import_says_why(monkeypatch, tmp_path, text, words):
    (tmp_path / "timm.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(BadFactory, match=words) as caught:
        build("timm:resnet18")
    assert isinstance(caught.value.__cause__, (RuntimeError, ModuleNotFoundError))
