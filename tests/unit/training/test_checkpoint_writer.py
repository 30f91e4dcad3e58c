"""Checkpoints written beside the training. A failure means a step that waits for the disk, or a torn or lost state."""

import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from service.training import checkpoint_writer
from service.training.checkpoint_delivery import CheckpointDelivery
from service.training.checkpoint_writer import CheckpointWriter
from service.training.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from service.training.errors import BadFactory, CheckpointFailed
from service.training.host_memory import HostMemory
from tests.unit.training.checkpoint_examples import Training, assert_same, frozen, rank_task

DEADLINE_S = 30.0


@pytest.fixture
def task(tmp_path):
    return rank_task(tmp_path / "staging")


@pytest.fixture
def training():
    training = Training()
    training.step()
    return training


class _Gate:
    """Stands in front of every write; shut, it stands for a disk that does not get on."""

    def __init__(self, monkeypatch):
        self.is_open = threading.Event()
        self.num_waiting = threading.Semaphore(0)
        self.failures = {}
        monkeypatch.setattr(checkpoint_writer, "write_checkpoint", self._write)

    def _write(self, checkpoint, *args, **options):
        self.num_waiting.release()
        assert self.is_open.wait(DEADLINE_S)
        if checkpoint.step in self.failures:
            raise self.failures[checkpoint.step]
        return write_checkpoint(checkpoint, *args, **options)


@pytest.fixture
def gate(monkeypatch):
    gate = _Gate(monkeypatch)
    yield gate
    gate.is_open.set()


def _poll(writer):
    deadline = time.monotonic() + DEADLINE_S
    while not (staged := writer.outcomes(wait=False)):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return staged


def test_a_step_does_not_wait_for_the_disk(training, task, gate):
    with CheckpointWriter(task) as writer:
        writer.save(training.capture(), {"train/loss": 0.5})
        assert gate.num_waiting.acquire(timeout=DEADLINE_S)
        for _ in range(3):  # the disk stands still; training goes on
            training.step()
            assert writer.outcomes(wait=False) == []
        gate.is_open.set()
        (staged,) = _poll(writer)
        assert (staged.step, staged.metrics) == (1, {"train/loss": 0.5})
        assert staged.directory == f"{task.staging_dir}/1"


def test_what_is_written_is_the_state_at_its_step(training, task, gate):
    expected = frozen(vars(training.capture()) | {"model": dict(training.capture().model)})
    with CheckpointWriter(task) as writer:
        writer.save(training.capture(), {})
        for _ in range(5):  # in place, all of them: parameters, running statistics, moments, average
            training.step()
        gate.is_open.set()
        (staged,) = writer.outcomes(wait=True)
    found = read_checkpoint(Path(staged.directory), job_id="job")
    assert_same(dict(sorted(found.model.items())), dict(sorted(expected["model"].items())))
    assert_same(found.optimizer, expected["optimizer"])
    assert_same(found.state, expected["state"])
    assert found.step == 1


def test_a_second_one_waits_for_the_first_and_says_how_long(training, task, gate):
    with CheckpointWriter(task) as writer:
        assert writer.save(training.capture(), {}) < DEADLINE_S / 2
        assert gate.num_waiting.acquire(timeout=DEADLINE_S)
        started = time.perf_counter()
        opener = threading.Timer(0.2, gate.is_open.set)
        opener.start()
        training.step()
        before_s = time.perf_counter()
        held_up_s = writer.save(training.capture(), {})
        # From before the call to the gate's opening at the least, and all of it within the call.
        assert started + 0.2 - before_s <= held_up_s <= time.perf_counter() - before_s
        assert [staged.step for staged in writer.outcomes(wait=False)][:1] == [1]
        assert [staged.step for staged in writer.outcomes(wait=True)] == [2]
        opener.join()


def test_waiting_hands_out_everything_in_order(training, task):
    with CheckpointWriter(task) as writer:
        for _ in range(4):
            writer.save(training.capture(), {})
            training.step()
        assert [staged.step for staged in writer.outcomes(wait=True)] == [1, 2, 3, 4]
        assert writer.outcomes(wait=True) == writer.outcomes(wait=False) == []


def test_a_failure_is_handed_out_in_its_turn_and_later_ones_follow(training, task, gate):
    gate.failures[2] = failure = CheckpointFailed("the disk is full")
    gate.is_open.set()
    with CheckpointWriter(task) as writer:
        for _ in range(3):  # the second does not keep the third from being saved
            writer.save(training.capture(), {})
            training.step()
        first, second, third = writer.outcomes(wait=True)
        assert (first.step, second, third.step) == (1, failure, 3)
        assert writer.outcomes(wait=True) == []


def test_it_is_free_once_nothing_is_being_written(training, task, gate):
    with CheckpointWriter(task) as writer:
        assert writer.wait_until_free(0.0)
        writer.save(training.capture(), {})
        assert not writer.wait_until_free(0.01)
        gate.is_open.set()
        assert writer.wait_until_free(DEADLINE_S)
        assert [staged.step for staged in writer.outcomes(wait=False)] == [1]


class _Told:
    def __init__(self):
        self.messages = []

    def send(self, message):
        self.messages.append(message)


@pytest.mark.parametrize("on_failure", ["continue", "stop"])
def test_the_last_checkpoint_is_the_result_whatever_the_policy(training, task, gate, on_failure):
    gate.failures[2] = CheckpointFailed("the disk is full")
    gate.is_open.set()
    told = _Told()
    with CheckpointWriter(task) as writer:
        delivery = CheckpointDelivery(writer, told, on_failure)
        for _ in range(2):
            writer.save(training.capture(), {})
            training.step()
        with pytest.raises(CheckpointFailed, match="the disk is full"):
            delivery.deliver_all()
    assert [message.step for message in told.messages] == [1]


def test_an_earlier_failure_does_not_hide_the_result(training, task, gate):
    gate.failures[1] = CheckpointFailed("the disk is full")
    gate.is_open.set()
    told = _Told()
    with CheckpointWriter(task) as writer:
        for _ in range(2):
            writer.save(training.capture(), {})
            training.step()
        CheckpointDelivery(writer, told, "continue").deliver_all()
    warning, staged = told.messages
    assert (warning.kind, staged.step) == ("warning", 2)


def test_a_fault_of_the_writer_s_own_is_not_hidden(training, task, gate):
    gate.failures[1] = ZeroDivisionError("a fault")
    gate.is_open.set()
    with CheckpointWriter(task) as writer:
        writer.save(training.capture(), {})
        with pytest.raises(ZeroDivisionError):
            writer.outcomes(wait=True)


def test_leaving_waits_for_what_is_being_written(training, task, gate):
    with CheckpointWriter(task) as writer:
        writer.save(training.capture(), {})
        assert gate.num_waiting.acquire(timeout=DEADLINE_S)
        threading.Timer(0.05, gate.is_open.set).start()
    assert [staged.step for staged in writer.outcomes(wait=False)] == [1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_the_file_of_the_writer_is_that_of_the_direct_way(training, task, tmp_path):
    with CheckpointWriter(task) as writer:
        writer.save(training.capture(), {})
        (staged,) = writer.outcomes(wait=True)
    directly = write_checkpoint(training.capture(), rank_task(tmp_path / "directly"), {})
    assert (Path(staged.directory) / "model.safetensors").read_bytes() == (directly / "model.safetensors").read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives threads priorities of their own")
def test_the_writing_thread_gives_way_to_training(training, task, monkeypatch):
    seen = []

    def record(checkpoint, *args, **options):
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return write_checkpoint(checkpoint, *args, **options)

    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", record)
    ours = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    with CheckpointWriter(task) as writer:
        writer.save(training.capture(), {})
        writer.outcomes(wait=True)
    assert seen == [min(19, max(ours, checkpoint_writer.NICENESS))]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == ours


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []


def _addresses(checkpoint):
    parts = [checkpoint.model, checkpoint.optimizer, checkpoint.state]
    return [tensor.data_ptr() for part in parts for tensor in _tensors(part)]


def test_buffers_are_allocated_once_and_are_not_the_live_tensors(training):
    memory = HostMemory()
    addresses = [_addresses(memory.copy(training.capture()))]
    for _ in range(3):
        training.step()
        addresses.append(_addresses(memory.copy(training.capture())))
    assert addresses[0] == addresses[1] == addresses[2] == addresses[3]
    assert len(set(addresses[0])) == len(addresses[0])
    assert not set(addresses[0]) & set(_addresses(training.capture()))


def test_a_state_may_change_its_shape(training):
    memory = HostMemory()
    for state in ({"a": torch.ones(3)}, {"a": torch.ones(4)}, {"a": torch.ones(4).double()}, {"b": torch.ones(2)}, {}):
        checkpoint = Checkpoint(step=1, model={}, optimizer={}, state=state)
        assert_same(memory.copy(checkpoint).state, state)


def test_whatever_lies_where_is_copied_contiguously():
    base = torch.arange(24.0).reshape(2, 3, 4)
    state = {
        "turned": base.permute(2, 0, 1),
        "part": base[:, 1:, ::2],
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.ones(1).expand(5),
        "empty": torch.empty(0, 3),
        "number": torch.tensor(3),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "conjugated": torch.complex(torch.ones(2), torch.ones(2)).conj(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    copy = HostMemory().copy(Checkpoint(step=1, model={}, optimizer={}, state=state)).state
    for name, value in state.items():
        assert torch.equal(copy[name], value), name
        assert copy[name].is_contiguous(), name
        assert not copy[name].requires_grad, name


def test_numbers_of_numpy_become_plain_ones(task):
    state = {"best": np.float64(0.1), "flag": True, "count": 3, "names": ("a", None)}
    with CheckpointWriter(task) as writer:
        writer.save(Checkpoint(step=1, model={}, optimizer={}, state=state), {})
        (staged,) = writer.outcomes(wait=True)
    found = read_checkpoint(Path(staged.directory), job_id="job").state
    assert (found, type(found["best"])) == ({"best": 0.1, "flag": True, "count": 3, "names": ("a", None)}, float)


def test_what_could_not_be_read_back_is_refused_by_name(task):
    optimizer = {"state": {0: {"history": np.zeros(3)}}}
    with CheckpointWriter(task) as writer:
        with pytest.raises(BadFactory, match=r"optimizer\.state\.0\.history is a numpy\.ndarray.*Keep tensors"):
            writer.save(Checkpoint(step=1, model={}, optimizer=optimizer), {})
        assert writer.outcomes(wait=True) == []
