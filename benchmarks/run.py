"""Runs cases: each gives a record of plain numbers, ready for JSON."""

import time
from collections.abc import Iterable
from dataclasses import asdict

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .cases import CUDA_GRAPH_LIMIT, DENSE_PEERS, Case, DropInCase, make_batch
from .chunked import kept_share
from .drop_in import PARTS
from .machine import describe
from .measure import make_clock, measure, summarise
from .peers import PEERS, Maker, Step, Unavailable
from .records import ratios
from .roofline import roofline
from .triplets import TRIPLET_PARTS

_YARDSTICKS = ("reference", "chunked", "pml", "fused")  # the first that ran is what the others should equal
_CAREFUL = ("matmuls", "fused", "fused_graph")  # the ratio that matters most is between these


def _relative_difference(value: torch.Tensor, truth: torch.Tensor) -> float:
    value, truth = value.double(), truth.double()
    return float((value - truth).norm() / truth.norm().clamp(min=1e-30))


def _differences(
    compared: tuple[str, ...], outputs: dict[str, tuple[torch.Tensor, ...]]
) -> dict[str, dict[str, float]]:
    """How far each peer's outputs, ``compared`` by these names, lie from the yardstick's."""
    yardstick = next((outputs[name] for name in _YARDSTICKS if name in outputs), ())
    differences = {}
    for name, output in outputs.items():
        pairs = zip(compared, output, yardstick, strict=False)
        differences[name] = {key: _relative_difference(a, b) for key, a, b in pairs}
    return differences


def _detached(step: Step) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.detach() for tensor in step())


def _measure_once(step: Step, clock) -> tuple[tuple, dict]:
    """Output, and time and memory of one cold call."""
    kept = {}

    def timed():
        kept["seconds"] = clock.time(lambda: kept.update(output=_detached(step)))

    peak = clock.peak_bytes(timed)
    return kept["output"], {"peak_bytes": peak, **summarise([kept["seconds"]])}


def _warm_up(step: Step, clock) -> tuple[tuple, dict]:
    """Output of a first call, which compiles and fills caches; memory of a second."""
    output = _detached(step)
    return output, {"peak_bytes": clock.peak_bytes(step)}


def _makers(case: Case) -> dict[str, Maker]:
    return (PARTS | TRIPLET_PARTS)[case.part] if isinstance(case, DropInCase) else PEERS


def _wanted(case: Case, device: str, only_peers: Iterable[str] | None) -> list[str]:
    names = list(case.peers)
    if device == "cuda" and not case.once and "fused_graph" in _makers(case):
        names.append("fused_graph")
    return [name for name in names if only_peers is None or name in only_peers]


def _measure_peers(case: Case, embeddings, labels, names: list[str], clock, budget: float) -> dict[str, dict]:
    """Per peer: time, memory and difference from the reference, or why there is none."""
    steps, outputs, results = {}, {}, {}
    for name in names:
        try:
            step = _makers(case)[name](case, embeddings, labels)
            outputs[name], results[name] = (_measure_once if case.once else _warm_up)(step, clock)
            steps[name] = step
        except Unavailable as reason:
            results[name] = {"skipped": str(reason)}
        except (torch.OutOfMemoryError, MemoryError):
            results[name] = {"skipped": "out of memory"}
    for name, difference in _differences(case.compared, outputs).items():
        results[name] |= difference
    outputs.clear()
    if not case.once:
        at_least = {name: 7 if name in _CAREFUL else 3 for name in steps}
        for name, samples in measure(steps, clock, budget, at_least).items():
            results[name] |= summarise(samples)
    if embeddings.is_cuda and case.n <= CUDA_GRAPH_LIMIT:
        for name, step in steps.items():
            results[name]["host_s"] = clock.host_time(step)
    results.get("matmuls", {}).pop("peak_bytes", None)  # its buffers were there before
    return results


def run_case(
    case: Case, device: str = "cpu", budget: float = 4.0, only_peers: Iterable[str] | None = None
) -> dict:
    """Measure one case: time, memory and agreement of every peer that can run it."""
    torch.set_float32_matmul_precision(case.precision)
    embeddings, labels = make_batch(case, device)
    names = _wanted(case, device, only_peers)
    drop_in = isinstance(case, DropInCase)
    if drop_in:
        budget *= len(names) / len(DENSE_PEERS)  # no more for each of its few peers than elsewhere
    results = _measure_peers(case, embeddings, labels, names, make_clock(device), budget)
    record = {
        "name": case.name,
        **asdict(case),
        "loss_title": case.loss_title,
        "dtype_title": case.dtype_title,
        "passes": case.passes,
        "results": results,
        **ratios(results),
    }
    if drop_in:
        return record
    record["kept_share"] = kept_share(embeddings, labels, case.epsilon)
    if "median_s" in results.get("fused", {}):
        record["roofline"] = roofline(case, results["fused"]["median_s"], device)
    return record


def run_cases(cases: list[Case], device: str, seconds: float = 4.0, peers: list[str] | None = None) -> dict:
    """Measure the cases behind a progress bar; the record of the run, of fewer cases if interrupted."""
    started = time.perf_counter()
    records = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    precision = torch.get_float32_matmul_precision()
    try:
        with Progress(*columns, transient=True) as progress:
            task = progress.add_task("", total=len(cases))
            for case in cases:
                progress.update(task, description=case.name)
                records.append(run_case(case, device, seconds, peers))
                progress.advance(task)
    except KeyboardInterrupt:
        if not records:
            raise
    finally:
        torch.set_float32_matmul_precision(precision)
    return {
        "schema": 2,  # 1 had no drop-in cases, which have a part, columns and no kept_share
        "machine": describe(device),
        "seconds_per_case": seconds,
        "total_s": time.perf_counter() - started,
        "interrupted": len(records) < len(cases),
        "cases": records,
    }
