"""The layer inside what people wrap models with: DDP, FSDP2, copies, checkpoints of torch's own layers.

Every wrapped run is compared with one process on the whole batch. With green layer tests a failure here is about who
averages, copies, casts or re-registers what.
"""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from syncbn import SyncBatchNorm, convert_sync_batchnorm
from tests.integration.syncbn.whole_batch import draw
from tests.ranks import run_ranks

STEPS = 3
CLOSE = {"rtol": 1e-10, "atol": 1e-10}  # reordered float64 sums through three small steps


class Network(nn.Module):
    def __init__(self, unused: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3)
        )
        self.norm = nn.BatchNorm2d(4, momentum=None)
        self.unused = nn.BatchNorm2d(4) if unused else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.body(x)).square().mean((1, 2, 3)).exp()


def whole_batch(split, accumulate=1, unused=False):
    """What one process with torch's layers arrives at; `split` and the gradient's scale as in `_ddp`."""
    model = Network(unused).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(accumulate):
            (model(torch.cat(images(split, step, micro))).sum() / sum(split)).backward()
        optimizer.step()
    return model.state_dict()


def images(split, step, micro=0):
    return draw([(n, 2, 7, 7) for n in split], seed=100 * step + micro, spread=1.0)


def assert_same_state(state, expected):
    assert list(state) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def _ddp(rank, split, options, accumulate, unused):
    model = convert_sync_batchnorm(Network(unused).double())
    buffers = {name: (id(b), b.data_ptr()) for name, b in model.named_buffers()}
    ddp = DistributedDataParallel(model, **options)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(accumulate):
            ddp.require_backward_grad_sync = micro == accumulate - 1  # what no_sync() sets
            loss = ddp(images(split, step, micro)[rank]).sum() * len(split) / sum(split)  # DDP averages over ranks
            loss.backward()
        optimizer.step()
    assert buffers == {name: (id(b), b.data_ptr()) for name, b in model.named_buffers()}
    return model.state_dict()


@pytest.mark.parametrize(
    "options",
    [
        {"broadcast_buffers": False},
        {"broadcast_buffers": True},
        {"static_graph": True},
        {"gradient_as_bucket_view": True},
        {"find_unused_parameters": True},
        {"bucket_cap_mb": 1e-5},
    ],
    ids=str,
)
def test_ddp_trains_what_one_process_trains(options):
    split, unused = [3, 2], "find_unused_parameters" in options
    expected = whole_batch(split, unused=unused)
    for state in run_ranks(2, _ddp, split, options, 1, unused):
        assert_same_state(state, expected)


def test_gradients_accumulate_without_ddp_s_synchronization():
    # The layer's own collectives go on; DDP's wait for the last micro-step.
    split = [2, 3]
    expected = whole_batch(split, accumulate=3)
    for state in run_ranks(2, _ddp, split, {}, 3, False):
        assert_same_state(state, expected)


def _no_sync(rank, split):
    ddp = DistributedDataParallel(convert_sync_batchnorm(Network().double()))
    with ddp.no_sync():
        ddp(images(split, 0)[rank]).sum().backward()
    return [p.grad for p in ddp.parameters()]


def test_parameter_gradients_are_each_rank_s_own_part():
    split, model = [2, 3], Network().double()
    model(torch.cat(images(split, 0))).sum().backward()
    results = run_ranks(2, _no_sync, split)
    for at, parameter in enumerate(model.parameters()):
        torch.testing.assert_close(results[0][at] + results[1][at], parameter.grad, **CLOSE)


def _fsdp(rank, split, policy_options):
    model = convert_sync_batchnorm(Network().double())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(**policy_options)
    for layer in (model.body, model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    assert isinstance(model, FSDPModule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        (model(images(split, step)[rank]).sum() * len(split) / sum(split)).backward()
        optimizer.step()
    dtypes = {buffer.dtype for name, buffer in model.named_buffers() if "num_batches" not in name}
    state = {name: v.full_tensor() if hasattr(v, "full_tensor") else v for name, v in model.state_dict().items()}
    return state, dtypes


def test_fsdp2_trains_what_one_process_trains():
    split = [3, 2]
    expected = whole_batch(split)
    for state, dtypes in run_ranks(2, _fsdp, split, {}):
        assert dtypes == {torch.float64}
        assert_same_state(state, expected)


def _fsdp_in_bfloat16(rank, split):
    model = convert_sync_batchnorm(Network())  # float32
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in (model.body, model.norm, model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    seen = {}
    model.norm.register_forward_pre_hook(lambda layer, args: seen.update(weight=layer.weight.dtype))
    model.norm.register_forward_hook(lambda layer, args, out: seen.update(input=args[0].dtype, output=out.dtype))
    model(images(split, 0)[rank].float()).sum().backward()
    grads = [p.grad.full_tensor() for p in model.parameters()]
    assert model.eval()(images(split, 0)[rank].float()).isfinite().all()
    return seen, model.norm.running_mean, model.norm.running_var, grads


def test_fsdp2_with_weights_in_bfloat16_keeps_statistics_in_float32():
    split, narrow = [3, 2], torch.bfloat16
    plain = Network()
    plain(torch.cat(images(split, 0)).float()).sum().backward()
    for seen, running_mean, running_var, grads in run_ranks(2, _fsdp_in_bfloat16, split):
        assert seen == {"input": narrow, "output": narrow, "weight": narrow}
        assert running_mean.dtype == running_var.dtype == torch.float32
        # Two convolutions in bfloat16 before the layer: 2⁻⁸ each, of values of order one.
        torch.testing.assert_close(running_mean, plain.norm.running_mean, rtol=0.05, atol=0.02)
        torch.testing.assert_close(running_var, plain.norm.running_var, rtol=0.05, atol=0.02)
        assert all(grad.isfinite().all() for grad in grads)
        assert grads[0].any()


def _copy_in_ddp(rank, split):
    model = convert_sync_batchnorm(Network().double(), dist.new_group([0, 1]))
    ema = copy.deepcopy(DistributedDataParallel(model).module)
    assert ema.norm.process_group is model.norm.process_group
    assert ema.norm.running_mean.data_ptr() != model.norm.running_mean.data_ptr()
    ema(images(split, 0)[rank])
    assert (model.norm.num_batches_tracked, ema.norm.num_batches_tracked) == (0, 1)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for again in (pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)):
        assert again.norm.process_group is None
        again(images(split, 0)[rank]).sum().backward()
    return True


def test_copies_share_the_group_and_pickles_do_not_hold_it():
    assert run_ranks(2, _copy_in_ddp, [2, 1]) == [True, True]


@pytest.mark.parametrize("other", [nn.BatchNorm2d, nn.SyncBatchNorm])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpoints_of_torch_s_layers_carry_on_here_and_back(other, momentum):
    torch.manual_seed(0)
    theirs = other(4, momentum=momentum, dtype=torch.float64)
    nn.init.normal_(theirs.running_mean)
    theirs.num_batches_tracked.fill_(3)
    ours = SyncBatchNorm(4, momentum=momentum, dtype=torch.float64)
    plain = nn.BatchNorm2d(4, momentum=momentum, dtype=torch.float64)
    buffers = list(ours.buffers())
    ours.load_state_dict(theirs.state_dict())
    plain.load_state_dict(theirs.state_dict())
    assert all(a is b for a, b in zip(buffers, ours.buffers(), strict=True))
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    ours(x)
    plain(x)
    theirs.load_state_dict(ours.state_dict())
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], value, **CLOSE)
    torch.testing.assert_close(theirs.eval()(x), ours.eval()(x), **CLOSE)


def test_a_checkpoint_from_before_the_counter_loads():
    # torch's layers had no num_batches_tracked before version 0.4.1 and fill it in; so does this one.
    state = nn.BatchNorm2d(4).state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    layer = SyncBatchNorm(4)
    layer.load_state_dict(state)
    assert layer.num_batches_tracked == 0


def test_assigned_parameters_and_another_device_are_followed():
    layer = SyncBatchNorm(4, device="meta", skip_nonfinite=True)
    layer.to_empty(device="cpu")
    layer.reset_running_stats()
    layer.num_nonfinite_batches.zero_()
    layer.load_state_dict(nn.BatchNorm2d(4).state_dict(), assign=True)
    layer(torch.randn(3, 4, 2, 2)).sum().backward()
    assert layer.num_batches_tracked == 1
    assert layer.num_nonfinite_batches == 0
    assert layer.weight.grad is not None
