"""The layer as one operator that meets its peers in shared memory.

It has to be the same as its steps one by one, to the last bit, with the same errors, out of the forward and out of
autograd. A failure here means that what is fast is not what is tested.
"""

import pytest
import torch
import torch.distributed as dist

from syncbn import ArgumentError, DivergenceError, SyncBatchNorm, functional
from syncbn.kernels import native as native_kernels
from tests.ranks import run_ranks

CHANNELS = 6
FORMS = {
    "plain": {},
    "relu": {"activation": "relu"},
    "silu": {"activation": "silu"},
    "without weights": {"affine": False},
    "cumulative": {"momentum": None},
}


def _train(rank, options, with_residual, at_once):
    """Three steps; each rank has a batch of another size."""
    taken = []
    if at_once:
        original = native_kernels.layer
    else:
        meetings, functional.meetings_in_shared_memory = functional.meetings_in_shared_memory, lambda *_: None
    try:
        if at_once:
            native_kernels.layer = lambda *arguments: taken.append(arguments[-1]) or original(*arguments)
        torch.manual_seed(rank)
        layer = SyncBatchNorm(CHANNELS, **options)
        results = []
        for _ in range(3):
            x = torch.randn(2 + rank, CHANNELS, 5, requires_grad=True)
            residual = torch.randn_like(x).requires_grad_() if with_residual else None
            y = layer(x, residual=residual) if with_residual else layer(x)
            inputs = [tensor for tensor in (x, residual, *layer.parameters()) if tensor is not None]
            results += [y.detach(), *torch.autograd.grad(y, inputs, torch.randn_like(y))]
        assert (len(taken) == 3 and all(taken)) == at_once
        return [*results, *layer.state_dict().values()]
    finally:
        if at_once:
            native_kernels.layer = original
        else:
            functional.meetings_in_shared_memory = meetings


@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("form", FORMS)
def test_it_computes_what_its_steps_compute(form, with_residual):
    for at_once, step_by_step in zip(
        run_ranks(2, _train, FORMS[form], with_residual, True),
        run_ranks(2, _train, FORMS[form], with_residual, False),
        strict=True,
    ):
        assert len(at_once) == len(step_by_step)
        assert all(torch.equal(a, b) for a, b in zip(at_once, step_by_step, strict=True))


def _layer(name):
    layer = SyncBatchNorm(CHANNELS)
    layer.name = name
    return layer


def _other_layers(rank):
    layer = _layer(f"layer {rank}")
    with pytest.raises(DivergenceError) as failed:
        layer(torch.randn(2, CHANNELS))
    return str(failed.value)


def test_ranks_in_different_layers_get_an_error_in_the_forward():
    for text in run_ranks(2, _other_layers):
        for rank in range(2):
            assert f"rank {rank} in the forward of layer {rank} (6 channels, torch.float32) with 13 values" in text


def _backwards_in_another_order(rank):
    first, second = _layer("first"), _layer("second")
    outputs = [layer(torch.randn(2, CHANNELS, requires_grad=True)).sum() for layer in (first, second)]
    with pytest.raises(DivergenceError) as failed:
        outputs[rank].backward()
    return str(failed.value)


def test_ranks_in_different_layers_get_an_error_in_the_backward():
    for text in run_ranks(2, _backwards_in_another_order):
        assert "rank 0 in the backward of first (6 channels, torch.float32) with 12 values" in text
        assert "rank 1 in the backward of second (6 channels, torch.float32) with 12 values" in text


def _on_their_own_ways(rank, first_apart):
    """Rank 0 always has a mask, rank 1 is empty, rank 2 holds one value, or like rank 3 takes the operator."""
    layer = SyncBatchNorm(CHANNELS, dtype=torch.float64)
    sizes = [[3, 0, 1, 2], [2, 2, 2, 2]]
    outputs = []
    for apart in (first_apart, not first_apart):
        batches = [
            torch.randn(n, CHANNELS, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
            for n in sizes[0 if apart else 1]
        ]
        x = batches[rank].clone().requires_grad_()
        mask = torch.ones(len(x), 1, dtype=torch.bool) if apart and rank == 0 else None
        y = layer(x) if mask is None else layer(x, mask=mask)
        (y.square() * torch.arange(CHANNELS)).sum().backward()
        outputs.append((batches, y.detach(), x.grad))
    return outputs, layer.running_mean


@pytest.mark.parametrize("first_apart", [True, False])
def test_ranks_meet_whichever_way_each_takes(first_apart):
    ranks = run_ranks(4, _on_their_own_ways, first_apart)
    running_mean = torch.zeros(CHANNELS, dtype=torch.float64)
    for step in range(2):
        batches = ranks[0][0][step][0]
        x = torch.cat(batches).requires_grad_()
        y = torch.nn.functional.batch_norm(x, running_mean, torch.ones_like(running_mean), training=True)
        (y.square() * torch.arange(CHANNELS)).sum().backward()
        torch.testing.assert_close(torch.cat([outputs[step][1] for outputs, _ in ranks]), y.detach())
        torch.testing.assert_close(torch.cat([outputs[step][2] for outputs, _ in ranks]), x.grad)
    assert all(torch.allclose(mean, running_mean) for _, mean in ranks)


def _twice_differentiated_after_the_group_is_gone(rank):
    pair = dist.new_group()
    x = torch.randn(2, CHANNELS, requires_grad=True)
    y = SyncBatchNorm(CHANNELS, process_group=pair)(x).sum()
    dist.destroy_process_group(pair)
    del pair
    with pytest.raises(ArgumentError, match="process_group: it was destroyed"):
        torch.autograd.grad(y, x, create_graph=True)


def test_what_needs_a_group_that_is_gone_says_so():
    run_ranks(2, _twice_differentiated_after_the_group_is_gone)


def _destroyed_in_between(rank):
    y = SyncBatchNorm(CHANNELS)(torch.randn(2, CHANNELS, requires_grad=True)).sum()
    pair = dist.new_group()
    dist.destroy_process_group(pair)
    layer = SyncBatchNorm(CHANNELS, process_group=pair)
    with pytest.raises(ArgumentError, match="process_group: it was destroyed"):
        layer(torch.randn(2, CHANNELS))
    y.backward()  # of the default group, which is still there


def test_a_group_that_was_destroyed_is_refused():
    run_ranks(2, _destroyed_in_between)
