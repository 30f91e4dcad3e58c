"""Starting kernels: with little to do on the host, on the right device, with memory for their programs to meet in."""

import threading
from typing import Any

import torch
import triton
import triton.language as tl

from syncbn.kernels.triton.plan import NUM_WARPS
from syncbn.moments import compute_dtype

# Multiply-adds may be fused: what has to come out alike in two kernels is written as one. Said, for defaults differ.
_OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": True}
_ALIGNMENT = 16  # of pointers, for vectors as wide as they get
_MAX_BLOCKS = 1 << 14
_INTERPRETED_PROCESSORS = 2  # for tensors that are on no GPU: Triton's interpreter runs the programs one by one

_kept: dict[tuple[object, ...], dict[tuple[torch.dtype | None, ...], Any]] = {}
_arrivals: dict[tuple[int, int], torch.Tensor] = {}
_num_processors: dict[int, int] = {}


class Launch:
    """A kernel with its grid, and with all of its arguments settled that shapes and options decide.

    Triton's own way finds the compiled kernel again at each call, by every argument; that takes longer than a small
    batch. Here it is kept, for all batches of the same constants, by what is left to differ: which tensors are given,
    their dtypes, and whether all of them are aligned; where one is not, the call goes Triton's way.

    Args:
        kernel: The jitted function; its parameters are pointers and floats, extents, constants, in this order.
        num_programs: Size of the one-dimensional grid.
        device_index: Of the GPU, or -1 for Triton's interpreter.
        extents: Integers of 32 bits that the kernel is not specialized on.
        constants: What it is compiled for.
    """

    def __init__(
        self,
        kernel: Any,  # noqa: ANN401 - Triton's types say nothing
        num_programs: int,
        device_index: int,
        extents: tuple[int, ...],
        constants: tuple[object, ...],
    ) -> None:
        self._kernel = kernel
        self._grid = (num_programs, 1, 1)
        self._device_index = device_index
        self._settled = *extents, *constants
        self._compiled = _kept.setdefault((kernel, device_index, constants), {})

    def __call__(self, *arguments: torch.Tensor | float | None) -> None:
        """Starts it on the current stream of the device.

        Args:
            arguments: The first ones, in the kernel's order.
        """
        if self._device_index >= 0 and self._device_index != torch._C._cuda_getDevice():
            with torch.cuda.device(self._device_index):
                self._start(arguments)
        else:
            self._start(arguments)

    def _start(self, arguments: tuple[torch.Tensor | float | None, ...]) -> None:
        values: list[float | None] = []
        dtypes: list[torch.dtype | None] = []
        bits = 0
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                address = argument.data_ptr()
                bits |= address
                values.append(address)
                dtypes.append(argument.dtype)
            else:
                values.append(argument)
                dtypes.append(None)
        key = tuple(dtypes)
        compiled = None if bits % _ALIGNMENT else self._compiled.get(key)
        if compiled is None:
            compiled = self._kernel[self._grid](*arguments, *self._settled, **_OPTIONS)
            if bits % _ALIGNMENT == 0 and compiled is not None:  # the interpreter compiles nothing
                self._compiled[key] = compiled
            return
        # What triton.JITFunction.run does with a kernel that it has found.
        stream = torch._C._cuda_getCurrentRawStream(self._device_index)
        enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
        metadata = None
        if getattr(enter, "calls", True) or getattr(leave, "calls", True):  # a profiler of Triton's is listening
            metadata = compiled.launch_metadata(self._grid, stream, *values, *self._settled)
        else:
            enter = leave = None
        function, packed = compiled.function, compiled.packed_metadata
        compiled.run(*self._grid, stream, function, packed, metadata, enter, leave, *values, *self._settled)


def arrivals(x: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """Counters at zero, shape (num_blocks,) or longer, int32, which a kernel leaves at zero again.

    One stream's launches follow each other, so they share one memory. A CUDA graph gets memory of its own, which it
    clears itself: it may be replayed beside anything.
    """
    index = x.get_device()
    if index < 0 or num_blocks > _MAX_BLOCKS or torch._C._cuda_isCurrentStreamCapturing():
        return x.new_zeros(num_blocks, dtype=torch.int32)
    key = index, torch._C._cuda_getCurrentRawStream(index)
    counters = _arrivals.get(key)
    if counters is None:
        counters = _arrivals[key] = _outside_of_pools(index)
    return counters


def _outside_of_pools(device_index: int) -> torch.Tensor:
    """Memory to keep, even where this thread allocates from a pool that is not to be kept from, as a graph's."""
    made: list[torch.Tensor] = []
    is_clear = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def make() -> None:
        made.append(torch.zeros(_MAX_BLOCKS, dtype=torch.int32, device=torch.device("cuda", device_index)))
        is_clear.record(torch.cuda.current_stream(device_index))

    thread = threading.Thread(target=make)  # pools are a thread's own
    thread.start()
    thread.join()
    torch.cuda.current_stream(device_index).wait_event(is_clear)
    return made[0]


def num_processors(device_index: int) -> int:
    """Streaming multiprocessors of a GPU."""
    if device_index < 0:
        return _INTERPRETED_PROCESSORS
    number = _num_processors.get(device_index)
    if number is None:
        properties = torch.cuda.get_device_properties(device_index)
        number = _num_processors[device_index] = properties.multi_processor_count
    return number


def compute_type(dtype: torch.dtype) -> Any:  # noqa: ANN401 - Triton's own kind of type
    """Triton's name of the precision that a batch is computed in."""
    return tl.float64 if compute_dtype(dtype) == torch.float64 else tl.float32
