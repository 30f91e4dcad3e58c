"""Samples in tar files: members whose names differ in the extension alone belong to one sample."""

import hashlib
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from service.domain.catalog.datasets import WebDatasetArguments
from service.training.data.context import DataContext
from service.training.data.files import exclusive, local_file, prepare_cache
from service.training.data.images import ImageDecoder, Placement
from service.training.data.labels import check_label
from service.training.data.source import Dataset, Sample, Source
from service.training.data.splits import split_rows
from service.training.errors import BadSample, DatasetError

_NUM_CLASSES = "dataset.args.num_classes"


def build_webdataset(arguments: Mapping[str, object], context: DataContext) -> Dataset:
    """Index the shards, so that any sample can be read by itself; it is decoded when it is needed.

    Inputs are images, (C, H, W), float32, or arrays as they were stored; targets as ``target_kind`` says.
    """
    options = WebDatasetArguments.model_validate(dict(arguments))
    decoder = _Decoder(options=options, images=ImageDecoder.of(options), num_classes=options.num_classes)
    training = _index(options.shards, options, context, field="dataset.args.shards")
    if options.held_out_shards is None:
        rows = split_rows(len(training), test_fraction=options.test_fraction, seed=options.split_seed)
        training, held_out = ([training[row] for row in chosen] for chosen in rows)
    else:
        held_out = _index(options.held_out_shards, options, context, field="dataset.args.held_out_shards")
    num_outputs = decoder.num_outputs([*training, *held_out])
    decoder = _Decoder(options=options, images=decoder.images, num_classes=num_outputs)
    return Dataset(
        training=WebDatasetSource(training, decoder),
        held_out=WebDatasetSource(held_out, decoder),
        num_outputs=num_outputs,
    )


class WebDatasetSource(Source):
    """Samples that are read from their places in tar files.

    Args:
        entries: of N samples.
        decoder: of their members.
    """

    reads_ahead = True

    def __init__(self, entries: Sequence["_Entry"], decoder: "_Decoder") -> None:
        self._entries = entries
        self._decoder = decoder

    def __len__(self) -> int:
        return len(self._entries)

    def sample(self, index: int) -> Sample:
        """Read and decode one. Raises ``BadSample``, with the member's name."""
        return self._decoder.decode(self._entries[index])


@dataclass(frozen=True, kw_only=True, slots=True)  # there may be millions
class _Member:
    """Where a file lies in a shard."""

    shard: Path
    name: str
    extension: str
    offset: int
    size_bytes: int

    def __str__(self) -> str:
        return f"{self.name} of {self.shard.name}"

    def read(self) -> bytes:
        try:
            with self.shard.open("rb") as file:
                data = os.pread(file.fileno(), self.size_bytes, self.offset)
        except OSError as error:
            raise BadSample(f"dataset: {self} cannot be read: {error.strerror or error}.") from None
        if len(data) < self.size_bytes:
            raise BadSample(f"dataset: {self} is cut off: the shard ends too early. Copy it again.")
        return data


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """The members of one sample."""

    input: _Member
    target: _Member


@dataclass(frozen=True, kw_only=True, eq=False)
class _Decoder:
    options: WebDatasetArguments
    images: ImageDecoder
    num_classes: int | None

    def decode(self, entry: _Entry) -> Sample:
        """Raise ``BadSample`` where a member is not what it should be."""
        placement = None
        if entry.input.extension.endswith("npy"):
            image = torch.from_numpy(_array(entry.input))
        else:
            image, placement = self.images.decode(entry.input.read(), name=str(entry.input))
        return Sample(image, self._target(entry.target, placement))

    def num_outputs(self, entries: Sequence[_Entry]) -> int:
        """Return ``num_classes``, or what the targets tell."""
        if self.num_classes is not None:
            return self.num_classes
        kind = self.options.target_kind
        if kind == "value":
            return int(self._values(entries[0].target).numel())
        if kind == "mask":
            raise DatasetError(f"{_NUM_CLASSES}: give it, since masks may hold numbers that stand for no class.")
        highest = 1
        for entry in entries:
            if kind == "class":
                highest = max(highest, self._label(entry.target))
            else:
                highest = max(highest, *self._boxes(entry.target, None)["labels"].tolist(), 0)
        return highest + 1

    def _target(self, member: _Member, placement: Placement | None) -> Any:  # noqa: ANN401 - see Sample.target
        kind = self.options.target_kind
        if kind == "value":
            return self._values(member)
        if kind == "boxes":
            return self._boxes(member, placement)
        if kind == "mask":
            if member.extension.endswith("npy"):
                return torch.from_numpy(_array(member).astype(np.int64))
            return self.images.decode_mask(member.read(), name=str(member))
        label = self._label(member)
        if self.num_classes is not None:
            check_label(label, self.num_classes, name=str(member), field=_NUM_CLASSES)
        return torch.tensor(label)

    def _label(self, member: _Member) -> int:
        value = self._json(member)
        if not isinstance(value, int) or isinstance(value, bool):
            raise BadSample(f"dataset: {member} holds {value!r:.80}; a label is a whole number.")
        return value

    def _values(self, member: _Member) -> torch.Tensor:
        values = _array(member) if member.extension.endswith("npy") else self._json(member)
        try:
            return torch.from_numpy(np.atleast_1d(np.asarray(values, np.float32)))
        except (TypeError, ValueError):
            raise BadSample(f"dataset: {member} holds {values!r:.80}; numbers are needed.") from None

    def _boxes(self, member: _Member, placement: Placement | None) -> dict[str, torch.Tensor]:
        value = self._json(member)
        try:
            boxes = np.asarray(value["boxes"], np.float64).reshape(-1, 4)
            labels = np.asarray(value["labels"], np.int64).reshape(-1)
        except (TypeError, ValueError, KeyError, OverflowError):
            boxes, labels = np.zeros((1, 4)), np.zeros(0, np.int64)
        if len(boxes) != len(labels):
            raise BadSample(
                f'dataset: {member} is not of the form {{"boxes": [[x1, y1, x2, y2], …], "labels": [1, …]}}, with as '
                "many labels as boxes."
            )
        if self.num_classes is not None:
            for label in labels.tolist():
                check_label(label, self.num_classes, name=str(member), field=_NUM_CLASSES)
        if placement is not None:
            height, width = self.images.size
            boxes = boxes * (placement.scale * 2) - np.array(placement.offset * 2)
            boxes = boxes.clip(0, [width, height, width, height])
            kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
            boxes, labels = boxes[kept], labels[kept]
        return {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels)}

    def _json(self, member: _Member) -> Any:  # noqa: ANN401 - whatever the file holds
        try:
            value = json.loads(member.read())
        except ValueError as error:
            raise BadSample(f"dataset: {member} is neither a number nor JSON: {error}.") from None
        field = self.options.json_field
        if field is None or not isinstance(value, dict):
            return value
        if field not in value:
            raise BadSample(
                f"dataset: {member} has no {field!r}; it has {', '.join(value)}. See dataset.args.json_field."
            )
        return value[field]


def _array(member: _Member) -> Any:  # noqa: ANN401 - of any type
    try:
        return np.load(io.BytesIO(member.read()), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise BadSample(f"dataset: {member} is no NumPy array: {error}.") from None


def _index(
    shards: str | Sequence[str], options: WebDatasetArguments, context: DataContext, *, field: str
) -> list[_Entry]:
    """Return all samples, shard by shard, in the order in which they were stored."""
    urls = [url for pattern in ([shards] if isinstance(shards, str) else shards) for url in expand_braces(pattern)]
    entries = []
    for url in urls:
        shard = local_file(url, context, field=field)
        samples: dict[str, list[_Member]] = {}
        for member in _members(shard, url, context.cache_dir, field=field):
            samples.setdefault(_key(member.name), []).append(member)
        for key, members in samples.items():
            entries.append(
                _Entry(
                    input=_choose(members, options.inputs, key, url, field="dataset.args.inputs"),
                    target=_choose(members, options.targets, key, url, field="dataset.args.targets"),
                )
            )
    if not entries:
        raise DatasetError(f"{field}: {', '.join(urls[:3])} hold no samples.")
    return entries


def expand_braces(pattern: str) -> list[str]:
    """Return what a pattern with {first..last} or {a,b} stands for, as a shell would."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, names = match.groups()
    if names is not None:
        choices = names.split(",")
    else:
        step = 1 if int(first) <= int(last) else -1
        choices = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + step, step)]
    rests = expand_braces(pattern[match.end() :])
    return [f"{pattern[: match.start()]}{choice}{rest}" for choice, rest in itertools.product(choices, rests)]


def _key(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_name(path.name.partition(".")[0]))


def _choose(members: Sequence[_Member], extensions: str, key: str, url: str, *, field: str) -> _Member:
    for extension in extensions.split(";"):
        for member in members:
            if member.extension == extension.strip().lstrip(".").lower():
                return member
    found = ", ".join(member.extension for member in members)
    raise DatasetError(f"{field}: sample {key} of {url} has no {extensions.replace(';', ', ')}; it has {found}.")


def _members(shard: Path, url: str, cache_dir: Path, *, field: str) -> list[_Member]:
    """Return a shard's members. Their headers are read once: the node keeps the list for other ranks and attempts."""
    status = shard.stat()
    key = f"{shard.resolve()} {status.st_size} {status.st_mtime_ns}"
    prepare_cache(cache_dir)
    name = f"index-{hashlib.sha256(key.encode()).hexdigest()}"
    listing = cache_dir / f"{name}.json"
    with exclusive(cache_dir / f"{name}.lock"):
        if not listing.exists():
            partial = cache_dir / f"{name}.partial"
            partial.write_text(json.dumps(_read_headers(shard, url, field)))
            partial.replace(listing)
        rows = json.loads(listing.read_text())
    return [
        _Member(shard=shard, name=name, extension=extension, offset=offset, size_bytes=size)
        for name, extension, offset, size in rows
    ]


def _read_headers(shard: Path, url: str, field: str) -> list[tuple[str, str, int, int]]:
    rows = []
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                base, _, extension = PurePosixPath(member.name).name.partition(".")
                if member.isreg() and base:
                    rows.append((member.name, extension.lower(), member.offset_data, member.size))
    except (tarfile.TarError, EOFError) as error:
        raise DatasetError(
            f"{field}: {url} is no plain tar file: {error}. Samples are read from their places, so a "
            "compressed one has "
            "to be unpacked first: gunzip."
        ) from None
    return rows
