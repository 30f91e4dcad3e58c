"""How long `import service.api.app` takes, and what it brings along.

    python -m benchmarks.api_import

Median of nine fresh processes; wall time of the import alone, the interpreter's own start left out.
"""

import statistics
import subprocess
import sys

from benchmarks import results

TARGET_S = 0.8
RUNS = 9
CODE = """
import sys, time
started = time.perf_counter()
import service.api.app
print(time.perf_counter() - started, "torch" in sys.modules, "ray" in sys.modules)
"""


def main() -> None:
    answers = [
        subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(RUNS + 1)  # the first warms the disk cache
    ][1:]
    assert all(answer[1:] == ["False", "False"] for answer in answers), "torch or ray came along"
    times_s = sorted(float(answer[0]) for answer in answers)
    median_s = statistics.median(times_s)
    figure = f"median {median_s:.2f} s of {RUNS} (target ≤ {TARGET_S:g} s)"
    report = f"`import service.api.app`: {figure}; neither torch nor ray"
    results.record("api_import", {"seconds": {"median": median_s, "all": times_s}}, report)


if __name__ == "__main__":
    main()
