"""Augmentations: exact in what they do, and functions of (seed, epoch, sample). A failure of the first shows as masks
and boxes beside their images; of the second, as curves that differ between worlds.
"""

import random
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.domain.catalog.augmentations import AUGMENTATIONS
from service.domain.spec import AugmentationSpec, DatasetSpec
from service.training.data import Sample, build_augmentations, build_dataset
from service.training.errors import BadFactory, BadSample


def transform(*specs, seed=0):
    return build_augmentations([AugmentationSpec(**spec) for spec in specs], seed)


def one(name, **args):
    return transform({"name": name, "args": args})


IMAGE = torch.arange(2 * 4 * 6, dtype=torch.float64).reshape(2, 4, 6)
MASK = torch.arange(24).reshape(4, 6)
ALL = [{"name": name} for name in sorted(AUGMENTATIONS, key=lambda name: (name == "noise", name))]  # noise at last


def with_boxes(image):
    """Two boxes with the pixels that they enclose as truth: ones inside the first, twos inside the second."""
    image = torch.zeros(1, *image.shape[1:], dtype=torch.float64)
    image[0, 0:2, 1:4] = 1
    image[0, 3, 5] = 2
    boxes = torch.tensor([[1, 0, 4, 2], [5, 3, 6, 4]], dtype=torch.float64)
    return Sample(image, {"boxes": boxes, "labels": torch.tensor([1, 2])})


def assert_boxes_enclose(sample):
    found = {}
    for (left, top, right, bottom), label in zip(sample.target["boxes"].int(), sample.target["labels"], strict=True):
        found[int(label)] = True
        inside = sample.input[0, top:bottom, left:right]
        assert inside.numel() == (sample.input == label).sum()
        assert (inside == label).all()
    for label in (1, 2):
        assert (sample.input == label).any() == (label in found)


@pytest.mark.parametrize(("name", "axis"), [("horizontal-flip", -1), ("vertical-flip", -2)])
def test_a_flip_mirrors_image_mask_and_boxes(name, axis):
    flip = one(name, probability=1.0)
    image, mask = flip(Sample(IMAGE, MASK), epoch=0, index=0)
    assert torch.equal(image, IMAGE.flip(axis))
    assert torch.equal(mask, MASK.flip(axis))
    assert_boxes_enclose(flip(with_boxes(IMAGE), epoch=0, index=0))
    untouched = one(name, probability=0.0)(Sample(IMAGE, MASK), epoch=0, index=0)
    assert torch.equal(untouched.input, IMAGE)


def test_a_flip_comes_as_often_as_it_should():
    flip = one("horizontal-flip", probability=0.3)
    flipped = [not torch.equal(flip(Sample(IMAGE, 0), epoch=0, index=index).input, IMAGE) for index in range(2000)]
    assert np.mean(flipped) == pytest.approx(0.3, abs=0.05)  # five standard deviations


@given(index=st.integers(0, 2**40), epoch=st.integers(0, 1000), height=st.integers(1, 6), width=st.integers(1, 8))
def test_a_crop_shows_a_part_of_the_padded_image(index, epoch, height, width):
    crop = one("random-crop", size=[height, width], padding=1, fill=-1.0, mask_fill=255)
    image, mask = crop(Sample(IMAGE, MASK), epoch=epoch, index=index)
    padded = torch.nn.functional.pad(IMAGE, (1, 1, 1, 1), value=-1.0)
    padded_mask = torch.nn.functional.pad(MASK, (1, 1, 1, 1), value=255)
    places = [
        (top, left)
        for top in range(6 - height + 1)
        for left in range(8 - width + 1)
        if torch.equal(padded[:, top : top + height, left : left + width], image)
        and torch.equal(padded_mask[top : top + height, left : left + width], mask)
    ]
    assert places
    assert_boxes_enclose(crop(with_boxes(IMAGE), epoch=epoch, index=index))


@pytest.mark.parametrize(("name", "args"), [("random-crop", {"padding": 2}), ("translate", {"max_pixels": 2})])
def test_every_shift_within_reach_occurs(name, args):
    shift = one(name, **args)
    image = torch.zeros(1, 5, 5)
    image[0, 2, 2] = 1
    places = {
        tuple(shift(Sample(image, 0), epoch=0, index=index).input[0].nonzero()[0].tolist()) for index in range(400)
    }
    # Of 25 places one is missed in 400 draws once in 400 000 sets of draws.
    assert places == {(row, column) for row in range(5) for column in range(5)}


def test_a_box_of_which_nothing_is_left_goes_with_its_label():
    crop = one("random-crop", size=[2, 2], padding=0)
    counts = set()
    for index in range(50):
        sample = crop(with_boxes(IMAGE), epoch=0, index=index)
        assert len(sample.target["boxes"]) == len(sample.target["labels"])
        assert_boxes_enclose(sample)
        counts.add(tuple(sample.target["labels"].tolist()))
    assert {(), (1,), (2,)} <= counts


def test_noise_has_its_standard_deviation_and_leaves_targets():
    image, mask = one("noise", std=0.5)(Sample(torch.zeros(1, 100, 100), MASK), epoch=0, index=0)
    assert image.std().item() == pytest.approx(0.5, rel=0.04)  # 10 000 draws: ± 0.7 %
    assert mask is MASK
    noisy = one("noise", std=0.5)(Sample(torch.full((8,), 7, dtype=torch.uint8), 0), epoch=0, index=0).input
    assert noisy.dtype == torch.float32


def test_labels_and_values_are_left_alone():
    for target in (torch.tensor(3), torch.tensor([0.5, 1.5]), 7):
        assert transform(*ALL)(Sample(IMAGE, target), epoch=0, index=0).target is target


def test_images_with_more_dimensions_change_in_the_last_two():
    volume = torch.arange(48.0).reshape(1, 2, 4, 6)
    image, mask = one("vertical-flip", probability=1.0)(Sample(volume, volume[0]), epoch=0, index=0)
    assert torch.equal(image, volume.flip(-2))
    assert torch.equal(mask, volume[0].flip(-2))


def test_a_sample_is_a_function_of_seed_epoch_and_number():
    digits = build_dataset(DatasetSpec(factory="builtin:digits"), seed=0).training
    augment = transform(*ALL, seed=5)
    every = {
        (epoch, index): augment(digits.sample(index), epoch=epoch, index=index).input
        for epoch in range(2)
        for index in range(20)
    }
    torch.manual_seed(123)
    again = transform(*ALL, seed=5)
    for epoch, index in reversed(every):  # in another order, by another process as it were
        assert torch.equal(again(digits.sample(index), epoch=epoch, index=index).input, every[epoch, index])
    assert len({image.numpy().tobytes() for image in every.values()}) == 40
    other = transform(*ALL, seed=6)(digits.sample(0), epoch=0, index=0).input
    assert not torch.equal(other, every[0, 0])


def test_nothing_to_do_is_nothing():
    assert transform() is None


def test_two_of_the_same_draw_apart():
    both = transform({"name": "horizontal-flip"}, {"name": "horizontal-flip"})
    results = [torch.equal(both(Sample(IMAGE, 0), epoch=0, index=index).input, IMAGE) for index in range(200)]
    assert 0.3 < np.mean(results) < 0.7  # if they drew the same, the second would always undo the first


def test_the_sample_of_the_source_is_left_as_it_is():
    image, mask = IMAGE.clone(), MASK.clone()
    for index in range(20):
        transform(*ALL)(Sample(image, mask), epoch=0, index=index)
    assert torch.equal(image, IMAGE)
    assert torch.equal(mask, MASK)


@pytest.mark.parametrize("name", ["horizontal-flip", "random-crop", "translate"])
def test_what_is_no_image_is_refused(name):
    with pytest.raises(BadSample, match=r"augmentation\.0: inputs of shape \(64,\) are no images"):
        one(name)(Sample(torch.zeros(64), 0), epoch=0, index=0)


def test_a_crop_larger_than_the_image_is_refused():
    with pytest.raises(BadSample, match=r"augmentation\.0\.args\.size: 9 is more than the height .* 4 \+ 2·1"):
        one("random-crop", size=[9, 2], padding=1)(Sample(IMAGE, 0), epoch=0, index=0)


class TestOwn:
    @pytest.fixture
    def own(self, monkeypatch):
        def build(function, **args):
            module = ModuleType("my_augmentations")
            module.make = function
            monkeypatch.setitem(sys.modules, "my_augmentations", module)
            return transform({"name": "noise"}, {"factory": "my_augmentations:make", "args": args})

        return build

    def test_it_is_called_with_a_generator_of_its_own(self, own):
        def make(scale):
            return lambda sample, generator: (
                sample.input * 0 + scale * torch.rand((), generator=generator),
                sample.target,
            )

        augment = own(make, scale=2.0)
        sample = augment(Sample(IMAGE, 3), epoch=1, index=4)
        assert sample.target == 3
        assert 0 < sample.input[0, 0, 0] < 2
        assert torch.equal(sample.input, augment(Sample(IMAGE, 3), epoch=1, index=4).input)
        assert not torch.equal(sample.input, augment(Sample(IMAGE, 3), epoch=2, index=4).input)

    @pytest.mark.parametrize("made", [None, lambda sample, generator: None, lambda sample, generator: (1, 2)])
    def test_anything_else_is_refused(self, own, made):
        with pytest.raises(BadFactory, match=r"augmentation\.1\.factory: "):
            own(lambda: made)(Sample(IMAGE, 0), epoch=0, index=0)

    def test_what_it_draws_from_shared_generators_is_keyed_too(self, own):
        def draw(sample, generator):
            own_draw = torch.rand((), generator=generator, dtype=torch.float64)
            draws = [random.random(), np.random.rand(), float(torch.rand((), dtype=torch.float64)), float(own_draw)]
            return torch.tensor(draws), sample.target

        augment = own(lambda: draw)
        torch.manual_seed(0)
        expected = torch.rand(2)
        torch.manual_seed(0)
        found = torch.rand(1)
        draws = {place: augment(Sample(IMAGE, 0), epoch=place[0], index=place[1]).input for place in ((0, 1), (1, 0))}
        assert torch.equal(torch.cat([found, torch.rand(1)]), expected)  # the model's draws are left alone
        assert len(torch.cat(list(draws.values())).unique()) == 8  # not one generator as another, nor sample as sample
        for (epoch, index), values in reversed(draws.items()):
            assert torch.equal(augment(Sample(IMAGE, 0), epoch=epoch, index=index).input, values)

    def test_a_thread_does_not_apply_it(self, own):
        assert not own(lambda: lambda sample, generator: sample).reads_ahead
        assert transform(*ALL).reads_ahead
