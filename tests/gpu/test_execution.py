"""How the layer runs on a GPU: nothing waits for the device, and graphs, streams and threads do not meet each other."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from syncbn import SyncBatchNorm, sync_batch_norm

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

SHAPE = (8, 64, 56, 56)


class Step:
    """Forward and backward on tensors that stay where they are."""

    def __init__(self, shape: tuple[int, ...], gpu: torch.device, **options: object) -> None:
        self.x = torch.randn(shape, device=gpu).requires_grad_()
        self.dy = torch.randn(shape, device=gpu)
        self.weight = torch.rand(shape[1], device=gpu).requires_grad_()
        self.bias = torch.randn(shape[1], device=gpu).requires_grad_()
        self.running = [torch.zeros(shape[1], device=gpu), torch.ones(shape[1], device=gpu)]
        self.options = options

    def __call__(self) -> list[torch.Tensor]:
        y = sync_batch_norm(self.x, *self.running, self.weight, self.bias, training=True, **self.options)  # type: ignore[arg-type]
        return [y.detach(), *torch.autograd.grad(y, [self.x, self.weight, self.bias], self.dy)]

    def fill(self, other: "Step") -> None:
        with torch.no_grad():
            for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
                mine.copy_(theirs)

    def tensors(self) -> list[torch.Tensor]:
        return [self.x, self.dy, self.weight, self.bias, *self.running]


@contextmanager
def syncs_are_errors() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_all_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), number


@pytest.mark.parametrize("num_samples", [8, 0])
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"momentum": None}], ids=str)
def test_nothing_waits_for_the_device(num_samples: int, options: dict[str, object], gpu: torch.device) -> None:
    counter = torch.zeros((), dtype=torch.int64, device=gpu)
    step = Step((num_samples, *SHAPE[1:]), gpu, num_batches_tracked=counter, **options)
    step()
    with syncs_are_errors():
        step()
    assert counter.item() == (2 if num_samples else 0)


def test_nothing_of_the_module_waits_for_the_device(gpu: torch.device) -> None:
    layer = SyncBatchNorm(SHAPE[1], activation="relu", device=gpu)
    x, residual = (torch.randn(SHAPE, device=gpu).requires_grad_() for _ in range(2))
    mask = torch.rand(SHAPE[0], 1, *SHAPE[2:], device=gpu) > 0.3
    layer(x, residual=residual, mask=mask).sum().backward()
    with syncs_are_errors():
        layer(x, residual=residual, mask=mask).sum().backward()


@pytest.mark.parametrize("num_samples", [8, 0])
def test_a_captured_step_does_with_new_data_what_an_eager_one_does(num_samples: int, gpu: torch.device) -> None:
    shape = (num_samples, *SHAPE[1:])
    step, other = Step(shape, gpu, activation="relu"), Step(shape, gpu, activation="relu")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = step()
    for _ in range(2):
        step.fill(other)
        graph.replay()
        expected = other()
        assert_all_equal([*found, *step.running], [*expected, *other.running])
    if num_samples == 0:
        assert torch.equal(step.running[1], torch.ones(SHAPE[1], device=gpu))


def test_two_streams_do_not_meet(gpu: torch.device) -> None:
    """Programs of a launch meet in counters; launches that run at once must not share them."""
    steps = [Step(SHAPE, gpu) for _ in range(2)]
    expected = [step() for step in steps]
    streams = [torch.cuda.Stream() for _ in steps]
    torch.cuda.synchronize()
    found: list[list[list[torch.Tensor]]] = [[], []]
    for stream in streams:  # so that the host is done before they start, and they run at once
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
    for _ in range(30):
        for step, stream, results in zip(steps, streams, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(step())
    torch.cuda.synchronize()
    for of_step, right in zip(found, expected, strict=True):
        for results in of_step:
            assert_all_equal(results, right)


@pytest.mark.parametrize("has_streams", [False, True])
def test_threads_do_not_meet(has_streams: bool, gpu: torch.device) -> None:
    """On one stream, and on one for each thread; kernels that nobody has compiled before, too."""
    shapes = [(4, 32 + 16 * number, 14, 14) for number in range(4)]
    steps = [Step(shape, gpu) for shape in shapes]
    torch.cuda.synchronize()  # what was filled on this stream is used on others
    found: list[list[list[torch.Tensor]]] = [[] for _ in steps]

    def work(step: Step, results: list[list[torch.Tensor]]) -> None:
        with torch.cuda.stream(torch.cuda.Stream() if has_streams else None):
            results.extend(step() for _ in range(20))

    run_all(
        [lambda step=step, results=results: work(step, results) for step, results in zip(steps, found, strict=True)]
    )
    torch.cuda.synchronize()
    for step, of_step in zip(steps, found, strict=True):
        expected = step()
        assert len(of_step) == 20
        for results in of_step:
            assert_all_equal(results, expected)


def run_all(functions: list[Callable[[], None]]) -> None:
    """Each on a thread of its own; raises what one raised."""
    raised: list[BaseException] = []

    def run(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]
