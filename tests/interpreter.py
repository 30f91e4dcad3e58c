"""Triton kernels on tensors in main memory, by Triton's interpreter, with its faults repaired.

Importing this sets TRITON_INTERPRET=1, which Triton heeds when it is first imported; so it has to come before that.
Where there is a GPU nothing is set, and the kernels are compiled for it: DEVICE says where their tensors belong.
"""

import os
import warnings

import numpy as np
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _repair() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton's own, about defaults of its next version
        import triton.language as tl
        from triton.runtime import interpreter

    class Builder(interpreter.InterpreterBuilder):
        def create_splat(self, ret_ty, arg):
            # A comparison's result keeps its operands' type beside its values, and a splat takes that one.
            if arg.data.dtype == bool:
                return interpreter.TensorHandle(np.full(ret_ty.shape, arg.data), tl.int1)
            return super().create_splat(ret_ty, arg)

        def cast_impl(self, src, dst_type):
            # It cuts bits off where the hardware rounds to nearest, and a NaN may become an infinity.
            if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
                rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.uint16).numpy()
                return interpreter.TensorHandle(rounded.reshape(src.data.shape), tl.bfloat16)
            if src.dtype.scalar == tl.float64 and dst_type.scalar == tl.bfloat16:
                return self.cast_impl(super().cast_impl(src, tl.float32), dst_type)
            return super().cast_impl(src, dst_type)

    interpreter.interpreter_builder.__class__ = Builder


if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    _repair()
