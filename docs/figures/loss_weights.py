"""``python -m docs.figures.loss_weights``: for the page of each loss, how it weighs a pair by its similarity.

One anchor has positives and negatives at chosen cosines; one of them moves. For a class-level loss the anchor
is a row, and the points are the weights of classes. A weight is the derivative by the similarity of the loss,
which for losses on distances is the negated distance.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from benchmarks.losses import CLASS_LOSSES, LOSSES, RANKING_LOSSES, TRIPLET_LOSSES
from dml_cuda.functional import pair_weights

FOLDER = Path(__file__).parent / "losses"
POSITIVE = 0.55  # the cosine of a positive that does not move
OTHERS = {0.3: ":", 0.5: "-", 0.7: "--"}  # the cosines of the negatives that do not move, a line each
COLOURS = {"positive": "#0072B2", "negative": "#D55E00"}
ONE_CENTRE = {"soft_triple": {"centers_per_class": 1}, "sub_center_arc_face": {"sub_centers": 1}}
MOVING = torch.linspace(-0.25, 0.98, 83, dtype=torch.float64)


def by_angle(name: str, cosines: torch.Tensor, is_positive: torch.Tensor) -> torch.Tensor:
    """``[M]`` an anchor's weights in a loss of triplets or ranks, by the gradient of the angles."""
    angles = cosines.acos().requires_grad_()
    columns = torch.stack([angles.cos(), angles.sin()], dim=1)
    anchor = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    loss = LOSSES[name](reduction="sum")(
        anchor, torch.tensor([1]), ref_emb=columns, ref_labels=is_positive.long()
    )
    (gradient,) = torch.autograd.grad(loss, angles)
    by_cosines = -gradient / angles.sin().detach()
    if name in RANKING_LOSSES:
        return by_cosines
    return by_cosines * (2 - 2 * cosines).sqrt()  # dL/d(-distance) = dL/dcosine dcosine/d(-distance)


def of_pairs(name: str, cosines: torch.Tensor, is_positive: torch.Tensor) -> torch.Tensor:
    """``[M]`` the weights of an anchor's pairs, or of a row's pairs with classes."""
    points = torch.stack([cosines, (1 - cosines**2).sqrt()], dim=1)
    anchor = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    if name in CLASS_LOSSES:
        options = ONE_CENTRE.get(name, {})
        head = LOSSES[name](len(points), 2, reduction="sum", **options).double()
        weight = getattr(head, head.weight)
        weight.data.copy_(points.T if head.weight in ("W", "fc") else points)
        pairs = pair_weights(head, anchor, is_positive.nonzero()[0])
    else:
        loss = LOSSES[name](reduction="sum")
        references = {"ref_emb": points, "ref_labels": is_positive.long()}
        pairs = pair_weights(loss, anchor, torch.tensor([1]), **references)
    found = torch.zeros_like(cosines)
    for rows, columns, weights in (
        (pairs.pos_anchors, pairs.positives, pairs.pos_weights),
        (pairs.neg_anchors, pairs.negatives, pairs.neg_weights),
    ):
        found[torch.maximum(rows, columns)] = weights  # the anchor is number 0 of its side
    return found


def weight(name: str, kind: str, cosine: float, others: float) -> float:
    """dL/ds of a positive or a negative at ``cosine``, beside four (other) negatives at ``others``."""
    classes = name in CLASS_LOSSES  # a row has one class
    positives = [] if classes and kind == "positive" else [POSITIVE]
    cosines = torch.tensor([cosine, *positives, *[others] * 4], dtype=torch.float64)
    is_positive = torch.zeros(len(cosines), dtype=torch.bool)
    is_positive[1 : 1 + len(positives)] = True
    is_positive[0] = kind == "positive"
    has_no_terms = name in TRIPLET_LOSSES | RANKING_LOSSES
    return float((by_angle if has_no_terms else of_pairs)(name, cosines, is_positive)[0])


def draw(name: str, path: Path) -> None:
    """Two panels: how strongly a positive is pulled, and a negative pushed, by its own similarity."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
    for (kind, colour), axis in zip(COLOURS.items(), axes, strict=True):
        for others, style in OTHERS.items():
            sign = -1 if kind == "positive" else 1
            values = [sign * weight(name, kind, float(cosine), others) for cosine in MOVING]
            axis.plot(MOVING, values, style, color=colour, label=f"other negatives at {others}")
        axis.set_title("pull of a positive" if kind == "positive" else "push of a negative", fontsize=11)
        axis.set_xlabel("its cosine")
        if min(min(line.get_ydata()) for line in axis.lines) >= 0:
            axis.set_ylim(bottom=0)
        axis.grid(color="#EEEEEE")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("weight")
    axes[1].legend(frameon=False, fontsize=8, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER)
    out = parser.parse_args().out
    for name in LOSSES:
        draw(name, out / f"{name}.png")


if __name__ == "__main__":
    main()
