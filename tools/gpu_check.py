"""All checks that need a GPU: ``make gpu-check``, or ``python -m tools.gpu_check PART ..``.

First the engine's stand-alone driver (``tools.bench_kernels``), which needs no extension: constants of the
hardware, every loss, times; then it under a profiler and a race detector. Then the extension: its build, the
tests, the host's time, the kernels' times, small cases under compute-sanitizer (memcheck, racecheck), and
benchmarks; batches too large for a matrix are a part of their own. Each part can be run alone and ends within
eight minutes; ``--minutes`` bounds them all. What passed becomes one line of ``benchmarks/VERIFIED.md``;
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERIFIED = ROOT / "benchmarks" / "VERIFIED.md"
LIMIT_SECONDS = 480
KERNEL_TESTS = ["tests/cuda/test_cuda.py", "tests/cuda/test_devices.py"]
# The emulator's tests run their small kernels on the GPU too: do both agree on what PTX means?
GPU_TESTS = [*KERNEL_TESTS, "tests/cuda/test_ring_cuda.py", "tests/emulator/test_emulator.py"]
HOPPER_TESTS = [f"tests/emulator/test_{name}_emulated.py" for name in ("hopper", "tile_similarities")]
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


@dataclass(frozen=True)
class Part:
    """Commands that run in order, and the seconds that they take together, about."""

    seconds: int
    commands: list[list[str]]


def driver(*parts: str) -> list[str]:
    return [sys.executable, "-m", "tools.bench_kernels", *parts]


def profiled(*tool: str) -> list[str]:
    """The stand-alone driver under a tool of CUDA."""
    return [sys.executable, "-m", "tools.bench_kernels", "--under", " ".join(tool)]


def known_parts(out: Path, gpu: str, seconds: float) -> dict[str, Part]:
    """In order: what says most first."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    ncu = "ncu", "--kernel-name", "regex:similarities|finish_matrix_rows|matrix_gradient", "-c", "24"
    race = "compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "1"
    kernel_tests = [*PYTEST, *SHARED, *GPU_TESTS, "-k", "not race_detector"]  # which needs no GPU
    dependent = driver("dependent", "constants"), driver("dependent", "cases", "times")
    wgmma_tests = [*PYTEST, *SHARED, *HOPPER_TESTS, "-k", "gpu"]
    python = sys.executable, "-m"
    return {
        "driver": Part(240, [driver("constants"), driver("check"), driver("times"), *dependent]),
        "profile": Part(120, [[*profiled(*ncu), "times"], [*profiled(*race), "cases"]]),
        "build": Part(60, [[sys.executable, "setup.py", "build_ext", "--inplace"]]),
        "tests": Part(120, [kernel_tests]),
        # wgmma is checked against mma before anything is timed with it.
        "hopper": Part(60, [wgmma_tests, driver("wgmma", "check"), driver("wgmma", "times")]),
        "host": Part(20, [[*python, "tools.host_times"]]),
        "kernels": Part(60, [[*python, "tools.kernel_times", "--out", str(out / f"{name}-kernels.json")]]),
        "memcheck": Part(300, [sanitizer("memcheck")]),
        "racecheck": Part(300, [sanitizer("racecheck")]),
        "benchmark": Part(
            450,
            [
                benchmark(out, f"{name}-triplets", seconds, "triplets"),
                benchmark(out, name, seconds, "train", "pml", "forward", "drop-in"),
                benchmark(out, f"{name}-family", seconds, "family"),
            ],
        ),
        "memory": Part(300, [benchmark(out, f"{name}-memory", seconds, "memory")]),
    }


# Parts that run the extension, and so need what "build" makes.
OF_THE_EXTENSION = {"tests", "hopper", "host", "kernels", "memcheck", "racecheck", "benchmark", "memory"}


class Budget:
    """What is left of so many minutes; without a number, each command has its limit only."""

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.end = None if minutes is None else clock() + 60 * minutes

    def left(self) -> float:
        return LIMIT_SECONDS if self.end is None else min(self.end - self.clock(), LIMIT_SECONDS)


def run_parts(
    parts: dict[str, Part], budget: Budget, run: Callable[[list[str], float], bool]
) -> dict[str, bool | None]:
    """Whether each part passed; None: left out, as there was not time for half of it."""
    outcome = {}
    for name, part in parts.items():
        if budget.left() < part.seconds / 2 and budget.end is not None:
            outcome[name] = None
            print(f"{name}: left out, {budget.left():.0f} s left of {part.seconds} wanted\n")
            continue
        if name in OF_THE_EXTENSION and outcome.get("build") is False:
            outcome[name] = None
            print(f"{name}: left out, the build failed\n")
            continue
        start = budget.clock()
        passed = [run(command, budget.left()) for command in part.commands]
        outcome[name] = all(passed)
        print(f"{name}: {STATES[outcome[name]]}, {budget.clock() - start:.0f} s\n")
    return outcome


STATES = {True: "passed", False: "FAILED", None: "left out"}


def gpu_name() -> str:
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu-check needs a GPU that torch can see; torch.cuda.is_available() is False here")
    return torch.cuda.get_device_name()


def commit() -> str:
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    found = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def run(command: list[str], seconds: float) -> bool:
    environment = {**os.environ, "DML_CUDA_BUILD": "cuda", "PYTHONUNBUFFERED": "1"}
    print("$", " ".join(command), flush=True)
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=max(seconds, 1), check=False)
    except subprocess.TimeoutExpired:
        print(f"ended after {seconds:.0f} s", flush=True)
        return False
    except FileNotFoundError as error:
        print(error, flush=True)
        return False
    return done.returncode == 0


def record(gpu: str, outcome: dict[str, bool | None]) -> None:
    """One more line of the table in VERIFIED.md."""
    import torch

    parts = ", ".join(f"{part} {STATES[passed]}" for part, passed in outcome.items())
    line = f"| {commit()} | {gpu} | {torch.version.cuda} | {torch.__version__} | {parts} |\n"
    with VERIFIED.open("a") as table:
        table.write(line)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="some of them, in the order given (all)")
    parser.add_argument("--minutes", type=float, help="the time for all; parts that do not fit are left out")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="where JSON goes")
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring each case (2)")
    arguments = parser.parse_args()
    gpu = gpu_name()
    known = known_parts(arguments.out, gpu, arguments.seconds)
    unknown = set(arguments.parts) - set(known)
    if unknown:
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    wanted = {name: known[name] for name in arguments.parts or known}
    outcome = run_parts(wanted, Budget(arguments.minutes), run)
    record(gpu, outcome)
    for part, passed in outcome.items():
        print(f"{part:10} {STATES[passed]}")
    return 0 if all(passed is not False for passed in outcome.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
