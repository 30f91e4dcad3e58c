"""Runs every benchmark, one after another: `make bench`.

python -m benchmarks.run_all
python -m benchmarks.run_all --quick   # those that can be tried in seconds; nothing is written
"""

import argparse
import subprocess
import sys
from pathlib import Path

QUICK = ("numerics", "cpu_kernels", "resnet_ddp")
BENCHMARKS = (
    *QUICK,
    "exchange",
    "api_import",
    "job_start",
    "data_loading",
    "checkpointing",
    "engine_throughput",
    "service_load",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repetitions; nothing is written")
    quick = parser.parse_args().quick
    failed = []
    for benchmark in QUICK if quick else BENCHMARKS:
        print(f"\n=== {benchmark}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{benchmark}", *(["--quick"] if quick else [])]
        if subprocess.call(command, cwd=Path(__file__).parents[1]) != 0:
            failed.append(benchmark)
    if failed:
        print(f"Failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
