"""The datasets that come with the service. A failure here shows as jobs that train on other samples than they say."""

import time

import numpy as np
import pytest
import torch

from service.domain import catalog
from service.domain.errors import InvalidSpec
from service.domain.spec import DatasetSpec, parse_spec
from service.training.data import build_dataset
from service.training.data.digits import read_digits


def dataset(factory, **args):
    return build_dataset(DatasetSpec(factory=factory, args=args), seed=0)


BUILTIN = ("builtin:diabetes", "builtin:digits", "builtin:digits-detection", "builtin:digits-segmentation")


@pytest.mark.parametrize("factory", BUILTIN)
def test_a_dataset_has_as_many_training_samples_as_the_catalog_says(factory):
    spec = DatasetSpec(factory=factory)
    assert len(build_dataset(spec, seed=0).training) == catalog.num_training_samples(spec.factory, spec.args)


@pytest.mark.parametrize("factory", ["builtin:npz", "mine.data:load"])
def test_the_catalog_knows_no_length_of_what_only_a_rank_can_read(factory):
    assert catalog.num_training_samples(factory, {"path": "data.npz"}) is None


@pytest.mark.parametrize("factory", BUILTIN)
def test_the_seed_of_the_job_does_not_change_what_it_is_evaluated_on(factory):
    first, second = (build_dataset(DatasetSpec(factory=factory), seed=seed).held_out for seed in (1, 2))
    rows = np.arange(5)
    assert torch.equal(first.batch(rows).inputs, second.batch(rows).inputs)


def test_digits_are_the_real_ones_standardized_by_the_training_split():
    from sklearn.datasets import load_digits

    digits = dataset("builtin:digits", test_fraction=0.25, split_seed=5)
    assert len(digits.held_out) == round(1797 * 0.25)
    assert digits.training.inputs.shape[1:] == (1, 8, 8)
    assert digits.training.inputs.mean().item() == pytest.approx(0, abs=1e-12)
    assert digits.training.inputs.std(correction=0).item() == pytest.approx(1)
    inputs = torch.cat([digits.training.inputs, digits.held_out.inputs]).flatten(1)
    targets = torch.cat([digits.training.targets, digits.held_out.targets])
    # Undo the standardization by the known range, 0 to 16, and compare as sets of (image, digit).
    pixels = ((inputs - inputs.min()) / (inputs.max() - inputs.min()) * 16).round().int()
    found = sorted((*row, target) for row, target in zip(pixels.tolist(), targets.tolist(), strict=True))
    images, labels = load_digits(return_X_y=True)
    assert found == sorted((*map(int, row), int(digit)) for row, digit in zip(images, labels, strict=True))


def test_another_split_seed_holds_other_images_out():
    splits = [dataset("builtin:digits", split_seed=seed) for seed in (0, 1)]
    assert not torch.equal(splits[0].held_out.targets, splits[1].held_out.targets)


def test_a_sequence_has_the_rows_of_the_image_as_steps():
    image, sequence = (dataset("builtin:digits", layout=layout).training for layout in ("image", "sequence"))
    assert sequence.inputs.shape[1:] == (8, 8)
    # (features, steps): what step 2 shows is row 2 of the image.
    assert torch.equal(sequence.inputs[7, :, 2], image.inputs[7, 0, 2, :])


def test_diabetes_is_what_scikit_learn_has():
    from sklearn.datasets import load_diabetes

    measurements, progress = load_diabetes(return_X_y=True, scaled=False)
    found = dataset("builtin:diabetes", standardize_targets=False)
    assert found.num_outputs == 1
    assert found.training.targets.shape == (354, 1)
    targets = torch.cat([found.training.targets, found.held_out.targets])[:, 0]
    assert sorted(targets.tolist()) == sorted(progress.tolist())
    torch.testing.assert_close(found.training.inputs.mean(0), torch.zeros(10, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.training.inputs.std(0, correction=0), torch.ones(10, dtype=torch.float64))
    # The patient with the highest blood pressure of those to train on is found by its target.
    patient = int(found.training.inputs[:, 3].argmax())
    same_target = measurements[progress == found.training.targets[patient].item()]
    assert same_target[:, 3].max() > np.quantile(measurements[:, 3], 0.9)


def test_standardized_targets_have_unit_variance():
    targets = dataset("builtin:diabetes").training.targets
    assert targets.mean().item() == pytest.approx(0, abs=1e-12)
    assert targets.std(correction=0).item() == pytest.approx(1)


CANVASES = {"num_training": 60, "num_held_out": 20, "height": 40, "width": 56, "max_digits": 4, "noise": 0.0}


def test_masks_and_boxes_of_the_same_canvases_agree():
    segmentation = dataset("builtin:digits-segmentation", **CANVASES)
    detection = dataset("builtin:digits-detection", **CANVASES)
    assert (segmentation.num_outputs, detection.num_outputs) == (11, 10)
    counts = set()
    for masks, boxes in ((segmentation.training, detection.training), (segmentation.held_out, detection.held_out)):
        for index in range(len(masks)):
            image, mask = masks.sample(index)
            same_image, target = boxes.sample(index)
            assert torch.equal(image, same_image)
            assert image.shape == (1, 40, 56)
            assert mask.shape == (40, 56)
            counts.add(len(target["labels"]))
            remaining = mask.clone()
            for (left, top, right, bottom), label in zip(target["boxes"].int(), target["labels"], strict=True):
                assert 0 <= left < right <= 56
                assert 0 <= top < bottom <= 40
                inside = mask[top:bottom, left:right] == label + 1
                # The box is tight: each of its edges touches ink.
                assert inside[0].any()
                assert inside[-1].any()
                assert inside[:, 0].any()
                assert inside[:, -1].any()
                remaining[top:bottom, left:right] = 0
            assert not remaining.any()
    assert counts == {1, 2, 3, 4}


def test_digits_on_a_canvas_are_whole():
    """Every shown digit has all the ink of one of the originals: none covers another."""
    images, digits = read_digits()
    ink_areas = {(int(digit), int((image >= 4).sum()) * 4) for image, digit in zip(images, digits, strict=True)}
    source = dataset("builtin:digits-segmentation", **CANVASES | {"max_digits": 2}).training
    seen = 0
    for index in range(len(source)):
        mask = source.sample(index).target
        for label in mask.unique()[1:].tolist():
            if len(mask.unique()) == 3:  # two different digits: the area of a label is that of one digit
                seen += 1
                assert (label - 1, int((mask == label).sum())) in ink_areas
    assert seen > 20


def test_canvases_to_evaluate_show_other_originals():
    source = dataset(
        "builtin:digits-segmentation",
        **CANVASES | {"max_digits": 1, "height": 16, "width": 16, "num_training": 300, "num_held_out": 300},
    )

    def shown(inputs):
        return {image.tobytes() for image in inputs.numpy()}

    assert not shown(source.training.inputs) & shown(source.held_out.inputs)
    assert len(shown(source.training.inputs)) > 200


def test_a_canvas_does_not_depend_on_how_many_there_are():
    few, many = (dataset("builtin:digits-detection", **CANVASES | {"num_training": count}) for count in (10, 60))
    for index in range(10):
        torch.testing.assert_close(few.training.sample(index).target, many.training.sample(index).target)


def test_noise_has_the_standard_deviation_that_was_asked_for():
    arguments = CANVASES | {"num_training": 200}
    clean = dataset("builtin:digits-segmentation", **arguments).training.inputs
    noisy = dataset("builtin:digits-segmentation", **arguments | {"noise": 0.2}).training.inputs
    # Inputs are standardized by a factor that noise changes; 200·40·56 draws settle the ratio to under one percent.
    ink = clean.max() - clean.min()
    clean_unit = (clean - clean.min()) / ink
    slope = ((noisy - noisy.mean()) * (clean_unit - clean_unit.mean())).mean() / clean_unit.var(correction=0)
    residual = noisy - noisy.mean() - slope * (clean_unit - clean_unit.mean())
    assert (residual.std() / slope).item() == pytest.approx(0.2, rel=0.01)


@pytest.mark.benchmark
def test_a_thousand_canvases_are_drawn_at_once():
    times_s = []
    for _ in range(3):
        started = time.perf_counter()
        dataset("builtin:digits-segmentation")
        times_s.append(time.perf_counter() - started)
    assert min(times_s) < 0.3


@pytest.mark.parametrize(
    ("args", "field"),
    [
        ({"scale": 8, "height": 48}, "dataset.args.scale"),
        ({"num_training": 10**6, "height": 4096, "width": 4096}, "dataset.args.num_training"),
        ({"max_digits": 0}, "dataset.args.max_digits"),
    ],
    ids=str,
)
def test_canvases_that_cannot_be_drawn_are_refused_with_the_job(args, field):
    job = {
        "name": "canvases",
        "model": {"factory": "builtin:mlp"},
        "dataset": {"factory": "builtin:digits-segmentation", "args": args},
        "batch": {"size": 4},
        "steps": 1,
    }
    with pytest.raises(InvalidSpec) as refused:
        parse_spec(job)
    assert [problem.field for problem in refused.value.problems] == [field]
