"""The variables of a training process: what it needs to run, and no secret."""

from collections.abc import Mapping

# A training process gets what it needs to run, and no secret of the service, of Ray, or of storage.
PASSED_NAMES = frozenset(
    {"HOME", "HOSTNAME", "LANG", "LANGUAGE", "LOGNAME", "PATH", "SHELL", "TMPDIR", "TZ", "USER", "VIRTUAL_ENV"}
)
PASSED_PREFIXES = ("LC_", "LD_", "PYTHON", "CUDA", "NVIDIA_", "NCCL_", "GLOO_", "TORCH", "OMP_", "MKL_", "GLIBC_")
# Comma-separated names of further variables to pass on, where the operator says so.
PASS_ENVIRONMENT = "SYNCBN_PASS_ENVIRONMENT"  # noqa: S105 - the name of a variable


def training_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Choose the variables that a training process gets.

    Args:
        environment: of the node's agent.
    """
    also = {name.strip() for name in environment.get(PASS_ENVIRONMENT, "").split(",")}
    passed = {
        name: value
        for name, value in environment.items()
        if name in PASSED_NAMES or name in also or name.startswith(PASSED_PREFIXES)
    }
    # Threads of a preloaded BLAS would not survive the fork.
    return passed | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
