"""What is held on a machine. A failure means a forkserver that runs out of descriptors, or a fence around nothing."""

import os

import pytest

from service.cluster import fence
from service.cluster.fence import Fences, Holding

HOLDING = Holding(job_id="job", attempt=1, devices=("gpu:0",))


def test_a_holding_is_in_force_until_its_last_descriptor_is_closed(tmp_path):
    fences = Fences(tmp_path)
    raised = fences.put_up(HOLDING)
    copy = os.dup(raised.fd)
    os.close(raised.fd)
    assert fences.in_force(but=frozenset()) == [HOLDING]
    assert fences.in_force(but={raised.name}) == []
    os.close(copy)
    assert fences.in_force(but=frozenset()) == []
    assert not list(tmp_path.iterdir())


def test_a_fence_that_a_full_disk_does_not_take_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("No space left on device")

    fences = Fences(tmp_path)
    descriptors = os.listdir("/proc/self/fd")
    monkeypatch.setattr(fence.os, "write", refuse)
    with pytest.raises(OSError, match="No space"):
        fences.put_up(HOLDING)
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())
    assert os.listdir("/proc/self/fd") == descriptors
