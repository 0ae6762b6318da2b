"""How long parts of a step take, and how much memory they need, on a CPU or a GPU."""

import sys
import time

import torch
from torch import Tensor

from benchmarks.measure import reset_high_water_mark, status_bytes


class StepTimer:
    """How long a step takes, and which part of it lies behind the embeddings: the loss and its gradient.

    On a GPU the marks in time are events, so that taking one does not wait.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: dict[str, float | torch.cuda.Event] = {}

    def _mark(self, name: str) -> None:
        if self._cuda:
            self._marks[name] = torch.cuda.Event(enable_timing=True)
            self._marks[name].record()
        else:
            self._marks[name] = time.perf_counter()

    def _seconds(self, start: str, end: str) -> float:
        first, last = self._marks[start], self._marks[end]
        if not self._cuda:
            return last - first
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def start(self) -> None:
        self._marks.clear()
        self._mark("start")

    def embedded(self, embeddings: Tensor) -> None:
        """The network has given ``embeddings``; when backward comes back to them, the loss is over."""
        self._mark("embedded")
        embeddings.register_hook(lambda _: self._mark("loss over"))

    def stop(self) -> tuple[float, float]:
        """Seconds of the step, and of the loss in it."""
        self._mark("stop")
        return self._seconds("start", "stop"), self._seconds("embedded", "loss over")


class PeakMemory:
    """The most memory in use between ``start`` and ``stop``, over all such spans.

    On a GPU that of tensors; on a CPU what the whole process holds, Python and libraries included.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.of = "tensors on the GPU" if self._cuda else "the process"
        self.bytes: int | None = None  # stays None where the system does not tell (Linux does)

    def start(self) -> None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            reset_high_water_mark()

    def stop(self) -> None:
        if self._cuda:
            peak = torch.cuda.max_memory_allocated()
        elif sys.platform == "linux":
            peak = status_bytes("VmHWM")
        else:
            return
        self.bytes = max(self.bytes or 0, peak)
