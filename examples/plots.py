"""The pictures of a training: its curves, what a search finds, and the similarities of pairs."""

from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image
from torch import Tensor

from .panels import FRAME_LEGEND, choose_queries, neighbour_table, similarity_histogram
from .retrieval import neighbours
from .splits import Split

_GREY, _BLUE = "#555555", "#0072B2"
_QUERIES, _NEIGHBOURS = 10, 7


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(96)
    small.save(path, optimize=True)  # colours by table: a third of the size


def draw_curves(path: Path, log: dict) -> None:
    """The loss of each step, and Recall@1 on the held-out classes."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 5.5), sharex=True, layout="constrained")
    above.plot(range(1, len(log["loss"]) + 1), log["loss"], color=_GREY, lw=1)
    above.set(ylabel="loss", title=log["title"])
    steps = [found["step"] for found in log["evaluations"]]
    below.plot(steps, [100 * found["Recall@1"] for found in log["evaluations"]], "o-", color=_BLUE, ms=4)
    below.set(ylabel="Recall@1 on held-out classes, %", xlabel="training step")
    for axis in (above, below):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def draw_neighbours(path: Path, split: Split, before: tuple[Tensor, ...], after: tuple[Tensor, ...]) -> None:
    """Queries of some held-out classes beside what they find, with the embeddings before and after.

    ``before`` and ``after`` are the embeddings of the queries and, if there is one, of the gallery.
    """
    searched = split.gallery or split.test
    queries = choose_queries(split.test.labels, classes=_QUERIES, per_class=1)
    figure, axes = plt.subplots(1, 2, figsize=(10, 6.8), layout="constrained")
    for axis, embeddings, when in zip(axes, (before, after), ("before", "after"), strict=True):
        nearest = neighbours(embeddings[0], queries, min(_NEIGHBOURS, len(searched) - 1), *embeddings[1:])
        images, labels = searched[nearest.flatten().tolist()]
        right = labels.reshape(nearest.shape) == split.test.labels[queries, None]
        images = images.unflatten(0, nearest.shape)
        neighbour_table(axis, split.test[queries][0], images, right)
        axis.set_title(f"query, and its nearest neighbours {when} training", loc="left", fontsize=11)
    figure.legend(*FRAME_LEGEND, loc="outside lower center", ncols=2, frameon=False)
    _save(figure, path)


def draw_similarities(path: Path, labels: Tensor, before: Tensor, after: Tensor) -> None:
    """Histograms of the similarities of pairs of queries, before and after."""
    figure, axes = plt.subplots(2, 1, figsize=(7, 4.5), sharex=True, layout="constrained")
    for axis, embeddings, when in zip(axes, (before, after), ("before", "after"), strict=True):
        similarity_histogram(axis, embeddings, labels)
        axis.set_title(f"{when} training", loc="left", fontsize=11)
    axes[0].legend(frameon=False, loc="upper left")
    axes[1].set_xlabel("cosine similarity of two images of held-out classes")
    _save(figure, path)


def draw_comparison(path: Path, panels: dict[str, dict[str, list[float]]]) -> None:
    """Loss curves on top of each other: ``panels[title][name]`` is the loss of each step."""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 3.8), layout="constrained", squeeze=False
    )
    styles = ({"color": "#56B4E9", "lw": 3.5}, {"color": "#000000", "lw": 0.9, "ls": (0, (4, 2))})
    for axis, (title, curves) in zip(axes[0], panels.items(), strict=True):
        for (name, losses), style in zip(curves.items(), styles, strict=False):  # one, or two to compare
            axis.plot(range(1, len(losses) + 1), losses, label=name, **style)
        axis.set(title=title, xlabel="training step", ylabel="loss")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    _save(figure, path)
