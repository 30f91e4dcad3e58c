"""Exported models. A failure means a file that is offered and computes something else, or a job that fails over it."""

import copy
import importlib.util
import json

import onnxruntime
import pytest
import safetensors.torch
import torch
from torch import nn

from service.domain.spec import parse_spec
from service.training import export as export_module
from service.training.activation_checkpointing import checkpoint_activations
from service.training.checkpoints import Checkpoint, write_checkpoint
from service.training.dropout import DropoutContext, share_dropout
from service.training.export import export, main
from service.training.models import build_model
from service.training.norm import configure_norm
from service.training.optimization.ema import Ema
from syncbn import convert_sync_batchnorm
from tests.unit.training.checkpoint_examples import rank_task

FORMATS = ("state_dict", "pt2", "onnx")
FILES = {"state_dict": ["plain.pt", "plain.safetensors"], "pt2": ["model.pt2"], "onnx": ["model.onnx"]}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            nn.Dropout(0.5),
            nn.Conv2d(8, 4, 3),
        )
        self.norm = nn.BatchNorm2d(4, eps=1e-2)
        self.head = nn.Linear(4, 5)

    def forward(self, images):
        return self.head(self.norm(self.body(images)).mean((2, 3)))


def _trained(model, shape, *, dtype=torch.float32):
    """Give a model running statistics that show when they are not used."""
    torch.manual_seed(0)
    model = convert_sync_batchnorm(model).to(dtype).train()
    with torch.no_grad():
        for _ in range(3):
            model(2 * torch.randn(8, *shape, dtype=dtype) + 1)
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def _outputs(model, batch):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(batch)


@pytest.fixture
def net():
    return _trained(Net(), (3, 9, 9))


BATCHES = [torch.randn(number, 3, 9, 9) for number in (1, 2, 37)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_format_computes_what_the_model_does(tmp_path, dtype):
    net = _trained(Net(), (3, 9, 9), dtype=dtype)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    exported = export(net, FORMATS, torch.randn(4, 3, 9, 9, dtype=dtype), tmp_path / "out")
    assert exported.warnings == ()
    assert list(exported.files) == [name for format_name in FORMATS for name in FILES[format_name]]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(exported.files)

    plain, plain_too = Net().to(dtype).eval(), Net().to(dtype).eval()
    plain.load_state_dict(torch.load(tmp_path / "out" / "plain.pt", weights_only=True))
    plain_too.load_state_dict(safetensors.torch.load_file(tmp_path / "out" / "plain.safetensors"))
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in BATCHES:
        batch = batch.to(dtype)
        expected = _outputs(net, batch)
        assert torch.equal(plain(batch), expected)
        assert torch.equal(plain_too(batch), expected)
        # Two layers, rounded anew: a few times the spacing of numbers of this size.
        torch.testing.assert_close(program(batch), expected, rtol=0, atol=64 * torch.finfo(dtype).eps)
        (found,) = session.run(None, {session.get_inputs()[0].name: batch.float().numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected.float(), rtol=0, atol=1e-5)

    assert net.training
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_batch_norms_are_folded(net, tmp_path):
    export(net, ["pt2"], BATCHES[1], tmp_path)
    operators = str(torch.export.load(tmp_path / "model.pt2").graph)
    assert "conv2d" in operators
    assert "batch_norm" not in operators


@pytest.mark.parametrize("attached", ["dropout", "activation checkpointing", "compile", "average"])
def test_what_training_attaches_stays_out(net, tmp_path, attached):
    expected = _outputs(net, BATCHES[2])
    if attached == "dropout":
        share_dropout(net, DropoutContext(seed=0))
    elif attached == "activation checkpointing":
        checkpoint_activations(net)
    elif attached == "compile":
        net.compile()
    average = Ema(net, decay=0.5)
    if attached == "average":
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(2)
    with average.swapped_in():
        exported = export(net, FORMATS, BATCHES[1], tmp_path)
    assert exported.warnings == ()
    with torch.no_grad():  # so that a layer of the live model would be noticed, were it part of the copy
        for parameter in net.parameters():
            parameter.zero_()
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(BATCHES[2]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("factory", "args", "task", "shape"),
    [
        ("builtin:small-resnet", {"width": 4}, "classification", (1, 8, 8)),
        ("builtin:mlp", {"hidden_sizes": [8]}, "classification", (1, 8, 8)),
        ("builtin:unet", {"depth": 2, "width": 4}, "segmentation", (1, 12, 12)),
        ("builtin:detector", {}, "detection", (1, 32, 32)),
        ("builtin:recurrent", {}, "classification", (4, 6)),
    ],
)
def test_builtin_models_can_be_exported(tmp_path, factory, args, task, shape):
    dataset = {"factory": "builtin:digits" if task == "classification" else f"builtin:digits-{task}"}
    spec = parse_spec(_spec(model={"factory": factory, "args": args}, task=task, dataset=dataset))
    model = build_model(spec.model, input_shape=shape, num_outputs=3, task=task, seed=0)
    exported = export(_trained(model, shape), FORMATS, torch.randn(4, *shape), tmp_path)
    assert exported.warnings == ()
    assert len(exported.files) == 4


class _Branching(Net):
    def forward(self, images):
        return super().forward(images) if images.sum() > 0 else self.head.weight.sum() * images[:, 0, 0, :5]


def test_a_model_that_cannot_be_traced_is_a_warning_that_names_format_and_reason(tmp_path):
    model = _trained(_Branching(), (3, 9, 9))
    exported = export(model, FORMATS, torch.randn(4, 3, 9, 9), tmp_path)
    assert list(exported.files) == FILES["state_dict"]
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES["state_dict"]
    first, second = exported.warnings
    assert first.startswith("The model was not exported as pt2: ")
    assert second.startswith("The model was not exported as onnx: ")
    assert len(first) > 60


class _Fixed(Net):
    def forward(self, images):
        assert len(images) == 4
        return super().forward(images)


@pytest.mark.parametrize("model", [_Branching, _Fixed])
def test_nothing_of_a_format_that_failed_is_left(tmp_path, model):
    exported = export(convert_sync_batchnorm(model()), ["pt2"], torch.randn(4, 3, 9, 9), tmp_path)
    assert exported.files == ()
    assert len(exported.warnings) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_computes_something_else_is_not_offered(net, tmp_path, monkeypatch):
    def wrongly(model):
        folded = copy.deepcopy(model)
        folded.norm.eps = 1e-5  # what an exporter that loses an attribute would do
        return folded

    monkeypatch.setattr(export_module, "fold_batchnorm", wrongly)
    exported = export(net, ["pt2", "onnx"], BATCHES[1], tmp_path)
    assert exported.files == ()
    for warning in exported.warnings:
        assert "differs from the model's by" in warning


def test_a_model_that_cannot_be_copied_is_a_warning(net, tmp_path):
    net.lock = (number for number in ())  # a generator
    exported = export(net, FORMATS, BATCHES[1], tmp_path)
    assert (exported.files, len(exported.warnings)) == ((), 3)


def test_missing_libraries_are_named(net, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else find(name))
    exported = export(net, ["onnx"], BATCHES[1], tmp_path)
    assert exported.files == ()
    assert "onnx, onnxscript, onnxruntime is not installed: pip install 'syncbn[export]'" in exported.warnings[0]


def _spec(**changes):
    return {
        "name": "digits",
        "model": {"factory": "builtin:small-resnet", "args": {"width": 4}},
        "dataset": {"factory": "builtin:digits"},
        "batch": {"size": 16},
        "steps": 3,
    } | changes


@pytest.fixture
def downloaded(tmp_path):
    """A checkpoint, and the JSON of its job."""

    def download(**changes):
        spec = parse_spec(_spec(**changes))
        model = build_model(spec.model, input_shape=(1, 8, 8), num_outputs=10, task="classification", seed=7)
        model = _trained(configure_norm(model, spec.norm), (1, 8, 8))
        average = Ema(model, decay=0.5)
        with torch.no_grad():
            next(iter(model.parameters())).mul_(3)
        state = {"ema": average.state_dict()} if spec.ema else {}
        checkpoint = Checkpoint(step=3, model=model.state_dict(), optimizer={}, state=state)
        directory = write_checkpoint(checkpoint, rank_task(tmp_path / "staging", spec=spec), {})
        document = {"id": "job", "status": "succeeded", "spec": spec.model_dump(mode="json")}
        (tmp_path / "job.json").write_text(json.dumps(document))
        if spec.ema:
            with average.swapped_in():
                return directory, tmp_path / "job.json", _outputs(model, BATCH)
        return directory, tmp_path / "job.json", _outputs(model, BATCH)

    return download


BATCH = torch.randn(5, 1, 8, 8)


@pytest.mark.parametrize("ema", [None, {"decay": 0.5}])
@pytest.mark.parametrize("options", [[], ["--input-shape", "1,8,8", "--num-outputs", "10"]])
def test_a_downloaded_checkpoint_is_exported_from_the_command_line(tmp_path, capsys, downloaded, ema, options):
    directory, job, expected = downloaded(ema=ema, norm={"eps": 1e-3})
    command = [str(directory), "--spec", str(job), "--output", str(tmp_path / "out"), *options]
    assert main([*command, "--format", "pt2"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'model.pt2'}\n"
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    torch.testing.assert_close(program(BATCH), expected, rtol=0, atol=1e-4 * expected.abs().max())


def test_a_damaged_checkpoint_is_not_exported(tmp_path, capsys, downloaded):
    directory, job, _ = downloaded()
    with (directory / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    command = [str(directory), "--spec", str(job), "--output", str(tmp_path / "out"), "--format", "pt2"]
    assert main(command) == 1
    assert "model.safetensors has" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
