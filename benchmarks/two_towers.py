"""``python -m benchmarks.two_towers``: losses of two towers against plain PyTorch.

CLIP's and SigLIP's loss with parameters that learn: fused, eager, compiled, and over chunks of rows
that are recomputed in backward; beside them NT-Xent one way on the same points. Times in turns, and peaks of
memory.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dml_cuda

from .machine import describe
from .measure import make_clock, measure, summarise
from .records import write_json

SIZES = ((2048, 256), (2048, 512), (8192, 512), (32768, 512))
DTYPES = ("float32", "bfloat16")
DENSE_LIMIT = 8192  # rows up to which N x N numbers are stored
CHUNK = 1024  # rows

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
        "fused, fixed": (FUSED[name](**PARAMETERS[name]), []),
        "chunked": (chunked, list(learned.values())),
    }
    if n <= DENSE_LIMIT:
        found["eager"] = (plain, list(learned.values()))
        found["compiled"] = (torch.compile(plain), list(learned.values()))
    one_way = dml_cuda.NTXentLoss()
    rows = torch.arange(n, device=device)
    found["NT-Xent one way"] = (lambda a, b: one_way(a, rows, ref_emb=b, ref_labels=rows), [])
    return found


def run(sizes=SIZES, dtypes=DTYPES, seconds: float = 4.0, device: str = "cpu") -> list[dict]:
    clock, found = make_clock(device), []
    for dtype in dtypes:
        for n, d in sizes:
            generator = torch.Generator().manual_seed(0)
            points = torch.randn(2, n, d, generator=generator).to(device, getattr(torch, dtype))
            a, b = (x.clone().requires_grad_() for x in points)
            for name in FUSED:
                implementations = peers(name, n, device).items()
                steps = {peer: step_of(loss, a, b, learned) for peer, (loss, learned) in implementations}
                results = {peer: {"peak_bytes": clock.peak_bytes(step)} for peer, step in steps.items()}
                for peer, samples in measure(steps, clock, seconds, dict.fromkeys(steps, 3)).items():
                    results[peer] |= summarise(samples)
                found.append({"loss": name, "n": n, "d": d, "dtype": dtype, "results": results})
                _print(found[-1])
    return found


def _print(case: dict) -> None:
    fused = case["results"]["fused"]["median_s"]
    print(f"{case['loss']} {case['n']} x {case['d']} {case['dtype']}")
    for peer, result in case["results"].items():
        peak = result["peak_bytes"]
        memory = "" if peak is None else f"{peak / 2**20:8.0f} MiB"
        print(f"  {peer:16} {1e3 * result['median_s']:9.2f} ms {result['median_s'] / fused:7.2f} x {memory}")


def main(options: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_towers", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=int, nargs="+", help="only these N")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"))
    chosen = parser.parse_args(options)
    sizes = [size for size in SIZES if not chosen.rows or size[0] in chosen.rows]
    cases = run(sizes, chosen.dtypes, chosen.seconds, chosen.device)
    record = {"machine": describe(chosen.device), "cases": cases}
    path = chosen.out / f"{chosen.device}-two-towers.json"
    write_json(path, record)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
