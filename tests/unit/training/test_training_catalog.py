"""The catalog names what this package builds, no more and no less, and the builtin things are what they say."""

import pytest
import torch
from torch import nn

from service.domain import catalog
from service.domain.spec import ModelSpec, NormSpec
from service.training.data import DATASET_BUILDERS
from service.training.models import build_model
from service.training.models.builders import MODEL_BUILDERS
from service.training.norm import configure_norm
from syncbn import SyncBatchNorm


def test_every_name_of_the_catalog_has_a_builder():
    assert MODEL_BUILDERS.keys() == catalog.MODELS.keys()
    assert DATASET_BUILDERS.keys() == catalog.DATASETS.keys()


SHAPES = {"builtin:recurrent": (3, 8), "builtin:unet3d": (1, 8, 8, 8)}


@pytest.mark.parametrize("factory", sorted(MODEL_BUILDERS))
def test_a_model_is_the_same_wherever_it_is_built(factory):
    def build(seed):
        return build_model(
            ModelSpec(factory=factory),
            input_shape=SHAPES.get(factory, (1, 8, 8)),
            num_outputs=10,
            task=min(catalog.MODELS[factory].tasks),
            seed=seed,
        )

    torch.manual_seed(1)
    first = build(3)
    torch.manual_seed(2)
    torch.testing.assert_close(build(3).state_dict(), first.state_dict(), rtol=0, atol=0)
    assert not torch.equal(next(build(4).parameters()), next(first.parameters()))


def test_stages_halve_the_image_and_double_the_channels():
    spec = ModelSpec(factory="builtin:small-resnet", args={"width": 4, "blocks_per_stage": [2, 1, 1]})
    model = build_model(spec, input_shape=(3, 16, 16), num_outputs=7, task="classification", seed=0)
    features = model.blocks(model.stem(torch.zeros(2, 3, 16, 16)))
    assert features.shape == (2, 16, 4, 4)
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules()) == 8


@pytest.mark.parametrize(("kind", "expected"), [("sync", SyncBatchNorm), ("local", nn.BatchNorm1d)])
def test_norms_become_what_the_specification_says(kind, expected):
    model = build_model(
        ModelSpec(factory="builtin:mlp"), input_shape=(1, 8, 8), num_outputs=10, task="classification", seed=0
    )
    names = list(model.state_dict())
    norm = NormSpec(kind=kind, momentum=0.3, eps=1e-3)
    layers = [layer for layer in configure_norm(model, norm).modules() if isinstance(layer, expected)]
    assert [(layer.momentum, layer.eps) for layer in layers] == [(0.3, 1e-3)] * 2
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("norm", [NormSpec(), NormSpec(skip_nonfinite=False)], ids=str)
def test_a_batch_with_a_nan_poisons_the_running_statistics_only_if_that_is_asked_for(norm):
    spec = ModelSpec(factory="builtin:mlp", args={"hidden_sizes": [4]})
    model = configure_norm(build_model(spec, input_shape=(1, 2, 2), num_outputs=2, task="classification", seed=0), norm)
    layer = next(layer for layer in model.modules() if isinstance(layer, SyncBatchNorm))
    output = model(torch.full((2, 1, 2, 2), torch.nan))
    assert output.isnan().all()
    assert layer.running_mean.isfinite().all() == norm.skip_nonfinite
