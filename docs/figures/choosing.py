"""``python -m docs.figures.choosing``: the chart of docs/choosing.md, from labels and classes to a loss."""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

QUESTION, ANSWER = "#E8EEF7", "#0072B2"
# The branches of the first question: what is asked next, and per reply the losses.
CHART = {
    "classes": (
        "Do batches hold\nseveral rows per class?",
        {
            "yes": ["MultiSimilarity", "Circle"],
            "the order of\ndistances": ["TripletMargin", "Margin"],
            "the metric\nitself": ["RecallAtK", "SmoothAP", "FastAP"],
            "no, < 10,000\nclasses": ["ProxyAnchor", "SoftTriple"],
            "no, many\nclasses": ["CosFace", "ArcFace"],
        },
    ),
    "pairs": (
        "Which pairs?",
        {"same or\ndifferent": ["Contrastive"], "matched, from\ntwo encoders": ["NTXent"]},
    ),
    "none, or to\npretrain": ("Are some labelled?", {"no: two views": ["NTXent"], "yes": ["SupCon"]}),
}


def box(axis: plt.Axes, x: float, y: float, text: str, colour: str, text_colour: str = "#222222") -> None:
    style = {"boxstyle": "round,pad=0.5", "facecolor": colour, "edgecolor": "none"}
    axis.text(x, y, text, ha="center", va="center", fontsize=10, color=text_colour, bbox=style, zorder=3)


def arrow(axis: plt.Axes, start: tuple[float, float], end: tuple[float, float], text: str) -> None:
    axis.plot(*zip(start, end, strict=True), color="#999999", lw=1.2, zorder=1)
    middle = (start[0] + 2 * end[0]) / 3, (start[1] + 2 * end[1]) / 3
    style = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axis.text(*middle, text, ha="center", va="center", fontsize=9, color="#555555", bbox=style, zorder=2)


def draw(path: Path) -> None:
    figure, axis = plt.subplots(figsize=(13, 5.2), layout="constrained")
    leaves = sum(len(replies) for _, replies in CHART.values())
    x, root = 0.0, ((leaves - 1) / 2, 3.0)
    box(axis, *root, "What do the labels say?", QUESTION)
    for label, (question, replies) in CHART.items():
        centre = x + (len(replies) - 1) / 2
        arrow(axis, root, (centre, 2.0), label)
        box(axis, centre, 2.0, question, QUESTION)
        for reply, losses in replies.items():
            arrow(axis, (centre, 2.0), (x, 0.75), reply)
            box(axis, x, 0.6, "\n".join(losses), ANSWER, "white")
            x += 1
    memory = "Batches too small for hard negatives? Put any loss of pairs or triplets into CrossBatchMemory."
    axis.text((leaves - 1) / 2, -0.05, memory, ha="center", fontsize=10, color="#555555")
    axis.set_xlim(-0.6, leaves - 0.4)
    axis.set_ylim(-0.25, 3.35)
    axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    draw(parser.parse_args().out)


if __name__ == "__main__":
    main()
