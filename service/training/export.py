"""Files of a trained model for other programs, each compared with the model before it is handed over.

From a checkpoint that was downloaded:

    python -m service.training.export CHECKPOINT_DIR --spec spec.json --format onnx --output DIR
"""

import argparse
import copy
import importlib.util
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import safetensors.torch
import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils import _pytree as pytree

from service.domain.errors import ServiceError
from service.domain.spec import JobSpec, parse_spec
from service.storage.manifest import verify_directory
from service.training.checkpoints import Checkpoint, read_checkpoint
from service.training.data import build_dataset
from service.training.data.source import Dataset, Sample, Stream
from service.training.errors import BadSample, TrainingError
from service.training.models import build_model
from service.training.norm import configure_norm
from service.training.precision import parameter_dtype
from service.training.tasks import build_task
from syncbn import ConversionError, fold_batchnorm, revert_sync_batchnorm

ExportFormat = Literal["state_dict", "pt2", "onnx"]

# How far an output may be from the model's own, relative to the largest value of that output. Folding a batch norm and
# another program's kernels round each layer anew: ResNet-50 comes to 1e-6 in float32. A wrong epsilon, layout or
# constant shows at 1e-3.
_TOLERANCE: Mapping[torch.dtype, float] = MappingProxyType({torch.float64: 1e-10, torch.float32: 1e-4})
# A protocol buffer holds 2 GiB; weights beyond that lie in a file beside it.
_MAX_INLINE_BYTES = 1_900_000_000

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What came of an export.

    Attributes:
        files: names of the files in the directory; the outputs of each were those of the model.
        warnings: for each format that was not made, why.
    """

    files: tuple[str, ...]
    warnings: tuple[str, ...]


def export(model: nn.Module, formats: Sequence[ExportFormat], example_input: torch.Tensor, directory: Path) -> Exported:
    """Write a model in formats that other programs read, for inference on any number of samples.

    - ``state_dict``: ``plain.safetensors`` and ``plain.pt``, weights and buffers for the model with ``torch.nn`` batch
      norms; the second one loads with ``weights_only=True``.
    - ``pt2``: ``model.pt2``, batch norms folded into the layers before them where ``torch.fx`` finds them; read it with
      ``torch.export.load``.
    - ``onnx``: ``model.onnx``, of the same model; a float64 one in float32, since runtimes have no such convolutions.

    Each is read back and compared with the model in evaluation mode, on one sample and on more than were exported. A
    format that cannot be made, or whose outputs differ, leaves no file.

    Args:
        model: as trained, with synchronized or plain norms, on any device; it is not changed.
        formats: which.
        example_input: ``(N, *)``, what ``model`` takes, with its dtype and device.
        directory: gets the files; it is made if it is not there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    files: list[str] = []
    problems: list[str] = []
    subject: _Subject | None = None
    for name in formats:
        # In a directory of its own, so that half a file of a format that failed goes with it.
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=directory) as unfinished:
            try:
                with _quietly():
                    subject = subject or _Subject.of(model, example_input)
                    _WRITERS[name](subject, Path(unfinished))
            except Exception as error:  # whatever the model's own code does when it is traced
                _log.warning("the model could not be exported as %s", name, exc_info=error)
                problems.append(f"The model was not exported as {name}: {type(error).__name__}: {_brief(error)}")
                continue
            for path in sorted(Path(unfinished).iterdir()):
                path.rename(directory / path.name)
                files.append(path.name)
    return Exported(files=tuple(files), warnings=tuple(problems))


class ExportError(Exception):
    """A format cannot be made here, or what was made is not the model."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Subject:
    """What is exported, on the CPU and in evaluation mode, and what it has to give.

    Attributes:
        plain: with ``torch.nn`` batch norms.
        batches: inputs to compare with: one sample, the example, more than that.
        outputs: of the model as trained, for each of them; a tensor or a structure of tensors.
    """

    plain: nn.Module
    batches: tuple[torch.Tensor, ...]
    outputs: tuple[Any, ...]

    @classmethod
    def of(cls, model: nn.Module, example_input: torch.Tensor) -> "_Subject":
        trained = _copy(model)
        batches = _batches(example_input.detach().cpu())
        with torch.no_grad():
            outputs = tuple(trained(batch) for batch in batches)
        return cls(plain=revert_sync_batchnorm(copy.deepcopy(trained)), batches=batches, outputs=outputs)

    @property
    def example(self) -> torch.Tensor:
        return self.batches[1]

    def folded(self) -> nn.Module:
        try:
            return fold_batchnorm(self.plain)
        except ConversionError as error:
            _log.info("batch norms stay layers of their own: %s", error)
            return self.plain

    def compare(self, run: Callable[[torch.Tensor], Any]) -> None:
        """Compare a model that was read back.

        Raises:
            ExportError: it gives something else.
        """
        for batch, expected in zip(self.batches, self.outputs, strict=True):
            with torch.no_grad():
                found = pytree.tree_leaves(run(batch))
            leaves = pytree.tree_leaves(expected)
            if len(found) != len(leaves):
                raise ExportError(f"it has {len(found)} outputs where the model has {len(leaves)}")
            for number, (one, other) in enumerate(zip(found, leaves, strict=True)):
                _compare(one, other, f"output {number} for {len(batch)} sample(s)")


def _copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model for inference on the CPU, without what training attached to it."""
    memo: dict[int, Any] = {
        id(compiled): None
        for module in model.modules()
        if (compiled := module.__dict__.get("_compiled_call_impl")) is not None
    }
    clone = copy.deepcopy(model, memo).cpu().eval()
    for module in clone.modules():
        forward = vars(module).get("forward")
        # Its wrapper calls the layers of the model that was copied.
        if getattr(forward, "__module__", "") == "service.training.activation_checkpointing":
            del module.forward
        for name, child in module.named_children():
            if isinstance(child, _DropoutNd):
                setattr(module, name, nn.Identity())
    return clone.requires_grad_(requires_grad=False)


def _batches(example: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return one sample, at least two of the example, and more than that; random ones where samples are numbers."""
    example = example if len(example) > 1 else torch.cat([example, example])
    example = example[:8]  # enough to compare, and cheap
    more = torch.cat([example, example.flip(0)])[: len(example) + 3]
    if example.is_floating_point():
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(more.shape, generator=generator, dtype=more.dtype)
        more = noise * example.std() + example.mean()
    return example[:1], example, more


def _write_state_dict(subject: _Subject, directory: Path) -> None:
    state = {name: value.clone().contiguous() for name, value in subject.plain.state_dict().items()}
    safetensors.torch.save_file(state, directory / "plain.safetensors")
    torch.save(state, directory / "plain.pt")
    for read in (
        safetensors.torch.load_file(directory / "plain.safetensors"),
        torch.load(directory / "plain.pt", weights_only=True),
    ):
        blank = copy.deepcopy(subject.plain)
        for tensor in (*blank.parameters(), *blank.buffers()):
            tensor.zero_()  # so that a value that was left out would show
        blank.load_state_dict(read)
        subject.compare(blank)


def _write_pt2(subject: _Subject, directory: Path) -> None:
    path = directory / "model.pt2"
    program = torch.export.export(subject.folded(), (subject.example,), dynamic_shapes=({0: _any_batch()},))
    torch.export.save(program, path)
    subject.compare(torch.export.load(path).module())


def _write_onnx(subject: _Subject, directory: Path) -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"{', '.join(missing)} is not installed: pip install 'syncbn[export]' where the ranks run")
    import onnxruntime  # noqa: PLC0415 - of an extra, and slow

    path = directory / "model.onnx"
    folded, example = subject.folded(), subject.example
    if example.dtype == torch.float64:
        folded, example = copy.deepcopy(folded).float(), example.float()
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in folded.state_dict().values())
    torch.onnx.export(
        folded,
        (example,),
        path,
        dynamo=True,
        dynamic_shapes=({0: _any_batch()},),
        external_data=size_bytes > _MAX_INLINE_BYTES,
        verbose=False,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(batch: torch.Tensor) -> list[torch.Tensor]:
        outputs = session.run(None, {name: batch.to(example.dtype).numpy()})
        return [torch.from_numpy(output) for output in outputs]

    subject.compare(run)


_WRITERS: Mapping[str, Callable[[_Subject, Path], None]] = MappingProxyType(
    {"state_dict": _write_state_dict, "pt2": _write_pt2, "onnx": _write_onnx}
)


def _any_batch() -> Any:  # noqa: ANN401 - torch gives it no public type
    return torch.export.Dim("batch", min=1)


def _compare(found: torch.Tensor, expected: torch.Tensor, where: str) -> None:
    if found.shape != expected.shape:
        raise ExportError(f"{where} has shape {tuple(found.shape)}, the model's {tuple(expected.shape)}")
    if not expected.is_floating_point():
        if not torch.equal(found, expected.to(found.dtype)):
            raise ExportError(f"{where} differs from the model's")
        return
    # The coarser of the two: a float64 model is exported to ONNX in float32.
    tolerance = max(_TOLERANCE.get(tensor.dtype, 2e-2) for tensor in (found, expected))
    scale = float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max()) if expected.numel() else 0.0
    found, expected = found.double(), expected.double()
    if not torch.allclose(found, expected, rtol=0.0, atol=tolerance * scale, equal_nan=True):
        difference = float((found - expected).abs().max())
        raise ExportError(f"{where} differs from the model's by {difference:.3g}, of {scale:.3g} at most")


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep what exporters tell their own developers out of the job's log."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _brief(error: Exception) -> str:
    """Return the first paragraph of an error's text; a failed trace comes with pages."""
    return str(error).strip().split("\n\n")[0][:1000] or "no reason was given"


def main(arguments: Sequence[str] | None = None) -> int:
    """Export a checkpoint from the command line.

    Returns:
        The exit status: 0 when every format was made.
    """
    parser = argparse.ArgumentParser(prog="python -m service.training.export", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="directory of a downloaded checkpoint")
    parser.add_argument("--spec", type=Path, required=True, help="JSON of the job, or of its specification")
    parser.add_argument("--format", dest="formats", action="append", choices=sorted(_WRITERS), required=True)
    parser.add_argument("--output", type=Path, required=True, help="directory for the files")
    parser.add_argument("--input-shape", help="of one sample, such as 3,224,224; then the dataset is not opened")
    parser.add_argument("--num-outputs", type=int, help="classes, or values to predict; with --input-shape")
    options = parser.parse_args(arguments)
    if (options.input_shape is None) != (options.num_outputs is None):
        parser.error("--input-shape and --num-outputs go together")
    try:
        spec = _read_spec(options.spec)
        manifest = verify_directory(options.checkpoint)
        checkpoint = read_checkpoint(options.checkpoint, job_id=manifest.job_id)
        if options.input_shape is None:
            dataset = build_dataset(spec.dataset, seed=spec.seed)
            example, num_outputs = _sample(dataset)[None], dataset.num_outputs
        else:
            shape = tuple(int(size) for size in options.input_shape.split(","))
            example, num_outputs = torch.randn(1, *shape), options.num_outputs
        example = example.to(parameter_dtype(spec.precision))
        model = _trained_model(spec, checkpoint, tuple(example.shape[1:]), num_outputs)
    except (ServiceError, TrainingError, OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    exported = export(model, options.formats, example, options.output)
    for name in exported.files:
        sys.stdout.write(f"{options.output / name}\n")
    for warning in exported.warnings:
        sys.stderr.write(f"{warning}\n")
    return 1 if exported.warnings else 0


def _read_spec(path: Path) -> JobSpec:
    document = json.loads(path.read_text())
    return parse_spec(document["spec"] if isinstance(document, dict) and "spec" in document else document)


def _sample(dataset: Dataset) -> torch.Tensor:
    """Return the input of one sample, (C, *)."""
    for source in (dataset.held_out, dataset.training):
        if isinstance(source, Stream):
            first = next(source.read(0))
            return (first if isinstance(first, Sample) else first()).input
        if len(source):
            return source.sample(0).input
    raise BadSample("dataset: it has no sample; say --input-shape and --num-outputs instead")


def _trained_model(spec: JobSpec, checkpoint: Checkpoint, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Build a job's model with a checkpoint's weights; their average, where the job kept one."""
    model = build_model(
        spec.model, input_shape=input_shape, num_outputs=num_outputs, task=build_task(spec.task).name, seed=spec.seed
    )
    model = configure_norm(model, spec.norm).to(parameter_dtype(spec.precision))
    average = checkpoint.state["ema"]["average"] if spec.ema is not None else {}
    model.load_state_dict({**checkpoint.model, **average})
    return model


if __name__ == "__main__":
    sys.exit(main())
