"""``python -m examples.demo``: trains on some classes of real images, and finds images of the others.

Prints Recall@1 before and after, the fused loss beside the reference, and a short benchmark; draws a picture.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import dml_cuda
from benchmarks.cases import quick_cases
from benchmarks.records import write_json
from benchmarks.report import print_report
from benchmarks.run import run_cases
from dml_cuda import functional

from .data import DataError, distort, load
from .picture import draw
from .retrieval import embed, scores
from .training import EPSILON, make_network, train

console = Console(highlight=False)


def parse(options: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--data", choices=("auto", "digits", "fashion-mnist"), default="auto")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--steps", type=int, default=200, help="training steps (default %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help="folder to write to (default %(default)s)"
    )
    parser.add_argument("--no-benchmark", action="store_true", help="leave out the benchmark table")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(options)


def _choose_device(wanted: str) -> str:
    """A GPU where there is one that dml_cuda has kernels for."""
    if wanted != "auto":
        return wanted
    if not torch.cuda.is_available():
        return "cpu"
    if dml_cuda.build_info()["cuda"] is None:
        console.print("There is a GPU, but dml_cuda was built without its CUDA kernels: using the CPU.")
        return "cpu"
    return "cuda"


def _heading(text: str) -> None:
    console.print()
    console.rule(f"[bold]{text}", align="left")


def compare_with_reference(embeddings: Tensor, labels: Tensor, loss: str) -> dict[str, float]:
    """The loss by both backends, and the relative differences of loss and gradient."""
    results = []
    for backend in ("fused", "reference"):
        x = embeddings.detach().clone().requires_grad_()
        value = getattr(functional, f"{loss}_loss")(x, labels, epsilon=EPSILON, backend=backend)
        results.append((value.detach(), *torch.autograd.grad(value, x)))
    differences = (float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True))
    (fused, _), (reference, _) = results
    values = (float(fused), float(reference), *differences)
    return dict(zip(("fused", "reference", "loss", "gradient"), values, strict=True))


def _print_comparison(embeddings: Tensor, labels: Tensor) -> None:
    table = Table("loss", "fused", "reference", "difference", "of the gradients", box=box.SIMPLE_HEAD)
    for loss in ("multi_similarity", "circle"):
        found = compare_with_reference(embeddings, labels, loss)
        values = (f"{found[key]:.6f}" for key in ("fused", "reference"))
        table.add_row(loss, *values, *(f"{found[key]:.1e}" for key in ("loss", "gradient")))
    console.print(table)


def _two_scores(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    found = scores(embeddings, labels)
    return {name: found[name] for name in ("Recall@1", "MAP@R")}


def _print_scores(before: dict[str, float], after: dict[str, float]) -> None:
    table = Table("classes never trained on", "before", "after", box=box.SIMPLE_HEAD)
    for name in before:
        table.add_row(name, f"{before[name]:.1%}", f"[bold]{after[name]:.1%}")
    console.print(table)


def run(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The whole demo; the scores on held-out classes before and after training."""
    started = time.perf_counter()
    device = _choose_device(arguments.device)
    torch.manual_seed(arguments.seed)
    np.random.seed(arguments.seed)  # pytorch-metric-learning's sampler draws from it
    generator = torch.Generator().manual_seed(arguments.seed)
    try:
        data = load(arguments.data)
    except DataError as error:
        raise SystemExit(f"demo: {error}") from None

    _heading(f"{data.title}: learning to compare, on {device}")
    names = ", ".join(data.class_names[label] for label in data.held_out)
    console.print(
        f"{len(data.train_labels)} images of {len(data.train_labels.unique())} classes to train on; "
        f"{len(data.held_out_labels)} of the classes {names} held out."
    )
    console.print("Every image is turned, moved and scaled a little, at random.")
    network = make_network().to(device)
    held_out = distort(data.held_out_images, generator)
    batches = held_out.split(512)
    embeddings = {"before": embed(network, batches, device)}
    history = train(network, data.train_images, data.train_labels, arguments.steps, device, generator)
    embeddings["after"] = embed(network, batches, device)
    found = {when: _two_scores(rows, data.held_out_labels) for when, rows in embeddings.items()}
    _print_scores(found["before"], found["after"])

    _heading("Fused against the reference, on the held-out images")
    _print_comparison(embeddings["before"].to(device), data.held_out_labels.to(device))

    picture = arguments.out / "demo.png"
    draw(picture, data, held_out, embeddings, found, history)
    written = [picture]
    if not arguments.no_benchmark:
        _heading("How fast")
        record = run_cases(quick_cases(), device, seconds=3.0)
        print_report(record, console)
        written.append(arguments.out / "benchmark.json")
        write_json(record, written[-1])
    files = " and ".join(str(path) for path in written)
    console.print(f"\nwrote {files}; {time.perf_counter() - started:.0f} s in all")
    return found


if __name__ == "__main__":
    run(parse())
