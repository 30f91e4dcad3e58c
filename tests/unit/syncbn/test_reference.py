"""The truth itself, against torch.nn in one process: if this fails, no other comparison of the library counts."""

import torch
from torch import nn

from syncbn.reference import reference_batch_norm


def test_the_reference_is_batch_norm_of_the_concatenated_batch():
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(3, momentum=0.3).double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = torch.randn(6, 3, 4, 5, dtype=torch.float64) + 2
    dy = torch.randn_like(x)
    splits = [2, 0, 3, 1]
    truth = reference_batch_norm(
        x.split(splits), dy.split(splits), layer.weight, layer.bias, layer.running_mean, layer.running_var, momentum=0.3
    )

    x.requires_grad_()
    y = layer(x)
    y.backward(dy)
    exact = {"rtol": 1e-12, "atol": 1e-12}  # float64, sums in another order
    torch.testing.assert_close(torch.cat(truth.outputs), y.detach(), **exact)
    torch.testing.assert_close(torch.cat(truth.grad_inputs), x.grad, **exact)
    torch.testing.assert_close(sum(truth.grad_weights), layer.weight.grad, **exact)
    torch.testing.assert_close(sum(truth.grad_biases), layer.bias.grad, **exact)
    torch.testing.assert_close(truth.running_mean, layer.running_mean, **exact)
    torch.testing.assert_close(truth.running_var, layer.running_var, **exact)
