"""What is decided beside the steps: when to stop early, how far to scale a loss, how noisy the gradient is. A failure
here is a decision that is wrong or forgotten over a checkpoint."""

import math

import pytest
import torch
from torch import nn

from service.domain.spec import EarlyStoppingSpec
from service.training.optimization import GradientNoise, LossScaler, Patience
from service.training.optimization.gradient_noise import PartGradients, signal_and_noise, watched_gradients
from service.training.optimization.gradient_norms import gradient_norms


def early_stopping(**changes):
    return EarlyStoppingSpec.model_validate({"metric": "eval/loss", "mode": "min", "patience": 2, **changes})


@pytest.mark.parametrize(
    ("changes", "metric", "expected"),
    [
        ({}, [3, 2, 2, 2], [0, 0, 1, 2]),
        ({}, [3, 4, 2, 2.5], [0, 1, 0, 1]),
        ({"mode": "max"}, [3, 2, 4, 4], [0, 1, 0, 1]),
        ({"min_delta": 0.5}, [3, 2.6, 2.5, 2.4], [0, 1, 2, 0]),  # more than min_delta, and against the best
        ({}, [math.nan, 3, math.nan, -math.inf], [1, 0, 1, 2]),
    ],
)
def test_evaluations_since_the_best(changes, metric, expected):
    spec, patience, since = early_stopping(**changes), Patience(), []
    for value in metric:
        patience = Patience.from_state_dict(patience.after(value, spec).state_dict())
        since.append(patience.evaluations_since_best)
        assert patience.is_over(spec) == (since[-1] >= 2)
    assert since == expected


def one_rank(values):
    return values


def test_the_scale_is_that_of_torch():
    ours = LossScaler(initial_scale=2.0**10, growth_interval=3)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    theirs.scale(torch.ones(()))  # it makes its scale on the first use
    for step in range(20):
        overflows = step in (2, 3, 9, 17)
        gradient = torch.full((4,), 0.1) * ours.scale
        gradient[1] = float("inf") if overflows and step % 2 else gradient[1]
        gradient[2] = float("nan") if overflows and not step % 2 else gradient[2]
        weight.grad = gradient.clone()
        theirs.step(optimizer)
        theirs.update()
        assert ours.unscale_([gradient], world_sum=one_rank) == (not overflows)
        if not overflows:
            assert torch.equal(gradient, torch.full((4,), 0.1))  # powers of two round nothing
        ours.update(is_finite=not overflows)
        assert ours.scale == theirs.get_scale()


def test_a_scale_below_one_is_exhausted():
    scaler = LossScaler(initial_scale=2.0)
    for expected in (False, True):
        scaler.update(is_finite=False)
        assert scaler.is_exhausted == expected


def test_a_resumed_scaler_goes_on():
    scaler = LossScaler(growth_interval=2)
    scaler.update(is_finite=False)
    scaler.update(is_finite=True)
    resumed = LossScaler(growth_interval=2)
    resumed.load_state_dict(scaler.state_dict())
    resumed.update(is_finite=True)
    assert resumed.state_dict() == {"scale": 2.0**16, "steps_since_overflow": 0}


def test_two_sizes_of_batch_tell_signal_from_noise():
    # Expected squared norms for ‖G‖² = 3 and tr(Σ) = 10, of parts of 3, 3 and 2 samples.
    sizes = (3, 3, 2)
    parts = PartGradients(
        num_parts=3, squared_norms=sum(3 + 10 / size for size in sizes), inverse_sizes=sum(1 / size for size in sizes)
    )
    assert signal_and_noise(parts, num_samples=8, squared_norm=3 + 10 / 8) == pytest.approx((3, 10))


def test_the_noise_scale_of_known_gradients():
    # Gradients of samples are normal about G, so tr(Σ)/‖G‖² = 40 · 0.25 / 10 = 1.
    generator = torch.Generator().manual_seed(0)
    mean = torch.full((40,), 0.5, dtype=torch.float64)
    noise = GradientNoise(decay=0.99)
    assert noise.metrics == {}
    for _ in range(400):
        samples = mean + 0.5 * torch.randn(8, 40, generator=generator, dtype=torch.float64)
        squares = [part.mean(dim=0).square().sum().item() for part in samples.split((3, 3, 2))]
        parts = PartGradients(num_parts=3, squared_norms=sum(squares), inverse_sizes=1 / 3 + 1 / 3 + 1 / 2)
        noise.observe(parts, num_samples=8, squared_norm=samples.mean(dim=0).square().sum().item())
        resumed = GradientNoise(decay=0.99)
        resumed.load_state_dict(noise.state_dict())
        noise = resumed
    # The mean of about 200 steps, each of which is off by some 0.3 of the noise and 0.15 of the signal: 0.03 together.
    assert noise.metrics["gradient_noise_scale"] == pytest.approx(1.0, rel=0.1)
    assert noise.metrics["gradient_noise_scale"] == noise.scale
    assert noise.metrics["gradient_signal"] == pytest.approx(10, rel=0.1)


def test_a_noise_scale_that_chance_made_negative_is_not_told():
    noise = GradientNoise()
    noise.observe(PartGradients(num_parts=1, squared_norms=1.0, inverse_sizes=0.5), num_samples=4, squared_norm=2.0)
    assert noise.scale is None
    assert set(noise.metrics) == {"gradient_signal", "gradient_noise"}


def test_watched_gradients_are_those_of_one_backward():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    inputs = torch.randn(4, 3)
    model(inputs).sum().backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    with watched_gradients(model) as squares:
        (2 * model(inputs).sum()).backward()
    expected = 4 * sum(float(gradient.double().square().sum()) for gradient in before)
    assert float(sum(squares)) == pytest.approx(expected, rel=1e-6)  # norms in float32
    model(inputs).sum().backward()
    assert len(squares) == 4


def test_gradient_norms_of_parts():
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(2))
    model.body = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.unused = nn.Linear(1, 1)
    for parameter in (model.scale, *model.body.parameters()):
        parameter.grad = torch.full_like(parameter, 2.0)
    norms = {name: float(norm) for name, norm in gradient_norms(model).items()}
    assert norms == pytest.approx({"gradient_norm/self": math.sqrt(8), "gradient_norm/body": math.sqrt(48)}, rel=1e-6)
