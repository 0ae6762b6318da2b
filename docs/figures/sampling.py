"""``python docs/figures/sampling.py``: the figure of docs/sampling.md, distances of selected negatives.

Histograms after Wu et al., "Sampling Matters in Deep Embedding Learning", ICCV 2017, for embeddings at the
start of training and for embeddings with classes near and far.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

import dml_cuda

DIM, CLASSES, PER_CLASS = 16, 64, 4
BATCHES = 20
_COLOURS = ("#7F7F7F", "#E69F00", "#D55E00", "#0072B2")
_BINS = torch.linspace(0, 2, 61)


class Negatives(NamedTuple):
    """Pairs of an anchor and a selected negative, as indices ``[P]`` each."""

    anchors: Tensor
    negatives: Tensor


def _uniform(x: Tensor, y: Tensor) -> Negatives:
    """All negatives of each anchor."""
    return Negatives(*dml_cuda.MinedPairs(x, y, epsilon=None)[2:])


def _of(miner: Callable) -> Callable[[Tensor, Tensor], Negatives]:
    def select(x: Tensor, y: Tensor) -> Negatives:
        mined = miner(x, y)
        return Negatives(mined.anchors, mined.negatives)

    return select


STRATEGIES: dict[str, Callable[[Tensor, Tensor], Negatives]] = {
    "uniform": _uniform,
    "semi-hard": _of(dml_cuda.TripletMarginMiner(type_of_triplets="semihard")),
    "hard": _of(dml_cuda.BatchHardMiner()),
    "distance-weighted": _of(dml_cuda.DistanceWeightedMiner()),
}


def untrained() -> tuple[Tensor, Tensor]:
    """Points uniform on the sphere, and random classes."""
    labels = torch.arange(CLASSES * PER_CLASS) // PER_CLASS
    return torch.nn.functional.normalize(torch.randn(len(labels), DIM), dim=1), labels


def trained() -> tuple[Tensor, Tensor]:
    """Classes in eight clusters; classes of one cluster lie near each other, some very near."""
    labels = torch.arange(CLASSES * PER_CLASS) // PER_CLASS
    kinds, apart = torch.randn(8, DIM), torch.linspace(0.1, 1.5, CLASSES)[torch.randperm(CLASSES), None]
    centres = kinds[torch.arange(CLASSES) % 8] + apart * torch.randn(CLASSES, DIM)
    return torch.nn.functional.normalize(centres[labels] + 0.4 * torch.randn(len(labels), DIM), dim=1), labels


BATCHES_OF = {"untrained: points anywhere on the sphere": untrained, "trained: classes near and far": trained}


def distances(strategy: str, make: Callable[[], tuple[Tensor, Tensor]], batches: int = BATCHES) -> Tensor:
    """Distances of anchor and selected negative, over several batches."""
    torch.manual_seed(0)
    found = []
    for _ in range(batches):
        x, y = make()
        pairs = STRATEGIES[strategy](x, y)
        found.append((x[pairs.anchors] - x[pairs.negatives]).norm(dim=1))
    return torch.cat(found)


def draw(path: Path) -> None:
    """One column of panels per strategy, one row per kind of embeddings."""
    size = len(BATCHES_OF), len(STRATEGIES)
    figure, axes = plt.subplots(*size, sharex=True, figsize=(11, 5.2), layout="constrained")
    for name, axis in zip(STRATEGIES, axes[0], strict=True):
        axis.set_title(name, fontsize=11)
    for (kind, make), row in zip(BATCHES_OF.items(), axes, strict=True):
        every = torch.histogram(distances("uniform", make), _BINS, density=True).hist
        for strategy, colour, axis in zip(STRATEGIES, _COLOURS, row, strict=True):
            found = torch.histogram(distances(strategy, make), _BINS, density=True).hist
            axis.stairs(every, _BINS, color="#999999", lw=1, label="all negatives")
            axis.stairs(found, _BINS, color=colour, fill=True, alpha=0.75)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xlim(0, 2)
        row[0].set_ylabel(kind.replace(": ", "\n"))
        row[1].legend(frameon=False, fontsize=8, loc="upper left")
    for axis in axes[-1]:
        axis.set_xlabel("distance of anchor and negative")
    figure.suptitle(
        f"Distances of the selected negatives: {DIM} dimensions, {CLASSES} classes of {PER_CLASS} in a batch",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    draw(parser.parse_args().out)


if __name__ == "__main__":
    main()
