"""Dropout whose masks belong to the normalization batch.

If parts do not make up the whole, worlds train on different masks; if a repeated forward differs from the first one,
activation checkpointing gives a gradient of another function; if frequencies or moments are off, it is no dropout.
"""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from service.training.dropout import DropoutContext, share_dropout
from service.training.errors import BadFactory

KINDS = {
    nn.Dropout: (4,),
    nn.Dropout1d: (6, 5),
    nn.Dropout2d: (6, 4, 3),
    nn.Dropout3d: (6, 2, 3, 2),
    nn.AlphaDropout: (4,),
    nn.FeatureAlphaDropout: (6, 4, 3),
}
BY_CHANNEL = {nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout}


def _shared(model, seed=0):
    context = DropoutContext(seed=seed)
    share_dropout(model, context)
    return context


def _outputs(layer, context, inputs, splits, *, step=0, batch=0, rows=1):
    """What ranks with so many samples each get from a layer, put together."""
    outputs, first = [], 0
    for count in splits:
        context.begin(step=step, batch=batch, num_samples=sum(splits), first=first, count=count)
        outputs.append(layer(inputs[first * rows : (first + count) * rows]))
        first += count
    return torch.cat(outputs)


@pytest.mark.parametrize("kind", KINDS)
@given(splits=st.lists(st.integers(1, 5), min_size=1, max_size=5), p=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]))
def test_no_split_over_ranks_changes_a_mask(kind, splits, p):
    layer = kind(p)
    context = _shared(layer)
    inputs = torch.randn(sum(splits), *KINDS[kind], generator=torch.Generator().manual_seed(1))
    whole = _outputs(layer, context, inputs, [sum(splits)])
    assert torch.equal(_outputs(layer, context, inputs, splits), whole)
    assert not context.misfits


@given(splits=st.lists(st.integers(1, 4), min_size=1, max_size=4), rows=st.integers(1, 3))
def test_values_of_a_sample_may_lie_in_several_rows(splits, rows):
    layer = nn.Dropout(0.5)
    context = _shared(layer)
    inputs = torch.ones(sum(splits) * rows, 3)
    whole = _outputs(layer, context, inputs, [sum(splits)], rows=rows)
    assert torch.equal(_outputs(layer, context, inputs, splits, rows=rows), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_and_moments_are_those_of_torch(kind):
    p, torch_layer = 0.3, kind(0.3)
    layer = kind(p)
    context = _shared(layer)
    inputs = torch.randn(4000, *KINDS[kind], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = _outputs(layer, context, inputs, [4000])
    expected = torch_layer(inputs)
    # At least 16 000 masks: a share of 0.3 is known to 0.004, a mean of what it makes to 0.02; five times that.
    if kind in (nn.AlphaDropout, nn.FeatureAlphaDropout):
        assert abs(float(found.mean())) < 0.1  # what they keep, of standard normal values
        assert abs(float(found.var()) - 1) < 0.2
        value, _ = found.flatten().mode()
        assert float(value) == pytest.approx(float(expected.flatten().mode().values))
        dropped = found == value
    else:
        dropped = found == 0
        torch.testing.assert_close(found[~dropped], inputs[~dropped] / (1 - p))
    assert float(dropped.double().mean()) == pytest.approx(p, abs=0.02)
    by_channel = dropped.flatten(2) if dropped.ndim > 2 else dropped[..., None]
    if kind in BY_CHANNEL:
        assert torch.equal(by_channel.all(-1), by_channel.any(-1))
    assert len(by_channel.any(-1).unique(dim=0)) > 1, "every sample has the same mask"


def test_steps_batches_layers_calls_and_seeds_have_masks_of_their_own():
    first, second = nn.Dropout(0.5), nn.Dropout(0.5)
    model = nn.Sequential(first, second)
    inputs = torch.ones(4, 64)
    masks = set()
    for seed, step, batch in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        context = _shared(model, seed)
        context.begin(step=step, batch=batch, num_samples=4, first=0, count=4)
        masks |= {tuple(layer(inputs).flatten().tolist()) for layer in (first, second, first)}
    assert len(masks) == 12


def test_the_same_step_has_the_same_masks_again():
    layer = nn.Dropout(0.5)
    context = _shared(layer)
    inputs = torch.ones(4, 64)
    first = _outputs(layer, context, inputs, [4], step=7)
    _outputs(layer, context, inputs, [4], step=8)
    torch.manual_seed(123)  # whatever else was drawn meanwhile
    assert torch.equal(_outputs(layer, context, inputs, [4], step=7), first)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_and_a_probability_of_zero_change_nothing_and_draw_nothing(kind):
    inputs = torch.randn(3, *KINDS[kind])
    for layer in (kind(0.5).eval(), kind(0.0)):
        _shared(layer)
        before = torch.get_rng_state()
        assert layer(inputs) is inputs
        assert torch.equal(torch.get_rng_state(), before)


def test_in_place_is_in_place():
    layer = nn.Dropout(0.5, inplace=True)
    context = _shared(layer)
    inputs = torch.ones(8, 8)
    outputs = _outputs(layer, context, inputs, [8])
    assert torch.equal(inputs, outputs)
    assert set(inputs.unique().tolist()) == {0.0, 2.0}


def test_modules_stay_the_same_objects_and_subclasses_as_they_are():
    class Own(nn.Dropout):
        pass

    plain, own = nn.Dropout(0.5), Own(0.5)
    model = nn.Sequential(plain, own, nn.Linear(2, 2))
    names = list(model.state_dict())
    _shared(model)
    assert (model[0], model[1]) == (plain, own)
    assert isinstance(plain, nn.Dropout)
    assert type(own) is Own
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("splits", [[4], [3, 1]])
def test_a_repeated_forward_has_the_masks_of_the_first_one(use_reentrant, splits):
    # Two layers, one of them twice, so that calls have to be told apart; none of them linear in the masks.
    drop = nn.Dropout(0.5)
    model = nn.Sequential(nn.Linear(8, 8), drop, nn.Tanh(), nn.Dropout(0.5), nn.Tanh(), drop, nn.Linear(8, 1)).double()
    context = _shared(model)
    inputs = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    gradients = []
    for run in (model, lambda part: checkpoint(model, part, use_reentrant=use_reentrant)):
        model.zero_grad()
        first = 0
        for count in splits:
            context.begin(step=0, batch=0, num_samples=4, first=first, count=count)
            run(inputs[first : first + count]).sum().backward()
            first += count
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_a_repeated_forward_that_cannot_know_its_masks_is_refused_with_a_remedy_that_works():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    context = _shared(model)
    inputs = torch.randn(4, 8, requires_grad=True)
    for preserve, fails in ((False, True), (True, False)):
        context.begin(step=0, batch=0, num_samples=4, first=0, count=4)
        loss = checkpoint(model, inputs, use_reentrant=False, preserve_rng_state=preserve).sum()
        if not fails:
            loss.backward()
            continue
        with pytest.raises(BadFactory, match=r"^model: 1 is dropout .* preserve_rng_state=True"):
            loss.backward()


def test_values_that_are_not_laid_out_by_samples_are_noticed():
    model = nn.Sequential(nn.Dropout(0.5))
    context = _shared(model)
    for first in (0, 4):
        context.begin(step=0, batch=0, num_samples=8, first=first, count=4)
        assert model(torch.ones(3, 4)).shape == (3, 4)
    assert context.misfits == {"0"}


DRAWS = {
    "torch": lambda: torch.randn(2),
    "numpy": lambda: np.random.standard_normal(2),
    "python": random.random,
    "functional dropout": lambda: nn.functional.dropout(torch.ones(4)),
}


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("place", ["before", "between", "after"])
def test_what_something_else_draws_is_noticed(draw, place):
    layers = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
    context = _shared(layers)
    context.begin(step=0, batch=0, num_samples=4, first=0, count=4)
    with context.watching() as drew_others:
        for where, layer in (("before", layers[0]), ("between", layers[1]), ("after", None)):
            if place == where:
                DRAWS[draw]()
            if layer is not None:
                layer(torch.ones(4, 4))
        assert drew_others()


def test_what_the_layers_draw_is_not_taken_for_something_else():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Tanh(), nn.Dropout(0.5))
    context = _shared(model)
    for run in (model, lambda inputs: checkpoint(model, inputs, use_reentrant=False)):
        context.begin(step=0, batch=0, num_samples=4, first=0, count=4)
        with context.watching() as drew_others:
            run(torch.ones(4, 4)).sum().backward()
            assert not drew_others()
