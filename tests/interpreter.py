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
            # It loses what is smaller than normal numbers.
            if src.dtype.scalar == tl.bfloat16 and dst_type.scalar == tl.float32:
                return interpreter.TensorHandle((src.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
            return super().cast_impl(src, dst_type)

    convert, launch = interpreter._implicit_cvt, interpreter.GridExecutor.__call__
    patched = set()

    def convert_argument(argument):
        # A float becomes a constant, of float32 wherever it is assigned, although it is annotated float64.
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument]), tl.float64), tl.float64)
        return convert(argument)

    def launch_quietly(self, *arguments, **options):
        with np.errstate(all="ignore"):  # it warns of a NaN or an overflow, where the hardware goes on
            return launch(self, *arguments, **options)

    def call(self, *arguments, **options):
        # Its own patches the language again for each call of a function, which is half of its time.
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*arguments, **options)

    interpreter.interpreter_builder.__class__ = Builder
    # Checks of every integer operation are half of the rest; no test has a size that they could find.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.InterpretedFunction.__call__ = call
    interpreter._implicit_cvt = convert_argument
    interpreter.GridExecutor.__call__ = launch_quietly


if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    _repair()
