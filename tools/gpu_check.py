"""All checks that need a GPU: ``make gpu-check``, or ``python -m tools.gpu_check PART ..``.

Builds the kernels for the GPU of this machine, runs the tests, runs small cases under compute-sanitizer
(memcheck, racecheck), and benchmarks; batches too large for a matrix are a part of their own. Each part can
be run alone and ends within eight minutes. What passed becomes one line of ``benchmarks/VERIFIED.md``;
benchmarks and the times of kernels become ``benchmarks/results/<gpu>.json`` and ``<gpu>-*.json``. It works
in the source tree, offline, with the Python that runs it.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERIFIED = ROOT / "benchmarks" / "VERIFIED.md"
LIMIT_SECONDS = 480
KERNEL_TESTS = ["tests/cuda/test_cuda.py", "tests/cuda/test_devices.py"]
# The emulator's tests run their small kernels on the GPU too: do both agree on what PTX means?
GPU_TESTS = [*KERNEL_TESTS, "tests/cuda/test_ring_cuda.py", "tests/emulator/test_emulator.py"]
PYTEST = [sys.executable, "-m", "pytest"]
# Several processes share the GPU, where pytest-xdist is there.
SHARED = ["-n", str(min(16, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []


def sanitizer(tool: str) -> list[str]:
    """The small cases of the GPU tests under one tool of compute-sanitizer."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    options = ["--tool", tool, "--error-exitcode", "1", "--launch-timeout", "120"]
    cases = "awkward_sizes or (losses_of_triplets and cuda)"
    return [program, *options, *PYTEST, *KERNEL_TESTS, "-k", cases]


def benchmark(out: Path, name: str, seconds: float, *groups: str) -> list[str]:
    where = ["--device", "cuda", "--out", str(out), "--name", name]
    return [sys.executable, "-m", "benchmarks", *where, "--seconds", str(seconds), "--cases", *groups]


def commands(out: Path, gpu: str, seconds: float) -> dict[str, list[list[str]]]:
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return {
        "build": [[sys.executable, "setup.py", "build_ext", "--inplace"]],
        "tests": [
            [*PYTEST, *SHARED, *GPU_TESTS, "-k", "not race_detector"],  # which needs no GPU
        ],
        "memcheck": [sanitizer("memcheck")],
        "racecheck": [sanitizer("racecheck")],
        "benchmark": [
            benchmark(out, name, seconds, "train", "pml", "forward", "drop-in"),
            benchmark(out, f"{name}-family", seconds, "family"),
            benchmark(out, f"{name}-triplets", seconds, "triplets"),
            [sys.executable, "-m", "tools.kernel_times", "--out", str(out / f"{name}-kernels.json")],
        ],
        "memory": [benchmark(out, f"{name}-memory", seconds, "memory")],
    }


def gpu_name() -> str:
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu-check needs a GPU that torch can see; torch.cuda.is_available() is False here")
    return torch.cuda.get_device_name()


def commit() -> str:
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    found = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def run(command: list[str]) -> bool:
    environment = {**os.environ, "DML_CUDA_BUILD": "cuda", "PYTHONUNBUFFERED": "1"}
    print("$", " ".join(command), flush=True)
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=LIMIT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        print(f"ended after {LIMIT_SECONDS} s", flush=True)
        return False
    except FileNotFoundError as error:
        print(error, flush=True)
        return False
    return done.returncode == 0


def record(gpu: str, outcome: dict[str, bool]) -> None:
    """One more line of the table in VERIFIED.md."""
    import torch

    parts = ", ".join(f"{part} {'passed' if passed else 'FAILED'}" for part, passed in outcome.items())
    line = f"| {commit()} | {gpu} | {torch.version.cuda} | {torch.__version__} | {parts} |\n"
    with VERIFIED.open("a") as table:
        table.write(line)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="build, tests, memcheck, racecheck, benchmark, memory (all)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="where JSON goes")
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring each case (2)")
    arguments = parser.parse_args()
    gpu = gpu_name()
    known = commands(arguments.out, gpu, arguments.seconds)
    wanted = arguments.parts or list(known)
    unknown = set(wanted) - set(known)
    if unknown:
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    outcome = {}
    for part in wanted:
        start = time.perf_counter()
        outcome[part] = all(run(command) for command in known[part])
        print(f"{part}: {'passed' if outcome[part] else 'FAILED'}, {time.perf_counter() - start:.0f} s\n")
        if part == "build" and not outcome[part]:
            break
    record(gpu, outcome)
    for part, passed in outcome.items():
        print(f"{part:10} {'passed' if passed else 'FAILED'}")
    return 0 if all(outcome.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
