"""Whole training steps: DistributedDataParallel with SyncBatchNorm on ranks against one process with plain batch norm.

With green single-layer tests a failure here means that the layer and DDP disagree about who averages what.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncbn import convert_sync_batchnorm, revert_sync_batchnorm
from tests.ranks import run_ranks

NUM_STEPS = 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.BatchNorm2d(4, momentum=None),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 8),
        nn.BatchNorm1d(8),
        nn.Linear(8, 3),
    ).double()


def batches(num_samples: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(num_samples, 2, 9, 9, generator=generator, dtype=torch.float64)
            + torch.arange(num_samples).double().view(-1, 1, 1, 1),
            torch.randint(3, (num_samples,), generator=generator),
        )
        for _ in range(NUM_STEPS)
    ]


def train(model: nn.Module, steps: list[tuple[torch.Tensor, torch.Tensor]], scale: float) -> list[float]:
    """SGD on scale · Σ loss; returns Σ loss of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sums = []
    for x, target in steps:
        loss = nn.functional.cross_entropy(model(x), target, reduction="sum")
        optimizer.zero_grad()
        (scale * loss).backward()
        optimizer.step()
        sums.append(loss.item())
    return sums


def _train_rank(rank, split, synchronized):
    model = network()
    if synchronized:
        convert_sync_batchnorm(model)
    ddp = DistributedDataParallel(model, broadcast_buffers=False)
    steps = [(x.split(split)[rank], target.split(split)[rank]) for x, target in batches(sum(split))]
    # DDP averages over ranks; times the world size it is the sum, so samples weigh the same on every rank.
    losses = train(ddp, steps, scale=len(split) / sum(split))
    return losses, (revert_sync_batchnorm(model) if synchronized else model).state_dict()


def alone(num_samples: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = network()
    losses = train(model, batches(num_samples), scale=1 / num_samples)
    return losses, copy.deepcopy(model.state_dict())


# Reordered float64 sums, through NUM_STEPS steps of a small net: 1e-13 measured, 1e-10 allowed.
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.mark.parametrize("split", [[3, 3], [4, 2], [3, 0, 2], [2, 1, 2, 1]], ids=str)
def test_any_split_trains_the_same_model(split):
    losses, expected = alone(sum(split))
    results = run_ranks(len(split), _train_rank, split, True)
    total = torch.tensor([r[0] for r in results], dtype=torch.float64).sum(0)
    torch.testing.assert_close(total, torch.tensor(losses, dtype=torch.float64), **TOLERANCE)
    for _, state in results:
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def test_control_local_batch_norm_trains_another_model():
    _, expected = alone(6)
    for _, state in run_ranks(2, _train_rank, [3, 3], False):
        assert (state["0.weight"] - expected["0.weight"]).abs().max() > 1e-3
