"""The catalog names what this package builds, no more and no less, and the builtin things are what they say."""

import pytest
import torch
from torch import nn

from service.domain import catalog
from service.domain.spec import DatasetSpec, ModelSpec, NormSpec
from service.training.datasets import DATASET_BUILDERS, build_dataset
from service.training.models import MODEL_BUILDERS, build_model, configure_norm
from syncbn import SyncBatchNorm


def test_every_name_of_the_catalog_has_a_builder():
    assert MODEL_BUILDERS.keys() == catalog.MODELS.keys()
    assert DATASET_BUILDERS.keys() == catalog.DATASETS.keys()


@pytest.mark.parametrize("factory", sorted(MODEL_BUILDERS))
def test_a_model_is_the_same_wherever_it_is_built(factory):
    spec = ModelSpec(factory=factory)
    torch.manual_seed(1)
    first = build_model(spec, input_shape=(1, 8, 8), num_classes=10, seed=3)
    torch.manual_seed(2)
    second = build_model(spec, input_shape=(1, 8, 8), num_classes=10, seed=3)
    other = build_model(spec, input_shape=(1, 8, 8), num_classes=10, seed=4)
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))
    assert first(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_stages_halve_the_image_and_double_the_channels():
    spec = ModelSpec(factory="builtin:small-resnet", args={"width": 4, "blocks_per_stage": [2, 1, 1]})
    model = build_model(spec, input_shape=(3, 16, 16), num_classes=7, seed=0)
    features = model.blocks(model.stem(torch.zeros(2, 3, 16, 16)))
    assert features.shape == (2, 16, 4, 4)
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules()) == 8


@pytest.mark.parametrize(("kind", "expected"), [("sync", SyncBatchNorm), ("local", nn.BatchNorm1d)])
def test_norms_become_what_the_specification_says(kind, expected):
    model = build_model(ModelSpec(factory="builtin:mlp"), input_shape=(1, 8, 8), num_classes=10, seed=0)
    names = list(model.state_dict())
    norm = NormSpec(kind=kind, momentum=0.3, eps=1e-3)
    layers = [layer for layer in configure_norm(model, norm).modules() if isinstance(layer, expected)]
    assert [(layer.momentum, layer.eps) for layer in layers] == [(0.3, 1e-3)] * 2
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("norm", [NormSpec(), NormSpec(skip_nonfinite=False)], ids=str)
def test_a_batch_with_a_nan_poisons_the_running_statistics_only_if_that_is_asked_for(norm):
    spec = ModelSpec(factory="builtin:mlp", args={"hidden_sizes": [4]})
    model = configure_norm(build_model(spec, input_shape=(1, 2, 2), num_classes=2, seed=0), norm)
    layer = next(layer for layer in model.modules() if isinstance(layer, SyncBatchNorm))
    output = model(torch.full((2, 1, 2, 2), torch.nan))
    assert output.isnan().all()
    assert layer.running_mean.isfinite().all() == norm.skip_nonfinite


@pytest.mark.parametrize("factory", sorted(DATASET_BUILDERS))
def test_a_dataset_has_as_many_training_samples_as_the_catalog_says(factory):
    spec = DatasetSpec(factory=factory)
    assert len(build_dataset(spec).training) == catalog.num_training_samples(spec.factory, spec.args)


def test_digits_are_the_real_ones_standardized_by_the_training_split():
    from sklearn.datasets import load_digits

    dataset = build_dataset(DatasetSpec(factory="builtin:digits", args={"test_fraction": 0.25, "split_seed": 5}))
    assert len(dataset.held_out) == round(1797 * 0.25)
    assert dataset.training.inputs.shape[1:] == (1, 8, 8)
    assert dataset.training.inputs.mean().item() == pytest.approx(0, abs=1e-12)
    assert dataset.training.inputs.std(correction=0).item() == pytest.approx(1)
    inputs = torch.cat([dataset.training.inputs, dataset.held_out.inputs]).flatten(1)
    targets = torch.cat([dataset.training.targets, dataset.held_out.targets])
    # Undo the standardization by the known range, 0 to 16, and compare as sets of (image, digit).
    pixels = ((inputs - inputs.min()) / (inputs.max() - inputs.min()) * 16).round().int()
    found = sorted((*row, target) for row, target in zip(pixels.tolist(), targets.tolist(), strict=True))
    images, digits = load_digits(return_X_y=True)
    assert found == sorted((*map(int, row), int(digit)) for row, digit in zip(images, digits, strict=True))


def test_another_split_seed_holds_other_images_out():
    splits = [build_dataset(DatasetSpec(factory="builtin:digits", args={"split_seed": seed})) for seed in (0, 1)]
    assert not torch.equal(splits[0].held_out.targets, splits[1].held_out.targets)
