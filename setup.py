"""Builds the native library, syncbn/_native.so, from syncbn/csrc.

The library is optional: it needs a C++ compiler, and torch at build time. torch is no build requirement, for an
isolated build would download gigabytes of another torch than the one that the library has to fit: install torch first,
then this package with --no-build-isolation. Where something is missing, or the compilation fails, the package installs
without the library and says so in one line; the kernels in plain torch operations then take its place. Everything else
about the package is in pyproject.toml.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NAME = "syncbn._native"
SOURCES = Path("syncbn", "csrc")

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    MISSING = f"torch cannot be imported while building ({error}); install it first, then use --no-build-isolation"
else:
    MISSING = None


def extension() -> Extension:
    """The library, whose compilation knows torch where that is there."""
    files = {
        "sources": sorted(str(path) for path in SOURCES.glob("*.cpp")),
        "depends": [*sorted(str(path) for path in SOURCES.glob("*.h")), "setup.py"],
    }
    if MISSING:
        return Extension(NAME, **files)
    openmp = ["-fopenmp"] if torch.backends.openmp.is_available() and sys.platform == "linux" else []
    return Extension(
        NAME,
        **files,
        include_dirs=cpp_extension.include_paths(),
        library_dirs=cpp_extension.library_paths(),
        libraries=["c10", "torch_cpu", "torch"],
        define_macros=[("SYNCBN_TORCH_VERSION", f'"{torch.__version__}"')],
        extra_compile_args=[
            "-O3",
            "-g0",
            "-fvisibility=hidden",
            "-fno-math-errno",
            "-fno-trapping-math",  # what vectors need; NaN and Inf keep their meaning
            *openmp,  # ATen's own threads; without it the kernels run on one
        ],
        extra_link_args=openmp,
    )


class SkipNative(build_ext):
    """Builds nothing."""

    def run(self) -> None:
        """Says what is missing."""
        self.extensions = []  # nothing to look for among the outputs
        say(MISSING)


def say(why: str) -> None:
    """Writes the one line about a package without native kernels."""
    sys.stderr.write(f"syncbn: installing without the native kernels: {why}\n")


def command() -> type[build_ext]:
    """The build_ext that fits this environment."""
    if MISSING:
        return SkipNative

    # ninja compiles files side by side, and only those that changed.
    options = {"use_ninja": cpp_extension.is_ninja_available(), "no_python_abi_suffix": True}

    class BuildNative(cpp_extension.BuildExtension.with_options(**options)):
        """Builds the library, or says why not."""

        def run(self) -> None:
            """Builds what is out of date."""
            library = Path(self.get_ext_fullpath(NAME))
            # A library is also stale when torch is another, which no file's date tells.
            if library.exists() and f"for torch {torch.__version__};".encode() not in library.read_bytes():
                self.force = True
            try:
                super().run()
            except Exception as error:  # whatever the reason, the package works without
                library.unlink(missing_ok=True)  # it would be an older one, of other sources
                self.extensions = []
                say(f"{type(error).__name__}: {error}")

    return BuildNative


setup(ext_modules=[extension()], cmdclass={"build_ext": command()})
