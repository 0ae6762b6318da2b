"""The demo's picture: what training did to the embeddings of classes it never saw."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from sklearn.manifold import TSNE
from torch import Tensor

from .data import Images
from .panels import FRAME_LEGEND, choose_queries, neighbour_table, similarity_histogram
from .retrieval import neighbours

# From Okabe and Ito's palette, which colour-blind eyes can tell apart.
_CLASS_COLOURS = ("#0072B2", "#D55E00", "#009E73")
_THUMBNAILS = 260
_QUERIES_PER_CLASS, _NEIGHBOURS = 3, 7
_WHEN = ("before", "after")


def _tinted(image: Tensor, colour: str) -> np.ndarray:
    """A grey image as ink of one colour on a clear ground."""
    ink = image[0].numpy()
    return np.dstack([np.full_like(ink, channel) for channel in to_rgb(colour)] + [ink])


def _map(axis, embeddings: Tensor, images: Tensor, labels: Tensor) -> None:
    """Images where t-SNE puts their embeddings."""
    places = TSNE(metric="cosine", init="pca", random_state=0).fit_transform(embeddings.numpy())
    axis.scatter(*places.T, s=0)  # sets the limits
    colours = dict(zip(labels.unique().tolist(), _CLASS_COLOURS, strict=True))
    for i in np.linspace(0, len(images) - 1, min(_THUMBNAILS, len(images))).astype(int):
        image = OffsetImage(_tinted(images[i], colours[int(labels[i])]), zoom=20 / images.shape[-1])
        axis.add_artist(AnnotationBbox(image, places[i], frameon=False))
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_color("#DDDDDD")


def _curves(axis, history: dict[str, list[float]]) -> None:
    """The loss, and the share of pairs that it still looked at."""
    steps = np.arange(1, len(history["loss"]) + 1)
    axis.plot(steps, history["loss"], color="#555555", lw=1.2)
    axis.set_ylabel("loss", color="#555555")
    axis.set_ylim(bottom=0)
    share = axis.twinx()
    share.plot(steps, 100 * np.array(history["kept"]), color="#CC79A7", lw=1.2)
    share.set_ylabel("pairs kept by mining, %", color="#A04A7B")
    share.set_ylim(bottom=0)
    axis.set_xlabel("training step")
    for each in (axis, share):
        each.spines[["top"]].set_visible(False)


def draw(
    path: Path,
    data: Images,
    images: Tensor,
    embeddings: dict[str, Tensor],
    scores: dict[str, dict[str, float]],
    history: dict[str, list[float]],
) -> None:
    """Write the picture of the held-out ``images``, before and after training."""
    labels = data.held_out_labels
    figure = plt.figure(figsize=(14, 12), layout="constrained")
    maps, rest = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    tables, charts = rest.subfigures(1, 2, width_ratios=(1.9, 1))
    for axis, when in zip(maps.subplots(1, 2), _WHEN, strict=True):
        _map(axis, embeddings[when], images, labels)
        result = ", ".join(f"{name} {value:.1%}" for name, value in scores[when].items())
        axis.set_title(f"{when} training: {result}", loc="left", fontsize=12)
    names = [data.class_names[label] for label in data.held_out]
    handles = [plt.Line2D([], [], ls="", marker="s", ms=9, color=colour) for colour in _CLASS_COLOURS]
    maps.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=11)
    maps.suptitle(
        f"{data.title}: the classes {', '.join(names)} were never trained on (t-SNE of their embeddings)",
        fontsize=14, fontweight="bold",
    )  # fmt: skip
    queries = choose_queries(labels, len(names), _QUERIES_PER_CLASS)
    for axis, when in zip(tables.subplots(1, 2), _WHEN, strict=True):
        nearest = neighbours(embeddings[when], queries, _NEIGHBOURS)
        neighbour_table(axis, images[queries], images[nearest], labels[nearest] == labels[queries, None])
        axis.set_title(f"query, and its nearest neighbours {when}", loc="left", fontsize=11)
    tables.legend(*FRAME_LEGEND, loc="outside lower center", ncols=2, frameon=False)
    first, second, third = charts.subplots(3, 1, height_ratios=(1, 1, 1.3))
    for axis, when in ((first, "before"), (second, "after")):
        similarity_histogram(axis, embeddings[when], labels)
        axis.set_title(f"similarity of held-out pairs {when}", loc="left", fontsize=11)
    first.legend(frameon=False, loc="upper left")
    first.tick_params(labelbottom=False)
    _curves(third, history)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
