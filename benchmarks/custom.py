"""``python -m benchmarks.custom``: what it costs to load a formula, and whether a custom formula is as fast.

Compiles circle loss from its own source into an empty cache, loads it again in a fresh process, and runs it
in turns with the circle loss that is built in.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import dml_cuda
from dml_cuda.custom import build

from .cases import Case, make_batch
from .measure import make_clock, measure, summarise
from .peers import loss_step

_CIRCLE = build.SOURCES / "losses" / "circle.h"
_PARAMETERS = {"m": 0.4, "gamma": 80.0, "detach_weights": 1.0}


def _load_again() -> float:
    """Seconds that compile_loss takes in a process that has not seen the formula."""
    code = (
        "import time, dml_cuda; start = time.perf_counter(); "
        f"dml_cuda.compile_loss({str(_CIRCLE)!r}); print(time.perf_counter() - start)"
    )
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)


def run(seconds: float = 4.0) -> dict:
    """Seconds to build and to load, and the time of the loaded loss over that of the built-in one."""
    device = "cuda" if torch.cuda.is_available() and dml_cuda.build_info()["cuda"] else "cpu"
    found: dict = {"device": device}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DML_CUDA_CACHE"] = folder
        start = time.perf_counter()
        loaded = dml_cuda.compile_loss(_CIRCLE)(**_PARAMETERS, reduction="mean_nonzero")
        found["build_s"] = time.perf_counter() - start
        found["load_s"] = min(_load_again() for _ in range(3))
    for n, d in ((512, 128), (2048, 512)):
        case = Case("custom", "circle", n, d, epsilon=None)
        batch = make_batch(case, device)
        losses = {"loaded": loaded, "built in": dml_cuda.CircleLoss()}
        steps = {name: loss_step(case, loss, *batch) for name, loss in losses.items()}
        for step in steps.values():
            step()
        times = measure(steps, make_clock(device), seconds, dict.fromkeys(steps, 5))
        medians = {name: summarise(samples)["median_s"] for name, samples in times.items()}
        best = {name: min(samples) for name, samples in times.items()}
        found[f"{n}x{d}"] = {
            "ratio_of_medians": medians["loaded"] / medians["built in"],
            "ratio_of_best": best["loaded"] / best["built in"],
        }
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.custom", description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each size (default %(default)s)")
    parser.add_argument("--out", type=Path, help="a JSON file to write to")
    arguments = parser.parse_args()
    text = json.dumps(run(arguments.seconds), indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")
