"""Which group is synchronized over; what crosses ranks is tested on real ones elsewhere."""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from syncbn.collectives import all_reduce_sum, resolve_group
from syncbn.errors import ArgumentError
from tests.ranks import run_ranks


def test_without_torch_distributed_a_process_is_alone():
    payload = torch.ones(3, dtype=torch.float64)
    all_reduce_sum(payload, resolve_group(None), "forward of bn")
    assert payload.tolist() == [1.0] * 3


def _resolved(rank):
    pair, alone = dist.new_group([0, 1]), [dist.new_group([one]) for one in range(3)][rank]
    assert resolve_group(None) is dist.group.WORLD
    assert resolve_group(dist.group.WORLD) is dist.group.WORLD
    assert resolve_group(alone) is None
    if rank < 2:
        assert resolve_group(pair) is resolve_group(pair) is pair
    else:
        with pytest.raises(ArgumentError, match="global rank 2 is not a member"):
            resolve_group(pair)


def test_groups():
    run_ranks(3, _resolved)


def _meshes(rank):
    line = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    assert resolve_group(line) is dist.group.WORLD
    column = resolve_group(grid["dp"])
    assert column is grid["dp"].get_group()
    with pytest.raises(ArgumentError, match=r'mesh\["dp"\]'):
        resolve_group(grid)
    payload = torch.tensor([float(rank)], dtype=torch.float64)
    all_reduce_sum(payload, column, "forward of bn")
    return payload.item()


def test_a_mesh_of_one_dimension_is_its_group():
    assert run_ranks(4, _meshes) == [2.0, 4.0, 2.0, 4.0]


def _after_destruction(rank):
    pair, world = dist.new_group([0, 1]), dist.group.WORLD
    all_reduce_sum(torch.ones(1, dtype=torch.float64), resolve_group(world), "forward of bn")
    resolve_group(pair)
    dist.destroy_process_group()
    with pytest.raises(ArgumentError, match="not initialized"):
        resolve_group(world)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for destroyed in (pair, world):
        with pytest.raises(ArgumentError, match="was destroyed"):
            resolve_group(destroyed)
    assert resolve_group(None) is None


def test_a_destroyed_group_is_refused():
    run_ranks(2, _after_destruction)


def _collected(rank):
    world = dist.group.WORLD
    all_reduce_sum(torch.ones(1, dtype=torch.float64), resolve_group(None), "forward of bn")
    reference = weakref.ref(world)
    dist.barrier()
    del world
    dist.destroy_process_group()
    gc.collect()
    return reference() is None


def test_a_destroyed_group_is_not_kept_alive():
    assert run_ranks(2, _collected) == [True, True]
