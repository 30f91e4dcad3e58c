"""The moving average of weights and running statistics. A failure here is an average that is off, or that leaks into
training."""

import pytest
import torch
from torch import nn

from service.training.optimization import Ema
from syncbn import SyncBatchNorm


def new_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), SyncBatchNorm(4), nn.Linear(4, 3)).double()
    model[2].weight = nn.Parameter(model[0].weight.detach().T.contiguous())
    return model


def disturb(model, seed):
    torch.manual_seed(seed)
    model(torch.randn(8, 3, dtype=torch.float64))  # moves the running statistics
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


def values(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_weights_and_running_statistics_are_averaged():
    model = new_model()
    ema = Ema(model, decay=0.3)
    average = values(model)
    for update, decay in enumerate((1 / 10, 2 / 11, 3 / 12, 0.3, 0.3)):
        disturb(model, update)
        ema.update()
        for name, value in model.state_dict().items():
            average[name] = decay * average[name] + (1 - decay) * value
    live = values(model)
    assert average["1.running_mean"].abs().min() > 0
    with ema.swapped_in():
        for name, value in model.state_dict().items():
            if name == "1.num_batches_tracked":
                assert torch.equal(value, live[name])
            else:
                assert torch.allclose(value, average[name], rtol=1e-14, atol=1e-15), name
    assert all(torch.equal(value, live[name]) for name, value in model.state_dict().items())


def test_the_models_own_values_come_back_after_an_error():
    model = new_model()
    ema = Ema(model, decay=0.9)
    disturb(model, 1)
    live = values(model)
    with pytest.raises(RuntimeError, match="evaluation"), ema.swapped_in():
        raise RuntimeError("evaluation")
    assert all(torch.equal(value, live[name]) for name, value in model.state_dict().items())


def test_a_resumed_average_goes_on_bit_by_bit(tmp_path):
    model = new_model()
    ema = Ema(model, decay=0.9)
    disturb(model, 1)
    ema.update()
    torch.save(ema.state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    resumed_model = new_model()
    resumed_model.load_state_dict(model.state_dict())
    resumed = Ema(resumed_model, decay=0.9)
    resumed.load_state_dict(state)
    for averaged, of in ((ema, model), (resumed, resumed_model)):
        disturb(of, 2)
        averaged.update()
    ours, theirs = ema.state_dict(), resumed.state_dict()
    assert ours["num_updates"] == theirs["num_updates"] == 2
    assert ours["average"].keys() == theirs["average"].keys()
    assert all(torch.equal(value, theirs["average"][name]) for name, value in ours["average"].items())


def test_a_tensor_with_two_names_is_averaged_once():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    ema = Ema(model, decay=0.5)
    before = values(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    assert list(ema.state_dict()["average"]) == ["0.weight"]
    with ema.swapped_in():
        assert torch.equal(model[1].weight, before["0.weight"])
