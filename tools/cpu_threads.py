"""How evenly the CPU engine's work falls on threads, more than this machine has cores or as many.

For any number of threads: the engine runs on one thread, cut as for T, and notes how long each task took. The
tasks of a parallel region are then dealt out as the engine deals them (whoever is free takes the next), which
gives the region's critical path; what runs outside of regions counts as serial. Times are medians over some
rounds, of each task. The efficiency is the threads' work over T times the sum of critical paths and serial
time: 1 is even. Waking threads and sharing bandwidth are not in it, but one core's caches, which see all of
the work and so forget more between regions than each of T cores would. Run it on a quiet machine.

Where there are T cores it is measured as well: the processor time of all threads, which wait passively, over
T times that of the busiest; beside it that of three bare matrix products, and how many times faster T threads
are than one.

    python -m tools.cpu_threads [--out FILE.json]
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded: who waits takes no time

import argparse
import heapq
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import dml_cuda
from benchmarks.cases import Case
from benchmarks.peers import loss_step, matmuls
from dml_cuda import _C

CASES = [  # rows, dimensions, threads
    (512, 128, 8),
    (512, 512, 8),
    (1024, 512, 16),
    (2048, 512, 16),
    (2048, 512, 32),
]
LOSSES = {
    "all pairs": dml_cuda.MultiSimilarityLoss(),
    "mined": dml_cuda.MultiSimilarityLoss(epsilon=0.1),
}
ROUNDS = 15
SECONDS = 0.7  # of measuring each step on this machine's cores


def critical_path(tasks: list[float], threads: int) -> float:
    """When the last of the threads is done, each taking the next task as soon as it is free."""
    free = [0.0] * threads
    for seconds in tasks:
        heapq.heappush(free, heapq.heappop(free) + seconds)
    return max(free)


def batch(rows: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) // 4
    centres = torch.randn(rows // 4, dim, generator=generator)
    return (centres[labels] + 2 * torch.randn(rows, dim, generator=generator)).requires_grad_(), labels


def run_once(loss: torch.nn.Module, embeddings: torch.Tensor, labels: torch.Tensor, threads: int):
    """The threads of each region and the seconds of its tasks, of forward and backward; and the rest."""
    _C.start_task_log(threads)
    start = time.perf_counter()
    torch.autograd.grad(loss(embeddings, labels), embeddings)
    total = time.perf_counter() - start
    regions = _C.end_task_log()
    return regions, total - sum(sum(tasks) for _, tasks in regions)


def efficiency(loss: torch.nn.Module, rows: int, dim: int, threads: int) -> float:
    """Of the median time of each task, and of what is serial, over some rounds: so that what interrupted
    one of them for a moment does not count."""
    embeddings, labels = batch(rows, dim)
    rounds = [run_once(loss, embeddings, labels, threads) for _ in range(ROUNDS)]
    serial = statistics.median(rest for _, rest in rounds)
    work = path = 0.0
    for same in zip(*(regions for regions, _ in rounds), strict=True):
        tasks = [statistics.median(times) for times in zip(*(tasks for _, tasks in same), strict=True)]
        work += sum(tasks)
        path += critical_path(tasks, same[0][0])
    return (work + serial) / (threads * (path + serial))


# ---- on the cores of this machine -----------------------------------------------------------------------


def processor_seconds() -> dict[int, float]:
    """What each thread of this process has taken so far; as pthread_getcpuclockid names its clock."""
    tasks = map(int, os.listdir("/proc/self/task"))
    return {task: time.clock_gettime((~task << 3) | 6) for task in tasks}


def measure(step: Callable[[], object], threads: int) -> tuple[float, float]:
    """The threads' processor time over T times the busiest one's, and the seconds that a call takes."""
    torch.set_num_threads(threads)
    for _ in range(5):
        step()
    before, start, calls = processor_seconds(), time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        step()
        calls += 1
    seconds = (time.perf_counter() - start) / calls
    taken = [after - before.get(task, 0.0) for task, after in processor_seconds().items()]
    return sum(taken) / (threads * max(taken)), seconds


def steps(rows: int, dim: int) -> dict[str, Callable[[], object]]:
    case, points = Case("threads", "multi_similarity", rows, dim), batch(rows, dim)
    losses = {name: loss_step(case, loss, *points) for name, loss in LOSSES.items()}
    return losses | {"three matmuls": matmuls(case, *points)}


def measured(rows: int, dim: int, threads: int) -> dict[str, dict[str, float]]:
    found = {}
    for name, step in steps(rows, dim).items():
        alone = measure(step, 1)[1]
        even, seconds = measure(step, threads)
        found[name] = {"even": even, "times_one_thread": alone / seconds}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the numbers as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, cores = [], len(os.sched_getaffinity(0))
    print("from the times of tasks")
    print(f"{'':>24}" + "".join(f"{name:>12}" for name in LOSSES))
    for n, dim, threads in CASES:
        found = {name: efficiency(loss, n, dim, threads) for name, loss in LOSSES.items()}
        rows.append({"rows": n, "dim": dim, "threads": threads, "from_tasks": found})
        print(f"{f'{n} x {dim}, {threads} threads':>24}" + "".join(f"{e:12.2f}" for e in found.values()))
    here = [row for row in rows if row["threads"] <= cores]
    if here:
        print(f"measured on {cores} cores: even, and times one thread")
    for row in here:
        row["measured"] = measured(row["rows"], row["dim"], row["threads"])
        what = f"{row['rows']} x {row['dim']}, {row['threads']} threads"
        told = (
            f"{name} {m['even']:.2f}, {m['times_one_thread']:.1f}x" for name, m in row["measured"].items()
        )
        print(f"{what:>24}  " + "; ".join(told))
    if options.out:
        options.out.write_text(json.dumps({"cores": cores, "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
