"""Tasks of the user's own code, and tasks built from specifications. A failure here is a loss of theirs that is taken
wrongly, or an error that does not say what they should have returned."""

import pytest
import torch
from pydantic import TypeAdapter

from service.domain.spec import TaskSpec
from service.training.errors import BadFactory
from service.training.tasks import build_task

CPU = torch.device("cpu")
OUTPUTS, TARGETS = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 1.0, 1.0])


class SquaredError:
    def __init__(self, factor=1.0):
        self._factor = factor

    def loss(self, outputs, targets):
        return self._factor * (outputs - targets).square().sum(), len(targets)

    def metrics(self, outputs, targets):
        return {
            "largest_share": ((outputs - targets).abs().max(), 1),
            "bias": ((outputs - targets).sum(), len(targets)),
        }


class MeanError:
    def loss(self, outputs, targets):
        return (outputs - targets).abs().mean()


class Contrast(SquaredError):
    def __init__(self, why):
        super().__init__()
        self.unsuited = why


class Answers:
    """Returns what it is given."""

    def __init__(self, loss=None, metrics=None):
        self._loss, self._metrics = loss, metrics

    def loss(self, outputs, targets):
        return self._loss(outputs) if callable(self._loss) else self._loss

    def metrics(self, outputs, targets):
        return self._metrics


def no_task():
    return 3


def custom(name, **arguments):
    return build_task(spec({"factory": f"{__name__}:{name}", "args": arguments}))


def spec(value):
    return TypeAdapter(TaskSpec).validate_python(value)


@pytest.mark.parametrize("name", ["classification", "segmentation", "detection", "regression"])
def test_builtin_tasks_are_built_by_name(name):
    assert build_task(spec(name)).name == name


def test_options_arrive():
    logits, targets = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    task = build_task(spec({"name": "classification", "label_smoothing": 0.5, "class_weights": [3, 1]}))
    assert task.loss(logits, targets).weight.item() == 3
    masks = torch.full((1, 1, 1), 7)
    task = build_task(spec({"name": "segmentation", "ignore_index": 7, "dice_weight": 2}))
    loss = task.loss(torch.zeros(1, 2, 1, 1), masks)
    assert loss.weight.item() == 0
    assert "dice_loss" in loss.metrics
    task = build_task(spec({"name": "regression", "loss": "huber", "huber_delta": 2}))
    assert task.loss(torch.tensor([[4.0]]), torch.tensor([[0.0]])).sum.item() == 6.0


def test_a_sum_with_a_weight_adds_up():
    task = custom("SquaredError", factor=2.0)
    loss = task.loss(OUTPUTS, TARGETS)
    assert (loss.sum.item(), loss.weight, loss.adds_up) == (34.0, 3.0, True)
    assert task.unsuited is None


def test_a_mean_does_not():
    task = custom("MeanError")
    loss = task.loss(OUTPUTS, TARGETS)
    assert loss.sum.item() == pytest.approx(5.0)
    assert (loss.weight, loss.adds_up) == (3.0, False)


def test_a_loss_may_say_itself_that_it_does_not_add_up():
    assert custom("Contrast", why="it compares the samples of a batch").unsuited == "it compares the samples of a batch"
    with pytest.raises(BadFactory, match=r"^task\.factory: unsuited .* is no sentence, but True"):
        custom("Contrast", why=True)


def test_metrics_are_ratios_of_sums():
    metrics = custom("SquaredError").new_metrics(num_outputs=1, device=CPU)
    metrics.update(OUTPUTS, TARGETS)
    metrics.update(OUTPUTS[:1], TARGETS[:1])
    result = metrics.compute(lambda vector: vector, lambda value: [value, {}, {"bias": (3.0, 1.0)}])
    assert result == {"bias": 8 / 5, "largest_share": 2.0}


def test_a_task_without_metrics_has_none():
    metrics = custom("MeanError").new_metrics(num_outputs=1, device=CPU)
    metrics.update(OUTPUTS, TARGETS)
    assert metrics.compute(lambda vector: vector, lambda value: [value]) == {}


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (3.0, "loss returned a float"),
        ((torch.tensor(1.0),), "loss returned a tuple"),
        ((1.0, 2.0), "the sum that loss returned is a float"),
        ((lambda outputs: (outputs, 3)), r"the sum that loss returned is a torch.float32 \(3,\)"),
        ((lambda outputs: outputs), r"the sum that loss returned is a torch.float32 \(3,\)"),
        ((lambda outputs: (outputs.sum(), "3")), "the weight of the loss is a str"),
        ((lambda outputs: (outputs.sum(), outputs)), "the weight of the loss is a Tensor"),
    ],
)
def test_a_loss_of_another_kind_is_refused(loss, message):
    with pytest.raises(BadFactory, match=rf"^task\.factory: \S+:Answers: {message}"):
        custom("Answers", loss=loss).loss(OUTPUTS, TARGETS)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (None, "metrics returned a NoneType"),
        ({"a b": (1, 2)}, "metrics named one 'a b'"),
        ({"a": 1}, r"metric a is a int, not \(sum, weight\)"),
        ({"a": (1, "2")}, "metric a is a str"),
    ],
)
def test_metrics_of_another_kind_are_refused(metrics, message):
    with pytest.raises(BadFactory, match=rf"^task\.factory: \S+:Answers: {message}"):
        custom("Answers", metrics=metrics).new_metrics(num_outputs=1, device=CPU).update(OUTPUTS, TARGETS)


def test_what_is_no_task_is_refused():
    with pytest.raises(BadFactory, match=r"^task\.factory: .*no_task returned a int, which has no method loss"):
        custom("no_task")
    with pytest.raises(BadFactory, match=r"^task\.factory: "):
        custom("missing")
