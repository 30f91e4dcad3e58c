"""Which ranks a layer synchronizes over: groups, meshes, this rank alone, and the making of groups.

Data of the ranks differ in their means, so a layer that meets with the wrong ranks is far off.
"""

import copy
import pickle
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from syncbn import SyncBatchNorm, new_sync_group, sync_batch_norm
from syncbn.errors import ArgumentError
from tests.integration.syncbn.whole_batch import draw, leaves, whole_batch_norm
from tests.ranks import run_ranks

CHANNELS = 3
SHAPES = [(2, CHANNELS, 5), (1, CHANNELS, 5), (3, CHANNELS, 5), (2, CHANNELS, 5)]
EXACT = {"rtol": 1e-11, "atol": 1e-11}  # float64, sums in another order


def _step(layer, x, dy):
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad, layer.running_mean.clone()


def assert_parts(results, inputs, grads, parts):
    """Each part's ranks hold what normalizing that part alone gives."""
    for part in parts:
        xs = leaves([inputs[rank] for rank in part])
        whole = whole_batch_norm(xs, None, None)
        torch.autograd.backward(whole.outputs, [grads[rank] for rank in part])
        for rank, x, y in zip(part, xs, whole.outputs, strict=True):
            torch.testing.assert_close(results[rank][0], y.detach(), **EXACT)
            torch.testing.assert_close(results[rank][1], x.grad, **EXACT)
            torch.testing.assert_close(results[rank][2], 0.1 * whole.mean.detach(), **EXACT)


def _in_group_of(rank, inputs, grads, how):
    return _step(
        SyncBatchNorm(CHANNELS, process_group=GROUPS[how](rank), dtype=torch.float64), inputs[rank], grads[rank]
    )


GROUPS = {
    "two halves": lambda rank: [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2],
    "odd and even": lambda rank: [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2],
    "three and one": lambda rank: [dist.new_group([0, 1, 2]), dist.new_group([3])][rank // 3],
    "the default group": lambda _: dist.group.WORLD,
    "nothing": lambda _: None,
    "local": lambda _: "local",
    "a mesh": lambda _: init_device_mesh("cpu", (4,)),
    "rows of a mesh": lambda _: init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))["shard"],
    "columns of a mesh": lambda _: init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))["replicate"],
    "new_sync_group(1)": lambda _: new_sync_group(1),
    "new_sync_group(2)": lambda _: new_sync_group(2),
    "new_sync_group(4)": lambda _: new_sync_group(4),
    "new_sync_group()": lambda _: new_sync_group(),
    "new_sync_group('node')": lambda _: new_sync_group("node"),
}
WHOLE, ALONE, HALVES, PARITY = [[0, 1, 2, 3]], [[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 2], [1, 3]]
PARTS = [
    ("two halves", HALVES),
    ("odd and even", PARITY),
    ("three and one", [[0, 1, 2], [3]]),
    ("the default group", WHOLE),
    ("nothing", WHOLE),
    ("local", ALONE),
    ("a mesh", WHOLE),
    ("rows of a mesh", HALVES),
    ("columns of a mesh", PARITY),
    ("new_sync_group(1)", ALONE),
    ("new_sync_group(2)", HALVES),
    ("new_sync_group(4)", WHOLE),
    ("new_sync_group()", WHOLE),
    ("new_sync_group('node')", WHOLE),
]


@pytest.mark.parametrize(("how", "parts"), PARTS, ids=[how for how, _ in PARTS])
def test_a_layer_meets_the_ranks_of_its_group(how, parts):
    inputs, grads = draw(SHAPES, 0), draw(SHAPES, 1)
    assert_parts(run_ranks(4, _in_group_of, inputs, grads, how), inputs, grads, parts)


def _functional_in_a_mesh(rank, inputs):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))["b"]
    return sync_batch_norm(inputs[rank], None, None, None, None, training=True, process_group=mesh)


def test_the_function_takes_a_mesh_too():
    inputs = draw(SHAPES)
    results = run_ranks(4, _functional_in_a_mesh, inputs)
    for part in HALVES:
        whole = whole_batch_norm([inputs[rank] for rank in part], None, None)
        for rank, y in zip(part, whole.outputs, strict=True):
            torch.testing.assert_close(results[rank], y, **EXACT)


def _whole_mesh(rank, names):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    with pytest.raises(ArgumentError, match=r'process_group: .*one dimension.*mesh\["'):
        SyncBatchNorm(CHANNELS, process_group=mesh)(torch.randn(2, CHANNELS))
    return True


@pytest.mark.parametrize("names", [("replicate", "shard"), None])
def test_a_mesh_of_two_dimensions_is_refused(names):
    assert run_ranks(4, _whole_mesh, names) == [True] * 4


def _foreign_group(rank):
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    with pytest.raises(ArgumentError, match=f"process_group: global rank {rank} is not a member"):
        SyncBatchNorm(CHANNELS, process_group=groups[1 - rank // 2])(torch.randn(2, CHANNELS))
    return True


def test_a_group_without_this_rank_is_refused():
    assert run_ranks(4, _foreign_group) == [True] * 4


def _nested(rank, inputs, grads):
    half = new_sync_group(2)
    world, local = SyncBatchNorm(CHANNELS), SyncBatchNorm(CHANNELS, process_group="local")
    model = nn.Sequential(
        world,
        nn.ReLU(),
        SyncBatchNorm(CHANNELS, process_group=half),
        nn.Tanh(),
        local,
        nn.Sigmoid(),
        copy.deepcopy(world),
    ).double()
    x = inputs[rank].requires_grad_()
    y = model(x)
    y.backward(grads[rank])
    return y.detach(), x.grad, [p.grad for p in model.parameters()]


def test_layers_of_one_model_meet_in_different_groups():
    inputs, grads = draw(SHAPES, 0), draw(SHAPES, 1)
    results = run_ranks(4, _nested, inputs, grads)
    xs = leaves(inputs)
    world = [y.relu() for y in whole_batch_norm(xs, None, None).outputs]
    half = [y.tanh() for part in (world[:2], world[2:]) for y in whole_batch_norm(part, None, None).outputs]
    local = [whole_batch_norm([y], None, None).outputs[0].sigmoid() for y in half]
    last = whole_batch_norm(local, None, None).outputs
    torch.autograd.backward(last, grads)
    for (y, dx, _), x, expected in zip(results, xs, last, strict=True):
        torch.testing.assert_close(y, expected.detach(), **EXACT)
        torch.testing.assert_close(dx, x.grad, **EXACT)
    for rank in range(4):  # the last bias's gradient is this rank's Σdy
        torch.testing.assert_close(results[rank][2][-1], grads[rank].sum((0, 2)), **EXACT)


def _make_groups(rank):
    halves, again = new_sync_group(2), new_sync_group(2)
    world, alone = new_sync_group(), new_sync_group(1)
    assert dist.get_process_group_ranks(halves) == [rank // 2 * 2, rank // 2 * 2 + 1]
    assert dist.get_process_group_ranks(world) == [0, 1, 2, 3]
    assert dist.get_process_group_ranks(alone) == [rank]
    assert len({g.group_name for g in (halves, again, world, alone, dist.group.WORLD)}) == 5  # none is shared
    for size in (3, 8, 0, -2, "half", 2.0):
        with pytest.raises(ArgumentError, match=r"size: expected.*divisor of the 4 ranks"):
            new_sync_group(size)
    dist.barrier()  # nobody waits in a group that only some began to make
    return True


def test_groups_are_made_of_consecutive_ranks_and_share_no_communicator():
    assert run_ranks(4, _make_groups) == [True] * 4


def _divide_a_subgroup(rank, inputs, grads, size, everyone):
    groups = [dist.new_group([0, 3]), dist.new_group([1, 2])]
    if rank in (1, 2) and not everyone:
        return None
    given = groups[0 if rank in (0, 3) else 1]
    mine = new_sync_group(size, process_group=given, timeout=timedelta(seconds=7))
    assert mine is not given
    layer = SyncBatchNorm(CHANNELS, process_group=mine, dtype=torch.float64)
    return _step(layer, inputs[rank], grads[rank])


@pytest.mark.parametrize(("size", "parts"), [("world", [[0, 3], [1, 2]]), (2, [[0, 3], [1, 2]]), (1, ALONE)], ids=str)
@pytest.mark.parametrize("everyone", [True, False], ids=["every rank calls", "the group alone calls"])
def test_the_ranks_of_a_group_divide_it(size, parts, everyone):
    inputs, grads = draw(SHAPES, 0), draw(SHAPES, 1)
    results = run_ranks(4, _divide_a_subgroup, inputs, grads, size, everyone, timeout_s=8)
    assert_parts(results, inputs, grads, [part for part in parts if everyone or set(part) <= {0, 3}])


def test_without_torch_distributed_no_group_can_be_made_or_used():
    with pytest.raises(ArgumentError, match=r"new_sync_group: .*init_process_group"):
        new_sync_group()
    layer = SyncBatchNorm(CHANNELS, process_group="local")
    layer(torch.randn(4, CHANNELS)).sum().backward()
    assert layer.num_batches_tracked == 1


def _copies(rank):
    mesh = init_device_mesh("cpu", (4,))
    for group in (new_sync_group(2), mesh, "local"):
        layer = SyncBatchNorm(CHANNELS, process_group=group)
        model = copy.deepcopy(nn.Sequential(layer, copy.deepcopy(layer)))
        assert all(module.process_group is group for module in model)
        assert copy.copy(layer).process_group is group
        unpickled = pickle.loads(pickle.dumps(layer))
        assert unpickled.process_group == ("local" if group == "local" else None)
        unpickled(torch.randn(2, CHANNELS)).sum().backward()
    return True


def test_copies_share_the_group_and_pickles_drop_it():
    assert run_ranks(4, _copies) == [True] * 4


def _part_of_the_world(rank):
    part = dist.new_group([0, 1])
    if rank < 2:
        new_sync_group(1, process_group=part)
    everyone = dist.new_group([0, 1, 2])  # ranks that took no part in the above agree on what this one is
    total = torch.ones(1)
    dist.all_reduce(total, group=everyone)
    return total.item()


def test_groups_of_a_part_of_the_world_do_not_disturb_the_rest():
    assert run_ranks(3, _part_of_the_world, timeout_s=10) == [3.0] * 3
