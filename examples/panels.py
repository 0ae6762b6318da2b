"""Parts of pictures: similarities of pairs, and queries beside their nearest neighbours."""

import matplotlib
import numpy as np
import torch
from matplotlib.patches import Rectangle
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# From Okabe and Ito's palette, which colour-blind eyes can tell apart.
RIGHT, WRONG = "#0072B2", "#D55E00"
_POSITIVE, _NEGATIVE = "#0072B2", "#E69F00"
_MOST_ROWS = 2000  # two million pairs show what there is to see
_RIGHT_FRAME = {"ec": RIGHT, "lw": 1.6}
_WRONG_FRAME = {"ec": WRONG, "lw": 2.6, "ls": (0, (2, 1))}
FRAME_LEGEND = (
    [Rectangle((0, 0), 1, 1, fill=False, **style) for style in (_RIGHT_FRAME, _WRONG_FRAME)],
    ["right class", "wrong class"],
)


def similarity_histogram(axis: plt.Axes, embeddings: Tensor, labels: Tensor) -> None:
    """Similarities of pairs, by kind; of evenly spaced rows where there are many."""
    chosen = torch.linspace(0, len(labels) - 1, min(_MOST_ROWS, len(labels))).long()
    embeddings, labels = embeddings[chosen], labels[chosen]
    rows, columns = torch.triu_indices(len(labels), len(labels), offset=1)
    s = (embeddings @ embeddings.T)[rows, columns]
    same = labels[rows] == labels[columns]
    edges = np.linspace(-1, 1, 81)
    for kind, colour, label in ((same, _POSITIVE, "same class"), (~same, _NEGATIVE, "other class")):
        axis.hist(s[kind].numpy(), edges, density=True, color=colour, alpha=0.65, label=label)
    axis.set(xlim=(-1, 1), yticks=[])
    axis.spines[["top", "right", "left"]].set_visible(False)


def choose_queries(labels: Tensor, classes: int, per_class: int) -> list[int]:
    """Rows of a few classes, a few of each, evenly spaced."""
    labels_there = labels.unique()
    chosen = []
    for label in labels_there[
        torch.linspace(0, len(labels_there) - 1, min(classes, len(labels_there))).long()
    ]:
        rows = torch.nonzero(labels == label)[:, 0]
        chosen += rows[np.linspace(0, len(rows) - 1, per_class + 2).astype(int)[1:-1]].tolist()
    return chosen


def _show(axis: plt.Axes, image: Tensor, corners: tuple[float, float, float, float]) -> None:
    """An image ``[channels, height, width]`` in 0..1: grey as ink on paper, or in colour."""
    if len(image) == 1:
        axis.imshow(image[0].numpy(), cmap="gray_r", vmin=0, vmax=1, extent=corners)
    else:
        axis.imshow(image.permute(1, 2, 0).numpy(), extent=corners)


def neighbour_table(axis: plt.Axes, queries: Tensor, found: Tensor, right: Tensor) -> None:
    """A row for each query: its image, then those of its nearest neighbours, framed right or wrong.

    Args:
        axis: to draw on.
        queries: ``[rows, channels, height, width]``.
        found: ``[rows, neighbours, channels, height, width]``.
        right: ``[rows, neighbours]``, whether a neighbour is of the query's class.
    """
    for y, (query, images) in enumerate(zip(queries, found, strict=True)):
        for place, image in enumerate([query, *images]):
            x = place if place == 0 else place + 0.4
            _show(axis, image, (x, x + 0.88, y + 0.88, y))
            if place:
                style = _RIGHT_FRAME if right[y, place - 1] else _WRONG_FRAME
                axis.add_patch(Rectangle((x, y), 0.88, 0.88, fill=False, **style))
    axis.set(xlim=(-0.1, found.shape[1] + 1.5), ylim=(len(queries), -0.15), aspect="equal")
    axis.axis("off")
