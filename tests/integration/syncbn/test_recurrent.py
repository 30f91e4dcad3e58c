"""One layer called at every time step, as batch-normalized recurrent networks do, on ranks against the whole batch.

Forwards and backwards of many calls are in flight at once here; a hang means that ranks ran them in different orders.
"""

import pytest
import torch
from torch import nn

from syncbn import SyncBatchNorm
from tests.integration.syncbn.whole_batch import draw
from tests.ranks import run_ranks

FEATURES, STEPS = 4, 5


class Recurrent(nn.Module):
    def __init__(self, cell: str, norm: type[nn.Module]):
        super().__init__()
        torch.manual_seed(0)
        self.cells = nn.ModuleList(getattr(nn, cell)(FEATURES, FEATURES) for _ in range(2))
        self.norm = norm(FEATURES, momentum=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, N, F) -> (N, F), with one norm for all time steps."""
        states = [None, None]
        for x_t in x:
            states[0] = self.cells[0](x_t, states[0])
            hidden = states[0][0] if isinstance(states[0], tuple) else states[0]
            states[1] = self.cells[1](self.norm(hidden), states[1])
        return states[1][0] if isinstance(states[1], tuple) else states[1]


def _run(rank, cell, inputs, grads, norm=SyncBatchNorm):
    model = Recurrent(cell, norm).double()
    x = inputs[rank].requires_grad_()
    y = model(x.transpose(0, 1))
    y.backward(grads[rank])
    return y.detach(), x.grad, [p.grad for p in model.parameters()], dict(model.named_buffers())


@pytest.mark.parametrize("cell", ["RNNCell", "LSTMCell"])
@pytest.mark.parametrize("split", [[3, 2], [4, 0, 1]], ids=str)
def test_every_time_step_is_normalized_over_all_ranks(cell, split):
    inputs, grads = draw([(n, STEPS, FEATURES) for n in split], 0), draw([(n, FEATURES) for n in split], 1)
    y, dx, parameters, buffers = _run(0, cell, [torch.cat(inputs)], [torch.cat(grads)], nn.BatchNorm1d)
    results = run_ranks(len(split), _run, cell, inputs, grads)
    exact = {"rtol": 1e-10, "atol": 1e-11}  # float64 through five steps
    torch.testing.assert_close(torch.cat([r[0] for r in results]), y, **exact)
    torch.testing.assert_close(torch.cat([r[1] for r in results]), dx, **exact)
    for at, grad in enumerate(parameters):
        torch.testing.assert_close(sum(r[2][at] for r in results), grad, **exact)
    for result in results:
        assert result[3]["norm.num_batches_tracked"] == STEPS
        for name, value in buffers.items():
            torch.testing.assert_close(result[3][name], value, **exact)
