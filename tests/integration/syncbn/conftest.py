"""Triton kernels run under its interpreter, which has to be chosen before anything imports Triton; torch does at times.

Only here and beside the unit tests of the same package: other tests need neither torch nor the time.
"""

import importlib.util

if importlib.util.find_spec("triton") is not None:
    import tests.interpreter  # noqa: F401 - for what importing it does
