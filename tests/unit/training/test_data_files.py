"""Datasets from people's own files: read as they were written, and refused with the field and the remedy.

A failure of a round trip means wrong samples; of a refusal, a job that ends without saying what to do.
"""

import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from service.domain.catalog.datasets import ImageArguments
from service.domain.spec import DatasetSpec
from service.training.data import build_dataset
from service.training.data.context import DataContext
from service.training.data.files import open_tree
from service.training.data.images import ImageDecoder
from service.training.data.webdataset import expand_braces
from service.training.errors import BadSample, DatasetError

GENERATOR = np.random.default_rng(0)
UNIT = {"mean": [0, 0, 0], "std": [1 / 255] * 3}  # pixels as they are stored, 0 to 255
UNIT_GRAY = {"mean": [0], "std": [1 / 255], "grayscale": True}


@pytest.fixture
def open_dataset(tmp_path):
    def build(factory, *, uploads=None, **args):
        return build_dataset(
            DatasetSpec(factory=f"builtin:{factory}", args=args), seed=0, uploads=uploads, cache_dir=tmp_path / "cache"
        )

    return build


@pytest.fixture
def memory():
    """A remote file system, as it were."""
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


def pixels(height=6, width=8, channels=3):
    return GENERATOR.integers(0, 256, (height, width, channels) if channels > 1 else (height, width), dtype=np.uint8)


def encoded(array, format="png"):
    file = io.BytesIO()
    Image.fromarray(array).save(file, format)
    return file.getvalue()


def all_of(source):
    return [source.sample(index) for index in range(len(source))]


class TestNpz:
    @pytest.fixture
    def arrays(self):
        return {"inputs": GENERATOR.normal(3, 2, (20, 2, 3, 4)), "targets": np.arange(20) % 4}

    @pytest.fixture
    def path(self, tmp_path, arrays):
        path = tmp_path / "data.npz"
        np.savez(path, **arrays)
        return path

    def test_every_sample_comes_back_once(self, open_dataset, path, arrays):
        dataset = open_dataset("npz", path=str(path), normalize=False, test_fraction=0.25)
        assert (len(dataset.training), len(dataset.held_out), dataset.num_outputs) == (15, 5, 4)
        samples = all_of(dataset.training) + all_of(dataset.held_out)
        found = sorted((image.numpy().tobytes(), int(label)) for image, label in samples)
        assert found == sorted((row.tobytes(), label) for row, label in zip(*arrays.values(), strict=True))
        assert samples[0].input.dtype == torch.float64

    def test_inputs_are_standardized_by_the_training_split(self, open_dataset, path):
        inputs = open_dataset("npz", path=str(path)).training.inputs
        zeros = torch.zeros(2, dtype=torch.float64)
        torch.testing.assert_close(inputs.mean((0, 2, 3)), zeros, rtol=0, atol=1e-12)
        torch.testing.assert_close(inputs.var((0, 2, 3), correction=0), zeros + 1)

    def test_a_constant_channel_becomes_zero(self, open_dataset, tmp_path):
        np.savez(tmp_path / "data.npz", inputs=np.full((4, 1), 7), targets=[0, 1, 0, 1])
        inputs = open_dataset("npz", path=str(tmp_path / "data.npz"), test_fraction=0).training.inputs
        assert inputs.dtype == torch.float32
        assert not inputs.any()

    def test_arrays_of_their_own_are_held_out(self, open_dataset, tmp_path):
        np.savez(tmp_path / "d.npz", x=np.eye(3), y=[0.5, 1.5, 2.5], x2=np.ones((2, 3)), y2=[1.0, 2.0])
        dataset = open_dataset(
            "npz",
            path=str(tmp_path / "d.npz"),
            inputs="x",
            targets="y",
            held_out_inputs="x2",
            held_out_targets="y2",
            normalize=False,
        )
        assert torch.equal(dataset.training.inputs, torch.eye(3, dtype=torch.float64))
        assert torch.equal(dataset.held_out.inputs, torch.ones(2, 3, dtype=torch.float64))
        # A value to predict is a vector of one, as a model puts it out.
        assert dataset.held_out.targets.tolist() == [[1.0], [2.0]]
        assert dataset.num_outputs == 1

    def test_masks_come_with_the_number_of_classes(self, open_dataset, tmp_path):
        masks = GENERATOR.integers(0, 3, (4, 5, 5))
        masks[0, 0, 0] = 255  # a pixel to ignore is the task's to judge
        np.savez(tmp_path / "d.npz", inputs=np.zeros((4, 1, 5, 5)), targets=masks)
        arguments = {"path": str(tmp_path / "d.npz"), "test_fraction": 0}
        dataset = open_dataset("npz", **arguments, num_classes=3)
        assert sorted(dataset.training.targets.sum((1, 2)).tolist()) == sorted(masks.sum((1, 2)).tolist())
        with pytest.raises(DatasetError, match=r"dataset\.args\.num_classes: give it"):
            open_dataset("npz", **arguments)

    def test_a_file_is_found_where_it_was_uploaded_to_and_at_a_url(self, open_dataset, path, memory):
        memory.pipe("/data/some.npz", path.read_bytes())
        expected = open_dataset("npz", path=str(path)).training.inputs
        sha256 = "ab" * 32
        for name in ("upload:" + sha256, "memory://data/some.npz"):
            found = open_dataset("npz", path=name, uploads={sha256: path})
            assert torch.equal(found.training.inputs, expected)

    def test_a_url_is_copied_once_and_again_when_it_has_changed(self, open_dataset, arrays, path, memory, monkeypatch):
        opened = []
        real_open = type(memory)._open
        monkeypatch.setattr(
            type(memory), "_open", lambda self, p, *a, **k: opened.append(p) or real_open(self, p, *a, **k)
        )
        memory.pipe_file("/some.npz", path.read_bytes())
        opened.clear()
        for _ in range(2):
            open_dataset("npz", path="memory://some.npz")
        assert len(opened) == 1
        file = io.BytesIO()
        np.savez(file, **arrays | {"inputs": arrays["inputs"][:, :1]})
        memory.pipe_file("/some.npz", file.getvalue())
        assert open_dataset("npz", path="memory://some.npz").training.inputs.shape[1] == 1

    @pytest.mark.parametrize(
        ("args", "error", "message"),
        [
            (
                {"inputs": "input"},
                DatasetError,
                r"dataset\.args\.inputs: .* has no array 'input'\. Did you mean inputs\?",
            ),
            ({"targets": "short"}, DatasetError, r"dataset\.args\.targets: .* has 20 inputs and 19 short"),
            ({"num_classes": 3}, BadSample, r"label of sample \d+ of the training targets .* is 3, not one of 0 to 2"),
            ({"targets": "negative"}, BadSample, r"is -1, not one of 0 to"),
            ({"inputs": "objects"}, DatasetError, r"dataset\.args\.inputs: array objects .* cannot be read"),
            ({"targets": "texts"}, DatasetError, r"use whole numbers for labels"),
            ({"inputs": "broken"}, BadSample, r"input \d+ of .* is not finite"),
            ({"inputs": "flat"}, DatasetError, r"at least \(samples, features\)"),
            ({"test_fraction": 0.99}, DatasetError, r"dataset\.args\.test_fraction: 0\.99 of 20 samples leaves none"),
            ({"inputs": "none", "targets": "none"}, DatasetError, "the dataset is empty"),
            ({"inputs": "number"}, DatasetError, "is a single number"),
            (
                {"held_out_inputs": "other_shape", "held_out_targets": "targets"},
                DatasetError,
                r"training inputs .* have the shape \(2, 3, 4\), the held-out ones \(5,\)",
            ),
        ],
        ids=str,
    )
    def test_what_does_not_fit_is_refused(self, open_dataset, tmp_path, arrays, args, error, message):
        broken = arrays["inputs"].copy()
        broken[:, 0, 0, 0] = np.nan
        np.savez(
            tmp_path / "d.npz",
            **arrays,
            short=np.arange(19),
            negative=np.arange(20) - 1,
            objects=np.array([None] * 20),
            texts=np.array(["a"] * 20),
            broken=broken,
            flat=np.zeros(20),
            none=np.zeros((0, 3)),
            number=np.float64(1),
            other_shape=np.zeros((20, 5)),
        )
        with pytest.raises(error, match=message):
            open_dataset("npz", path=str(tmp_path / "d.npz"), **args)

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("/nowhere/data.npz", r"dataset\.args\.path: there is no file /nowhere/data\.npz"),
            ("memory://nowhere.npz", r"dataset\.args\.path: there is nothing at memory://nowhere\.npz"),
            ("upload:" + "0" * 64, r"dataset\.args\.path: nothing was uploaded as upload:000"),
            ("nosuch://bucket/data.npz", r"dataset\.args\.path: .*nosuch"),
            (__file__, r"dataset\.args\.path: .* is no NumPy archive"),
        ],
        ids=lambda value: str(value)[:12],
    )
    def test_a_missing_file_is_named(self, open_dataset, path, message):
        with pytest.raises(DatasetError, match=message):
            open_dataset("npz", path=path)


FOLDER_IMAGES = {f"{kind}/{number}.png": pixels() for kind in ("cat", "dog", "eel") for number in range(4)}
SAME_SIZE = {"size": [6, 8], **UNIT}


class TestImageFolder:
    def _write(self, directory, prefix=""):
        for name, image in FOLDER_IMAGES.items():
            path = directory / prefix / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(image))
        (directory / prefix / "cat" / "notes.txt").write_text("no image")
        (directory / prefix / "cat" / "._0.png").write_text("a Mac's")

    def _assert_all_there(self, *sources):
        found = sorted((image.sum().item(), int(label)) for source in sources for image, label in all_of(source))
        expected = sorted((float(image.sum()), "cde".index(name[0])) for name, image in FOLDER_IMAGES.items())
        assert found == expected

    def test_every_image_comes_back_with_the_label_of_its_folder(self, open_dataset, tmp_path):
        self._write(tmp_path / "images")
        dataset = open_dataset("image-folder", path=str(tmp_path / "images"), test_fraction=0.25, **SAME_SIZE)
        assert (len(dataset.training), len(dataset.held_out), dataset.num_outputs) == (9, 3, 3)
        assert dataset.training.sample(0).input.shape == (3, 6, 8)
        self._assert_all_there(dataset.training, dataset.held_out)

    @pytest.mark.parametrize("where", ["zip", "upload", "memory zip", "memory directory"])
    def test_it_may_be_an_archive_an_upload_or_remote(self, open_dataset, tmp_path, memory, where):
        self._write(tmp_path / "images")
        archive = tmp_path / "images.zip"
        with zipfile.ZipFile(archive, "w") as file:
            for path in (tmp_path / "images").rglob("*"):
                file.write(path, path.relative_to(tmp_path / "images"))
        memory.pipe_file("/bucket/images.zip", archive.read_bytes())
        memory.put(str(tmp_path / "images"), "/bucket/images", recursive=True)
        path = {
            "zip": str(archive),
            "upload": "upload:" + "1" * 64,
            "memory zip": "memory://bucket/images.zip",
            "memory directory": "memory://bucket/images",
        }[where]
        dataset = open_dataset("image-folder", path=path, uploads={"1" * 64: archive}, test_fraction=0, **SAME_SIZE)
        self._assert_all_there(dataset.training)

    def test_a_folder_of_its_own_is_held_out(self, open_dataset, tmp_path):
        self._write(tmp_path, "train")
        (tmp_path / "val" / "dog").mkdir(parents=True)
        (tmp_path / "val" / "dog" / "rex.jpg").write_bytes(encoded(pixels(), "jpeg"))
        arguments = {"path": str(tmp_path), "training_folder": "train", "held_out_folder": "val", **SAME_SIZE}
        dataset = open_dataset("image-folder", **arguments)
        self._assert_all_there(dataset.training)
        assert [int(label) for _, label in all_of(dataset.held_out)] == [1]
        (tmp_path / "val" / "yak").mkdir()
        (tmp_path / "val" / "yak" / "y.png").write_bytes(encoded(pixels()))
        with pytest.raises(DatasetError, match=r"held_out_folder: val has a class 'yak' that is not trained on"):
            open_dataset("image-folder", **arguments)

    def test_a_folder_without_classes_is_refused(self, open_dataset, tmp_path):
        self._write(tmp_path, "train")
        with pytest.raises(
            DatasetError, match=r"training_folder: trian of .* has no images in .* Folders there: train\."
        ):
            open_dataset("image-folder", path=str(tmp_path), training_folder="trian")

    def test_a_file_that_is_no_archive_is_refused(self, open_dataset):
        with pytest.raises(DatasetError, match=r"dataset\.args\.path: .* neither a directory nor a zip archive"):
            open_dataset("image-folder", path=__file__)

    @pytest.mark.parametrize("content", [b"no image", encoded(pixels())[:60], b""], ids=["text", "cut off", "empty"])
    def test_a_broken_image_is_named(self, open_dataset, tmp_path, content):
        (tmp_path / "cat").mkdir()
        (tmp_path / "cat" / "broken.png").write_bytes(content)
        dataset = open_dataset("image-folder", path=str(tmp_path), test_fraction=0)
        with pytest.raises(BadSample, match=r"cat/broken\.png cannot be decoded"):
            dataset.training.sample(0)


class TestImages:
    def decoder(self, **args):
        return ImageDecoder.of(ImageArguments.model_validate(args))

    def test_the_middle_is_cut_out(self):
        image = pixels(6, 12)
        found, placement = self.decoder(size=[6, 6], **UNIT).decode(encoded(image), name="x")
        assert np.array_equal(found.numpy(), image[:, 3:9].transpose(2, 0, 1))
        assert placement.offset == (3, 0)

    def test_the_shorter_side_is_made_to_fit(self):
        columns = np.repeat(np.arange(0, 240, 20, dtype=np.uint8)[None], 6, 0)  # (6, 12), darker to the left
        found, _ = self.decoder(size=[3, 3], **UNIT_GRAY).decode(encoded(columns), name="x")
        # Halved to (3, 6), of which columns 1.5 to 4.5 are the middle: 2 to 4 or 1 to 3. Means of pairs: 10, 50, …
        assert found[0, 0].tolist() in ([50, 90, 130], [90, 130, 170])

    def test_or_the_image_is_stretched(self):
        image = np.repeat(np.array([[0, 200]], np.uint8), 4, 0)
        found, _ = self.decoder(size=[2, 2], fit="resize", **UNIT_GRAY).decode(encoded(image), name="x")
        assert found.tolist() == [[[0, 200], [0, 200]]]

    def test_channels_are_standardized_by_what_imagenet_has_unless_told(self):
        image = np.full((2, 2, 3), 255, np.uint8)
        found, _ = self.decoder(size=[2, 2]).decode(encoded(image), name="x")
        expected = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
        assert found[:, 0, 0].tolist() == pytest.approx(expected, rel=1e-6)

    def test_sixteen_bits_keep_their_range(self):
        image = np.array([[0, 65535], [257 * 100, 30000]], np.uint16)
        found, _ = self.decoder(size=[2, 2], **UNIT_GRAY).decode(encoded(image), name="x")
        assert found[0].flatten().tolist() == pytest.approx([0, 255, 100, 30000 / 257], rel=1e-6)
        in_color, _ = self.decoder(size=[2, 2], **UNIT).decode(encoded(image), name="x")
        assert in_color.shape == (3, 2, 2)

    def test_gray_palette_and_transparent_images_have_the_channels_that_were_asked_for(self):
        gray = pixels(channels=1)
        for image in (Image.fromarray(gray), Image.fromarray(gray).convert("P"), Image.fromarray(gray).convert("LA")):
            file = io.BytesIO()
            image.save(file, "png")
            found, _ = self.decoder(size=[6, 8], **UNIT).decode(file.getvalue(), name="x")
            assert np.array_equal(found.numpy(), np.stack([gray] * 3))

    def test_labels_of_a_mask_are_not_mixed(self):
        mask = (GENERATOR.integers(0, 2, (9, 9)) * 7).astype(np.uint8)
        found = self.decoder(size=[4, 4]).decode_mask(encoded(mask), name="x")
        assert found.dtype == torch.int64
        assert set(found.unique().tolist()) <= {0, 7}
        with pytest.raises(BadSample, match="mask m is a RGB image"):
            self.decoder().decode_mask(encoded(pixels()), name="m")


class TestParquet:
    @pytest.fixture
    def table(self):
        return {
            "a": GENERATOR.normal(size=12),
            "b": np.arange(12),
            "label": np.arange(12) % 3,
            "name": [("eel", "cat", "dog")[row % 3] for row in range(12)],
            "value": GENERATOR.normal(size=12).astype(np.float32),
            "image": [row.tolist() for row in GENERATOR.normal(size=(12, 8))],
        }

    def _write(self, path, columns):
        pyarrow.parquet.write_table(pa.table(columns), path, row_group_size=5)
        return str(path)

    def test_columns_of_numbers_are_features(self, open_dataset, tmp_path, table):
        path = self._write(tmp_path / "d.parquet", table)
        dataset = open_dataset("parquet", path=path, inputs=["a", "b"], targets=["label"], normalize=False)
        samples = all_of(dataset.training) + all_of(dataset.held_out)
        found = sorted((*features.tolist(), int(label)) for features, label in samples)
        assert found == sorted(zip(table["a"], table["b"].astype(float), table["label"], strict=True))
        assert dataset.num_outputs == 3

    def test_a_column_of_lists_has_the_shape_that_was_given(self, open_dataset, tmp_path, table):
        path = self._write(tmp_path / "d.parquet", table)
        arguments = {"path": path, "inputs": ["image"], "targets": ["value"], "test_fraction": 0, "normalize": False}
        dataset = open_dataset("parquet", **arguments, input_shape=[2, 2, 2])
        order = dataset.training.inputs.flatten(1)[:, 0].argsort()
        expected = torch.tensor(sorted(table["image"]), dtype=torch.float64).reshape(12, 2, 2, 2)
        assert torch.equal(dataset.training.inputs[order], expected)
        assert dataset.training.targets.shape == (12, 1)
        with pytest.raises(DatasetError, match=r"dataset\.args\.input_shape: 3×3 are not the 8 numbers"):
            open_dataset("parquet", **arguments, input_shape=[3, 3])

    def test_text_is_numbered_in_sorted_order(self, open_dataset, tmp_path, table):
        path = self._write(tmp_path / "d.parquet", table)
        dataset = open_dataset("parquet", path=path, inputs=["b"], targets=["name"], test_fraction=0, normalize=False)
        expected = {row: ("cat", "dog", "eel").index(name) for row, name in enumerate(table["name"])}
        assert {int(row): int(label) for row, label in all_of(dataset.training)} == expected

    def test_another_file_is_held_out(self, open_dataset, tmp_path, table):
        path = self._write(tmp_path / "d.parquet", table)
        other = self._write(tmp_path / "other=1.parquet", {"b": [1.0, 2.0], "label": [2, 0]})
        dataset = open_dataset("parquet", path=path, held_out_path=other, inputs=["b"], targets=["label"])
        assert (len(dataset.training), len(dataset.held_out)) == (12, 2)

    @pytest.mark.parametrize(
        ("args", "error", "message"),
        [
            ({"inputs": ["image", "a"]}, DatasetError, r"dataset\.args\.inputs: columns of lists .* cannot be joined"),
            ({"inputs": ["bb"]}, DatasetError, r"dataset\.args\.inputs: .* has no column 'bb'\. Did you mean b\?"),
            ({"targets": ["lable"]}, DatasetError, r"dataset\.args\.targets: .* Did you mean label\?"),
            ({"inputs": ["name"]}, DatasetError, "numbers are needed"),
            ({"inputs": ["gap"]}, BadSample, r"column gap of .* has no value in row 7"),
            ({"inputs": ["ragged"]}, BadSample, r"column ragged of .* has 1 numbers in row 3, 2 in row 0"),
            ({"inputs": ["struct"]}, DatasetError, r"dataset\.args\.inputs: column struct of .* holds struct"),
            ({"num_classes": 2}, BadSample, "is 2, not one of 0 to 1"),
        ],
        ids=str,
    )
    def test_what_does_not_fit_is_refused(self, open_dataset, tmp_path, table, args, error, message):
        table |= {
            "gap": [1.0] * 7 + [None] * 5,
            "ragged": [[1.0, 2.0]] * 3 + [[1.0]] * 9,
            "struct": [{"x": 1}] * 12,
        }
        path = self._write(tmp_path / "d.parquet", table)
        with pytest.raises(error, match=message):
            open_dataset("parquet", **{"path": path, "inputs": ["b"], "targets": ["label"]} | args)

    def test_another_kind_of_file_is_refused(self, open_dataset):
        with pytest.raises(DatasetError, match=r"dataset\.args\.path: .* cannot be read as Parquet"):
            open_dataset("parquet", path=__file__, inputs=["a"], targets=["b"])

    def test_a_missing_library_is_named(self, open_dataset, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        with pytest.raises(DatasetError, match=r"builtin:parquet needs pyarrow.*pip install 'syncbn\[parquet\]'"):
            open_dataset("parquet", path="x", inputs=["a"], targets=["b"])


TAR_IMAGES = [pixels() for _ in range(10)]
TAR_ARGUMENTS = {"test_fraction": 0, **SAME_SIZE}


class TestWebDataset:
    def _shard(self, path, members):
        path = Path(path)
        with tarfile.open(path, "w") as archive:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return str(path)

    def _labelled(self, numbers, label_of=lambda number: number % 4):
        for number in numbers:
            yield f"some/{number:04}.png", encoded(TAR_IMAGES[number])
            yield f"some/{number:04}.cls", f"{label_of(number)}\n".encode()
            yield f"some/{number:04}.txt", b"not needed"

    @pytest.fixture
    def shards(self, tmp_path):
        for shard, numbers in enumerate((range(4), range(4, 7), range(7, 10))):
            self._shard(tmp_path / f"s-{shard:03}.tar", self._labelled(numbers))
        return f"{tmp_path}/s-{{000..002}}.tar"

    def _assert_all_there(self, *sources):
        found = sorted((image.sum().item(), int(label)) for source in sources for image, label in all_of(source))
        assert found == sorted((float(image.sum()), number % 4) for number, image in enumerate(TAR_IMAGES))

    def test_every_sample_comes_back_in_the_order_of_the_shards(self, open_dataset, shards):
        dataset = open_dataset("webdataset", shards=shards, **TAR_ARGUMENTS)
        assert dataset.num_outputs == 4
        self._assert_all_there(dataset.training)
        held_out = open_dataset("webdataset", shards=shards, held_out_shards=[shards], **TAR_ARGUMENTS).held_out
        assert [int(label) for _, label in all_of(held_out)] == [number % 4 for number in range(10)]

    def test_headers_are_read_once(self, open_dataset, shards, monkeypatch):
        expected = open_dataset("webdataset", shards=shards, **TAR_ARGUMENTS).training
        monkeypatch.setattr(tarfile, "open", lambda *a, **k: pytest.fail("reads headers again"))
        found = open_dataset("webdataset", shards=shards, **TAR_ARGUMENTS).training
        torch.testing.assert_close(all_of(found), all_of(expected), rtol=0, atol=0)

    def test_shards_may_be_remote(self, open_dataset, shards, memory):
        for shard in expand_braces(shards):
            memory.pipe_file(f"/bucket/{Path(shard).name}", Path(shard).read_bytes())
        dataset = open_dataset("webdataset", shards="memory://bucket/s-{000..002}.tar", **TAR_ARGUMENTS)
        self._assert_all_there(dataset.training)

    def test_arrays_and_values(self, open_dataset, tmp_path):
        arrays = GENERATOR.normal(size=(3, 2, 5)).astype(np.float32)

        def members():
            for number, array in enumerate(arrays):
                file = io.BytesIO()
                np.save(file, array)
                yield f"{number}.npy", file.getvalue()
                yield f"{number}.json", json.dumps({"speed": [number, number / 2]}).encode()

        shard = self._shard(tmp_path / "s.tar", members())
        arguments = {"shards": shard, "test_fraction": 0, "target_kind": "value", "json_field": "speed"}
        dataset = open_dataset("webdataset", **arguments)
        assert dataset.num_outputs == 2
        found = sorted(all_of(dataset.training), key=lambda sample: sample.target[0])
        assert torch.equal(torch.stack([sample.input for sample in found]), torch.from_numpy(arrays))
        assert [sample.target.tolist() for sample in found] == [[0, 0], [1, 0.5], [2, 1]]
        with pytest.raises(BadSample, match=r"0\.json of s\.tar has no 'sped'; it has speed"):
            open_dataset("webdataset", **arguments | {"json_field": "sped"})

    def test_masks_and_boxes_move_with_the_image(self, open_dataset, tmp_path):
        image = np.zeros((8, 16), np.uint8)
        image[2:4, 6:10] = 255
        boxes = {"boxes": [[6, 2, 10, 4], [0, 0, 2, 8]], "labels": [1, 0]}
        members = [
            ("a.png", encoded(image)),
            ("a.seg.png", encoded(image // 255)),
            ("a.json", json.dumps(boxes).encode()),
        ]
        arguments = {
            "shards": self._shard(tmp_path / "s.tar", members),
            "test_fraction": 0,
            "size": [16, 16],
            **UNIT_GRAY,
        }
        # Twice as large is 16×32, of which the middle 16×16 is kept.
        mask = open_dataset("webdataset", **arguments, target_kind="mask", targets="seg.png", num_classes=2).training
        found = mask.sample(0).target
        expected = torch.zeros(16, 16, dtype=torch.int64)
        expected[4:8, 4:12] = 1
        assert torch.equal(found, expected)
        dataset = open_dataset("webdataset", **arguments, target_kind="boxes")
        assert dataset.num_outputs == 2
        target = dataset.training.sample(0).target
        assert target["boxes"].tolist() == [[4, 4, 12, 8]]  # the other one was cut off
        assert target["labels"].tolist() == [1]

    @pytest.mark.parametrize(
        ("members", "args", "error", "message"),
        [
            (
                [("a.png", b""), ("b.cls", b"1")],
                {},
                DatasetError,
                r"args\.targets: sample a of .* no cls, json; it has png",
            ),
            ([("a.gif", b""), ("a.cls", b"1")], {}, DatasetError, r"args\.inputs: sample a of .* it has gif, cls"),
            ([("a.png", b""), ("a.cls", b"cat")], {}, BadSample, r"a\.cls of s\.tar is neither a number nor JSON"),
            ([("a.png", b""), ("a.cls", b"1.5")], {}, BadSample, r"a\.cls of s\.tar holds 1\.5; a label is a whole"),
            ([("a.png", b""), ("a.cls", b"2")], {"num_classes": 2}, BadSample, r"label of a\.cls of s\.tar is 2, not"),
            ([("a.png", b"x"), ("a.cls", b"1")], {}, BadSample, r"a\.png of s\.tar cannot be decoded"),
            ([("a.npy", b"x"), ("a.cls", b"1")], {}, BadSample, r"a\.npy of s\.tar is no NumPy array"),
            ([("a.png", b""), ("a.json", b"[]")], {"target_kind": "boxes"}, BadSample, r"is not of the form"),
            ([("a.png", b""), ("a.json", b'"x"')], {"target_kind": "value"}, BadSample, "numbers are needed"),
            ([("a.png", b""), ("a.json", b"1")], {"target_kind": "mask"}, DatasetError, "num_classes: give it"),
            ([], {}, DatasetError, r"dataset\.args\.shards: .* hold no samples"),
        ],
        ids=range(11),
    )
    def test_what_does_not_fit_is_refused(self, open_dataset, tmp_path, members, args, error, message):
        shard = self._shard(tmp_path / "s.tar", members)
        arguments = {"size": [6, 8], "test_fraction": 0} | args
        if members and members[0][1] == b"" and members[-1][1] == b"2":
            members[0] = ("a.png", encoded(pixels()))
            shard = self._shard(tmp_path / "s.tar", members)
        with pytest.raises(error, match=message):
            open_dataset("webdataset", shards=shard, **arguments).training.sample(0)

    def test_a_compressed_shard_is_refused_with_the_remedy(self, open_dataset, tmp_path):
        with tarfile.open(tmp_path / "s.tar.gz", "w:gz"):
            pass
        with pytest.raises(DatasetError, match=r"dataset\.args\.shards: .* gunzip"):
            open_dataset("webdataset", shards=str(tmp_path / "s.tar.gz"))

    def test_a_shard_that_was_cut_off_is_named(self, open_dataset, tmp_path):
        path = Path(self._shard(tmp_path / "s.tar", self._labelled(range(2))))
        source = open_dataset("webdataset", shards=str(path), **TAR_ARGUMENTS).training
        path.write_bytes(path.read_bytes()[:600])
        with pytest.raises(BadSample, match=r"some/000\d\.\w+ of s\.tar is cut off"):
            all_of(source)


def test_braces_stand_for_what_a_shell_makes_of_them():
    assert expand_braces("a") == ["a"]
    assert expand_braces("s-{08..11}.tar") == ["s-08.tar", "s-09.tar", "s-10.tar", "s-11.tar"]
    assert expand_braces("{a,b}/{2..1}") == ["a/2", "a/1", "b/2", "b/1"]


def test_a_cache_that_another_user_made_is_not_trusted(open_dataset, memory, monkeypatch):
    memory.pipe_file("/some.npz", b"any")
    monkeypatch.setattr("service.training.data.files.os.getuid", lambda: 4321)
    monkeypatch.setattr(Path, "stat", lambda self, **_: SimpleNamespace(st_uid=1234))
    with pytest.raises(DatasetError, match="belongs to another user"):
        open_dataset("npz", path="memory://some.npz")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
class TestDamagedArchives:
    """What is compressed does not end as it should."""

    def _archive(self, path, members, method):
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
            infos = archive.infolist()
        damaged = bytearray(path.read_bytes())
        for info in infos:
            start = info.header_offset + 30 + len(info.filename)  # 30: the header before the name
            start += 9 if method == zipfile.ZIP_LZMA else 0  # what the filter is
            damaged[start : start + 40] = b"\xff" * 40
        path.write_bytes(damaged)

    def test_an_array_names_its_field(self, tmp_path, open_dataset, method):
        arrays = {}
        for name in ("inputs", "targets"):
            file = io.BytesIO()
            np.save(file, np.arange(1000.0)[:, None])
            arrays[f"{name}.npy"] = file.getvalue()
        self._archive(tmp_path / "d.npz", arrays, method)
        with pytest.raises(DatasetError, match=r"^dataset\.args\.inputs: array inputs of .*d\.npz cannot be read"):
            open_dataset("npz", path=str(tmp_path / "d.npz"))

    def test_an_image_names_its_file(self, tmp_path, method):
        context = DataContext(seed=0, uploads={}, cache_dir=tmp_path / "cache")
        self._archive(tmp_path / "d.zip", {"cat/1.png": encoded(pixels(40, 40))}, method)
        with pytest.raises(BadSample, match=r"^dataset: cat/1\.png of .*d\.zip cannot be read"):
            open_tree(str(tmp_path / "d.zip"), context, field="dataset.args.path").read("cat/1.png")
