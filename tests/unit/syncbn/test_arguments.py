"""Wrong calls: each error names its field and the remedy. A failure here means a message, not a number, is wrong."""

import pickle

import pytest
import torch

from syncbn import errors, sync_batch_norm
from syncbn.errors import ArgumentError, UnsupportedDeviceError
from syncbn.kernels import eager

ARGUMENTS = {
    "input": torch.randn(4, 3),
    "running_mean": torch.zeros(3),
    "running_var": torch.ones(3),
    "weight": torch.ones(3),
    "bias": torch.zeros(3),
    "training": True,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": torch.randn(4)}, r"input: expected shape \(N, C, \*\).*unsqueeze"),
        ({"input": torch.randn(4, 0)}, "input: expected shape .* at least one channel"),
        (
            {"input": torch.ones(4, 3, dtype=torch.int64)},
            r"input: expected float64.*got torch.int64; .*input.float\(\)",
        ),
        ({"weight": torch.ones(4)}, r"weight: expected shape \(3,\).*got \(4,\); num_features"),
        ({"bias": torch.ones(3, 1)}, r"bias: expected shape \(3,\)"),
        ({"running_var": torch.ones(2)}, r"running_var: expected shape \(3,\)"),
        ({"running_mean": torch.zeros(3, device="meta")}, r"running_mean: on meta, but input is on cpu.*layer.to"),
        ({"weight": torch.ones(3).double()}, r"weight: expected torch.float32 for this input.*layer.to\(dtype\)"),
        (
            {"input": torch.randn(4, 3).half(), "bias": torch.zeros(3).bfloat16()},
            "bias: expected torch.float16 or torch.f",
        ),
        ({"running_var": None}, "running_mean, running_var: give both or neither"),
        ({"running_mean": None, "running_var": None, "training": False}, "running_mean: required without training"),
        ({"momentum": None}, "num_batches_tracked: required with momentum=None"),
        ({"eps": -1e-5}, "eps: expected a number of at least 0"),
        ({"eps": float("nan")}, "eps: expected a number of at least 0"),
        ({"process_group": object()}, "process_group: .*not initialized.*init_process_group"),
    ],
)
def test_the_error_names_the_argument_and_the_remedy(changes, message):
    with pytest.raises(ArgumentError, match=message):
        sync_batch_norm(**{**ARGUMENTS, **changes})


def test_the_arguments_themselves_are_fine():
    sync_batch_norm(**ARGUMENTS)


def test_a_device_without_float64_is_refused(monkeypatch):
    monkeypatch.setattr("syncbn.arguments._DEVICES_WITHOUT_FLOAT64", ("cpu",))
    monkeypatch.setattr("syncbn.functional.backend_for", lambda _: eager)  # such a device has no C++ kernels
    with pytest.raises(UnsupportedDeviceError, match=r"float64.*cpu or cuda"):
        sync_batch_norm(**ARGUMENTS)


@pytest.mark.parametrize("kind", [e for e in vars(errors).values() if isinstance(e, type)], ids=lambda e: e.__name__)
def test_errors_survive_pickling(kind):
    again = pickle.loads(pickle.dumps(kind("rank 3")))
    assert type(again) is kind
    assert str(again) == "rank 3"
    assert kind.__name__ in errors.__doc__
