"""What a training loop of the user's own is called with. A failure means that it ends the attempt where it need not, or
that the service takes the blame for what the loop did.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from service.domain.rank_protocol import Staged
from service.training.checkpoint_delivery import CheckpointDelivery
from service.training.checkpoint_writer import CheckpointWriter
from service.training.checkpoints import read_checkpoint
from service.training.errors import BadFactory
from service.training.user_loop import TrainingContext
from tests.unit.training.checkpoint_examples import rank_task


@pytest.fixture
def task(tmp_path):
    return rank_task(tmp_path)


@pytest.fixture
def writer(task):
    with CheckpointWriter(task) as writer:
        yield writer


@pytest.fixture
def sent():
    """What was sent to the rank actor."""
    return []


@pytest.fixture
def context(task, sent, writer):
    channel = SimpleNamespace(send=sent.append, send_soon=sent.append)
    world = SimpleNamespace(rank=0, size=1, device=torch.device("cpu"))
    return TrainingContext(task, channel, world, writer, CheckpointDelivery(writer, channel, "continue"))


def test_a_step_is_saved_once(context, sent, writer):
    for step in (1, 2):
        context.report(step, {"train/loss": 1.0 / step})
        for value in (step, 7):
            context.save({"weight": torch.full((2,), float(value))})
    staged = [message for message in [*sent, *writer.outcomes(wait=True)] if isinstance(message, Staged)]
    assert [(one.step, dict(one.metrics)) for one in staged] == [(1, {"train/loss": 1.0}), (2, {"train/loss": 0.5})]
    models = [read_checkpoint(Path(one.directory), job_id="job").model["weight"] for one in staged]
    assert torch.equal(torch.stack(models), torch.tensor([[1.0, 1.0], [2.0, 2.0]]))


@pytest.mark.parametrize("state", [{"seen": {1, 2}}, {"rows": [{"seen": {3}}]}])
def test_a_state_that_cannot_be_kept_is_the_loop_s_fault(context, state):
    context.report(1, {})
    with pytest.raises(BadFactory, match=r"^train_function: context\.save .* state\.\S*seen is a builtins\.set"):
        context.save({"weight": torch.ones(2)}, state)
