"""A task and a checkpoint as training makes them, small."""

import torch
from torch import nn

from service.domain.rank_protocol import RankTask
from service.domain.spec import parse_spec
from service.training.checkpoints import Checkpoint


def rank_task(staging_dir, **changes):
    spec = parse_spec(
        {
            "name": "digits",
            "model": {"factory": "builtin:mlp"},
            "dataset": {"factory": "builtin:digits"},
            "batch": {"size": 16},
            "steps": 3,
        }
    )
    fields = {
        "job_id": "job",
        "attempt": 2,
        "spec": spec,
        "rank": 0,
        "world_size": 3,
        "rendezvous_host": "127.0.0.1",
        "rendezvous_port": 1,
        "rendezvous_fd": None,
        "interface": "lo",
        "num_threads": 1,
        "staging_dir": str(staging_dir),
        "resume_dir": None,
        "collective_timeout_s": 1.0,
        **changes,
    }
    return RankTask(**fields)


class Training:
    """A model with batch norm, an optimizer with momentum, and an average of the weights."""

    def __init__(self, *, width=8):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width), nn.Flatten())
        self.model.append(nn.Linear(width * 36, 10))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.average = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.steps_done = 0

    def step(self):
        self.optimizer.zero_grad()
        self.model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        self.optimizer.step()
        for name, value in self.model.state_dict().items():
            self.average[name].lerp_(value, 0.1) if value.is_floating_point() else self.average[name].copy_(value)
        self.steps_done += 1

    def capture(self):
        """The present state; its tensors are the live ones."""
        return Checkpoint(
            step=self.steps_done,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            state={
                "ema": {"decay": 0.9, "weights": self.average},
                "scaler": {"scale": 65536.0, "growth_tracker": 3},
                "early_stopping": {"best": float("-inf"), "waited": 2, "metric": "eval/loss", "is_over": False},
                "position": [1, (2, None)],
            },
        )


def frozen(value):
    """Copy a state, tensors and all, to compare it later."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(frozen(item) for item in value)
    return value


def assert_same(found, expected, path="state"):
    """Bit by bit."""
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), path
        assert torch.equal(found, expected), path
    elif isinstance(expected, dict):
        assert list(found) == list(expected), path
        for key in expected:
            assert_same(found[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, list | tuple):
        assert type(found) is type(expected), path
        assert len(found) == len(expected), path
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{path}[{index}]")
    else:
        assert type(found) is type(expected), path
        assert found == expected, path
