"""The API starts quickly and drags in neither torch nor Ray."""

import json
import statistics
import subprocess
import sys

# Processor time, not the clock on the wall, so that a busy machine does not decide; FastAPI itself is measured in the
# same process, since on a throttled one the same import takes twice as long.
MEASURE = """
import json, sys, time
start = time.process_time()
import fastapi
framework = time.process_time()
import service.api.app
end = time.process_time()
loaded = [name for name in ("torch", "ray", "service.store", "service.storage", "uvicorn") if name in sys.modules]
print(json.dumps({"framework": framework - start, "all": end - start, "loaded": loaded}))
"""


def test_import_is_fast_and_loads_no_heavy_package():
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", MEASURE], check=True, capture_output=True, text=True).stdout)
        for _ in range(9)
    ]
    assert [run["loaded"] for run in runs] == [[]] * 9
    took_s = statistics.median(run["all"] for run in runs)
    framework_s = statistics.median(run["framework"] for run in runs)
    assert took_s <= max(0.8, 2 * framework_s), f"import took {took_s:.2f} s, of which FastAPI {framework_s:.2f} s"
