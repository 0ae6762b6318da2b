"""``python -m docs.figures.pair_weights``: the figure of docs/pair_weights.md, the weight of a negative pair.

Points are placed at chosen cosines from one anchor. Each panel varies one of the three kinds of similarity of
the multi-similarity paper and holds the other two.
"""

import argparse
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from benchmarks.losses import PAIR_LOSSES, short_name
from dml_cuda.functional import pair_weights

EPSILON = 0.1
LOSSES = {short_name(loss.__name__): loss for loss in PAIR_LOSSES.values()}
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F3C8D")


class Row(NamedTuple):
    """Similarities of an anchor: to the weighed negative, to the other negatives, to the positives."""

    own: float = 0.5
    others: tuple[float, ...] = (0.5,) * 4
    positives: tuple[float, ...] = (0.55,) * 2


ROW = Row()
PANELS = {
    "own similarity": lambda s: ROW._replace(own=s),
    "similarity of the other negatives": lambda s: ROW._replace(others=(s,) * len(ROW.others)),
    "similarity of the positives": lambda s: ROW._replace(positives=(s,) * len(ROW.positives)),
}


def weight(loss: torch.nn.Module, row: Row) -> float:
    """dL_i/ds of the negative at ``row.own``; 0 where mining drops it."""
    cosines = torch.tensor([row.own, *row.others, *row.positives], dtype=torch.float64)
    points = torch.stack([cosines, (1 - cosines**2).sqrt()], dim=1)
    anchor = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    is_positive = torch.arange(len(points)) > len(row.others)
    pairs = pair_weights(loss, anchor, torch.tensor([1]), ref_emb=points, ref_labels=is_positive.long())
    return float(pairs.neg_weights[pairs.negatives == 0].sum())


def draw(path: Path) -> None:
    """One row of panels per loss, one column per kind of similarity."""
    size = 10, 2 + 1.7 * len(LOSSES)
    figure, axes = plt.subplots(
        len(LOSSES), len(PANELS), sharex=True, sharey="row", figsize=size, layout="constrained"
    )
    similarities = torch.linspace(0, 1, 101).tolist()
    for (name, make), colour, panels in zip(LOSSES.items(), cycle(_COLOURS), axes):
        for place, axis in zip(PANELS.values(), panels, strict=True):
            for epsilon, style in ((None, "-"), (EPSILON, "--")):
                loss = make(epsilon=epsilon, reduction="sum")
                axis.plot(
                    similarities,
                    [weight(loss, place(s)) for s in similarities],
                    style,
                    color=colour if epsilon is None else "#222222",
                    lw=2.4 if epsilon is None else 1.1,
                    label="all pairs" if epsilon is None else f"mined, epsilon = {epsilon}",
                )
            axis.grid(color="#EEEEEE")
            axis.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel(f"{name}\nweight dL/ds")
    axes[0, -1].legend(frameon=False, fontsize=9, loc="upper left")
    for letter, kind, axis in zip("abc", PANELS, axes[-1], strict=True):
        axis.set_xlabel(f"({letter}) {kind}")
    others, positives = len(ROW.others), len(ROW.positives)
    figure.suptitle(
        f"Weight of one negative. Where not varied: itself at {ROW.own}, {others} other negatives at "
        f"{ROW.others[0]}, {positives} positives at {ROW.positives[0]}",
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
