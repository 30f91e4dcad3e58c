"""The learning rate as a function of the step. A failure here is a schedule that is off, not training that is."""

import pytest

from service.domain.spec import ScheduleSpec
from service.training.optimization import learning_rate_factor


@pytest.mark.parametrize(
    ("schedule", "num_steps", "expected"),
    [
        ({"name": "constant"}, 3, [1, 1, 1]),
        ({"name": "constant", "warmup_steps": 4}, 6, [0.25, 0.5, 0.75, 1, 1, 1]),
        ({"name": "cosine"}, 5, [1, 0.8535533905932737, 0.5, 0.14644660940672627, 0]),
        ({"name": "cosine", "final_fraction": 0.2}, 3, [1, 0.6, 0.2]),
        ({"name": "cosine", "warmup_steps": 2}, 4, [0.5, 1, 0.5, 0]),
        ({"name": "cosine", "warmup_steps": 2}, 2, [0.5, 1]),
        ({"name": "cosine"}, 1, [1]),
        ({"name": "linear"}, 5, [1, 0.75, 0.5, 0.25, 0]),
        ({"name": "linear", "final_fraction": 0.2, "warmup_steps": 2}, 4, [0.5, 1, 0.6, 0.2]),
        ({"name": "polynomial", "power": 2}, 5, [1, 0.5625, 0.25, 0.0625, 0]),
        (
            {"name": "polynomial", "power": 0.5, "final_fraction": 0.5},
            5,
            [1, 0.9330127018922193, 0.8535533905932737, 0.75, 0.5],
        ),
        ({"name": "polynomial", "warmup_steps": 1}, 1, [1]),
        ({"name": "step", "milestones": [2, 3], "gamma": 0.5}, 5, [1, 1, 0.5, 0.25, 0.25]),
        ({"name": "step", "milestones": [1, 3], "gamma": 0.1, "warmup_steps": 2}, 5, [0.5, 1, 0.1, 0.01, 0.01]),
    ],
)
def test_factors(schedule, num_steps, expected):
    spec = ScheduleSpec.model_validate(schedule)
    factors = [learning_rate_factor(spec, step=step, num_steps=num_steps) for step in range(num_steps)]
    assert factors == pytest.approx(expected, abs=1e-15)
