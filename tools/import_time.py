"""``python -m tools.import_time``: the processor time that importing dml_cuda adds to importing torch.

Measured inside one process, after torch: the difference of two processes would be lost in the spread of
torch's own seconds. Garbage is collected before: a collection of torch's objects, some 90 ms, falls into the
import of whatever follows. ``python -X importtime -c "import dml_cuda"`` lists the modules.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

MOST_MS = 60  # what dml_cuda may add
IMPORT = """
import gc, json, sys, time
import torch

gc.collect()
start = time.process_time()
import dml_cuda
seconds = time.process_time() - start
dynamo = [name for name in sys.modules if name.startswith("torch._dynamo")]
print(json.dumps({"torch": start, "dml_cuda": seconds, "dynamo": dynamo}))
"""


def measurements(python: str | Path, count: int) -> Iterator[dict]:
    """One import each. The first is not counted: it may write bytecode, which pip's installation brings."""
    unwanted = ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in unwanted}
    command = [str(python), "-c", IMPORT]
    with tempfile.TemporaryDirectory() as folder:
        for run in range(count + 1):
            result = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, check=True)
            if run:
                yield json.loads(result.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has dml_cuda installed")
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    runs = list(measurements(options.python, options.runs))
    for name in ("torch", "dml_cuda"):
        times = [1000 * run[name] for run in runs]
        limit = f", limit {MOST_MS}" if name == "dml_cuda" else ""
        spread = f"{min(times):.1f} to {max(times):.1f}"
        print(f"{name}: median {statistics.median(times):.1f} ms{limit}, of {len(runs)} runs ({spread})")


if __name__ == "__main__":
    main()
