"""``python -m benchmarks.two_towers``: losses of two towers against plain PyTorch.

CLIP's and SigLIP's loss with parameters that learn: fused, eager, compiled, and over chunks of rows
that are recomputed in backward; beside them NT-Xent one way on the same points. Times in turns, and peaks of
memory.

A peer is left out of a size where its step would take longer than ``--limit``, or more memory than there is,
by what it took at the size before. A compiled loss is left out where compiling takes longer than
``--compile-limit``, as on a machine that is busy otherwise. The record says so in place of the times.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dml_cuda

from .machine import describe
from .measure import available_bytes, make_clock, measure, summarise
from .records import write_json

SIZES = ((2048, 512), (8192, 512), (32768, 512))
DTYPES = ("float32", "bfloat16")
CHUNK = 1024  # rows
LIMIT, COMPILE_LIMIT = 60.0, 120.0  # seconds of a step, and of compiling one
_LONG = 2.0  # seconds of a step beyond which one sample is enough
_MOST_BESIDE = 8192  # rows up to which fused losses are compared with each other too
_SHARE = 0.8  # of the free memory that a step may take

Loss = Callable[[Tensor, Tensor], Tensor]


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=1).to(x.dtype)


def clip(a: Tensor, b: Tensor, temperature: Tensor) -> Tensor:
    logits = (_unit(a) @ _unit(b).T).float() / temperature
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def siglip(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = (_unit(a) @ _unit(b).T).float() * scale + bias
    z = 2 * torch.eye(len(a), device=a.device) - 1
    return -F.logsigmoid(z * logits).sum() / len(a)


def _clip_chunk(a: Tensor, b: Tensor, temperature: Tensor, first: int) -> Tensor:
    logits = (a @ b.T).float() / temperature
    return F.cross_entropy(logits, torch.arange(first, first + len(a), device=a.device), reduction="sum")


def _siglip_chunk(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, first: int) -> Tensor:
    logits = (a @ b.T).float() * scale + bias
    z = torch.full_like(logits, -1.0)
    z[torch.arange(len(a)), torch.arange(first, first + len(a))] = 1.0
    return -F.logsigmoid(z * logits).sum()


def _over_chunks(chunk: Callable[..., Tensor], a: Tensor, b: Tensor, *learned: Tensor) -> Tensor:
    first = range(0, len(a), CHUNK)
    parts = (checkpoint(chunk, a[k : k + CHUNK], b, *learned, k, use_reentrant=False) for k in first)
    return sum(parts) / len(a)


def chunked_clip(a: Tensor, b: Tensor, temperature: Tensor) -> Tensor:
    a, b = _unit(a), _unit(b)
    return (_over_chunks(_clip_chunk, a, b, temperature) + _over_chunks(_clip_chunk, b, a, temperature)) / 2


def chunked_siglip(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return _over_chunks(_siglip_chunk, _unit(a), _unit(b), scale, bias)


PLAIN = {"CLIP": (clip, chunked_clip), "SigLIP": (siglip, chunked_siglip)}
FUSED = {"CLIP": dml_cuda.CLIPLoss, "SigLIP": dml_cuda.SigLIPLoss}
PARAMETERS = {"CLIP": {"temperature": 0.07}, "SigLIP": {"scale": 10.0, "bias": -10.0}}


def step_of(loss: Loss, a: Tensor, b: Tensor, learned: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """One forward and backward pass."""

    def step():
        value = loss(a, b)
        return value.detach(), *torch.autograd.grad(value, [a, b, *learned])

    return step


def peers(name: str, n: int, device: str) -> dict[str, tuple[Loss, list[Tensor]]]:
    """The implementations of a loss, and what learns in each."""
    values = PARAMETERS[name].items()
    learned = {key: nn.Parameter(torch.tensor(value, device=device)) for key, value in values}
    plain, chunked = (partial(function, **learned) for function in PLAIN[name])
    found = {
        "fused": (FUSED[name](**learned), list(learned.values())),
        "chunked": (chunked, list(learned.values())),
        "eager": (plain, list(learned.values())),
        "compiled": (torch.compile(plain, fullgraph=True, dynamic=False), list(learned.values())),
    }
    if n <= _MOST_BESIDE:
        one_way, rows = dml_cuda.NTXentLoss(), torch.arange(n, device=device)
        found["fused, fixed"] = FUSED[name](**PARAMETERS[name]), []
        found["NT-Xent one way"] = lambda a, b: one_way(a, rows, ref_emb=b, ref_labels=rows), []
    return found


def points(n: int, d: int, dtype: str, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(2, n, d, generator=generator).to(device, getattr(torch, dtype))
    a, b = (x.clone().requires_grad_() for x in both)
    return a, b


def _compile(name: str, n: int, d: int, dtype: str, device: str) -> None:
    a, b = points(n, d, dtype, device)
    loss, learned = peers(name, n, device)["compiled"]
    step_of(loss, a, b, learned)()


def compiles_within(seconds: float, *case) -> bool:
    """Compiles a loss in another process, whose result torch's cache keeps for this one."""
    process = multiprocessing.get_context("spawn").Process(target=_compile, args=case)
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode == 0


class LeftOut:
    """Which peers are too slow or too large for a case, by what they took before."""

    def __init__(self, limit: float, device: str) -> None:
        self.limit, self.device = limit, torch.device(device)
        self.last: dict[tuple, tuple[int, int, dict]] = {}

    def note(self, key: tuple, n: int, d: int, result: dict) -> None:
        self.last[key] = n, d, result

    def reason(self, key: tuple, n: int, d: int) -> dict | None:
        """What a record holds in place of the times, or None."""
        if key not in self.last:
            return None
        n0, d0, result = self.last[key]
        if "skipped" in result:
            return result
        needed = (result["peak_bytes"] or 0) * (n / n0) ** 2
        if needed > _SHARE * available_bytes(self.device) and not key[-1].startswith("fused"):
            return {"skipped": f"needs {needed / 2**30:.0f} GiB"}
        expected = result["median_s"] * (n / n0) ** 2 * (d / d0)
        return {"skipped": f"over {self.limit:g} s"} if expected > self.limit else None


def run(
    sizes=SIZES,
    dtypes=DTYPES,
    seconds: float = 4.0,
    device: str = "cpu",
    limit: float = LIMIT,
    compile_limit: float = COMPILE_LIMIT,
) -> Iterator[dict]:
    """A case at a time, the small ones first."""
    clock, left_out = make_clock(device), LeftOut(limit, device)
    for n, d in sizes:
        for dtype in dtypes:
            for name in FUSED:
                results = _run_case(name, n, d, dtype, device, clock, seconds, left_out, compile_limit)
                yield {"loss": name, "n": n, "d": d, "dtype": dtype, "results": results}


def _peak_and_seconds(clock, step: Callable) -> tuple[int | None, float]:
    """What one step needs."""
    seconds = []
    peak = clock.peak_bytes(lambda: seconds.append(clock.time(step)))
    return peak, seconds[0]


def _run_case(name, n, d, dtype, device, clock, seconds, left_out: LeftOut, compile_limit) -> dict[str, dict]:
    torch._dynamo.reset()  # else it gives up on a function that it has compiled for many sizes
    a, b = points(n, d, dtype, device)
    results: dict[str, dict] = {}
    steps, rare = {}, {}
    for peer, (loss, learned) in peers(name, n, device).items():
        reason = left_out.reason((name, dtype, peer), n, d)
        if reason is None and peer == "compiled":
            start = time.perf_counter()
            if not compiles_within(compile_limit, name, n, d, dtype, device):
                reason = {"skipped": f"compiles over {compile_limit:g} s"}
            results[peer] = {"compile_s": time.perf_counter() - start}
        if reason is not None:
            results[peer] = reason
            continue
        step = step_of(loss, a, b, learned)
        if peer == "compiled":
            step()  # reads what the other process compiled
        peak, first = _peak_and_seconds(clock, step)
        results[peer] = {**results.get(peer, {}), "peak_bytes": peak}
        if first > _LONG:
            rare[peer] = first
        else:
            steps[peer] = step
    for peer, samples in measure(steps, clock, seconds, dict.fromkeys(steps, 3)).items():
        results[peer] |= summarise(samples)
    for peer, first in rare.items():
        results[peer] |= summarise([first])
    for peer, result in results.items():
        left_out.note((name, dtype, peer), n, d, result)
    return results


def _print(case: dict) -> None:
    fused = case["results"]["fused"].get("median_s")
    print(f"{case['loss']} {case['n']} x {case['d']} {case['dtype']}")
    for peer, result in case["results"].items():
        if "skipped" in result:
            print(f"  {peer:16} left out: {result['skipped']}")
            continue
        peak = result["peak_bytes"]
        memory = "" if peak is None else f"{peak / 2**20:8.0f} MiB"
        ratio = f"{result['median_s'] / fused:7.2f} x" if fused else ""
        print(f"  {peer:16} {1e3 * result['median_s']:9.2f} ms {ratio:9} {memory}")


def main(options: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_towers", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=int, nargs="+", help="only these N")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of a step")
    parser.add_argument("--compile-limit", type=float, default=COMPILE_LIMIT, help="seconds of compiling one")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"))
    chosen = parser.parse_args(options)
    sizes = [size for size in SIZES if not chosen.rows or size[0] in chosen.rows]
    limits = chosen.limit, chosen.compile_limit
    path = chosen.out / f"{chosen.device}-two-towers.json"
    record = {"kind": "two_towers", "machine": describe(chosen.device), "cases": []}
    for case in run(sizes, chosen.dtypes, chosen.seconds, chosen.device, *limits):
        _print(case)
        record["cases"].append(case)
        write_json(record, path)  # what was measured stays if a later case is interrupted
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
