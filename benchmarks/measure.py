"""How it is measured: clocks, interleaved rounds, and the peak of memory."""

import ctypes
import gc
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

_SHORTEST_SAMPLE = 5e-3  # seconds; shorter steps are repeated within a sample
_MOST_SAMPLES = 30


class CpuClock:
    """Wall time."""

    def time(self, step: Callable, repeats: int = 1) -> float:
        """Seconds that one ``step()`` takes, over ``repeats`` of them."""
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - start) / repeats

    def repeats(self, seconds: float) -> int:
        return max(1, round(_SHORTEST_SAMPLE / max(seconds, 1e-9)))

    def peak_bytes(self, step: Callable) -> int | None:
        """How far ``step()`` raises resident memory, or None where the system cannot tell (Linux can)."""
        gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)  # else memory freed by the peer before hides this one's need
            reset_high_water_mark()
        except (OSError, AttributeError):
            return None
        before = status_bytes("VmRSS")
        result = step()  # alive until the mark is read: a gradient counts
        peak = status_bytes("VmHWM") - before
        del result
        return max(0, peak)


class CudaClock:
    """CUDA events, with the L2 cache emptied before each step."""

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(4 * cache, dtype=torch.uint8, device="cuda")

    def time(self, step: Callable, repeats: int = 1) -> float:
        """Median seconds between the events around a ``step()``."""
        times = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            start.record()
            step()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return float(np.median(times))

    def host_time(self, step: Callable, repeats: int = 20) -> float:
        """Median seconds until ``step()`` returns, the device still at work."""
        times = []
        for _ in range(repeats):
            torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        return float(np.median(times))

    def repeats(self, seconds: float) -> int:
        return 5 if seconds < _SHORTEST_SAMPLE else 1

    def peak_bytes(self, step: Callable) -> int:
        """How far ``step()`` raises the memory that tensors occupy."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def make_clock(device: str) -> CpuClock | CudaClock:
    return CudaClock() if device == "cuda" else CpuClock()


def reset_high_water_mark() -> None:
    """Lets VmHWM of this process begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def status_bytes(field: str) -> int:
    """A size that the system tells of this process, such as VmRSS or VmHWM; OSError where it does not."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def plan_rounds(counts: dict[str, int], seed: int = 0) -> list[list[str]]:
    """Rounds in which each name occurs ``counts[name]`` times, spread evenly, in shuffled order.

    Measuring in rounds lets a change in the machine's speed meet all peers alike.
    """
    shuffle = random.Random(seed).shuffle
    total = max(counts.values(), default=0)
    rounds = []
    for i in range(total):
        names = [name for name, n in counts.items() if (i + 1) * n // total > i * n // total]
        shuffle(names)
        rounds.append(names)
    return rounds


def measure(
    steps: dict[str, Callable], clock, budget: float, at_least: dict[str, int]
) -> dict[str, list[float]]:
    """Times in seconds of each step, warm already, in about ``budget`` seconds divided among them.

    ``at_least`` is the fewest samples to take of each.
    """
    estimates = {name: clock.time(step) for name, step in steps.items()}
    repeats = {name: clock.repeats(seconds) for name, seconds in estimates.items()}
    counts = {}
    for name, seconds in estimates.items():
        affordable = int(budget / len(steps) / (seconds * repeats[name]))
        counts[name] = min(_MOST_SAMPLES, max(at_least[name], affordable))
    samples: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    gc.disable()  # as timeit does: a collection is nobody's own time
    try:
        for names in plan_rounds(counts):
            for name in names:
                samples[name].append(clock.time(steps[name], repeats[name]))
    finally:
        gc.enable()
    return samples


def summarise(samples: list[float]) -> dict:
    """Median and quartiles of some times."""
    q1, median, q3 = np.percentile(samples, [25, 50, 75])
    return {"median_s": float(median), "q1_s": float(q1), "q3_s": float(q3), "samples": len(samples)}


def available_bytes(device: torch.device) -> int | float:
    """Memory that is free; infinite where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), math.inf)
