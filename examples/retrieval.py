"""How well embeddings find images of the same class."""

from collections.abc import Iterable
from functools import partialmethod

import torch
import torch.nn.functional as F
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import Tensor, nn

RECALL_AT = (1, 2, 4, 8)


class _Calculator(AccuracyCalculator):
    """pytorch-metric-learning's calculator, with Recall@K: is any of the K nearest right?"""

    def requires_knn(self) -> list[str]:
        return [*super().requires_knn(), *(f"recall_at_{k}" for k in RECALL_AT)]

    def _recall(self, k: int, knn_labels, query_labels, not_lone_query_mask, **_) -> float:
        right = knn_labels[not_lone_query_mask, :k] == query_labels[not_lone_query_mask, None]
        return right.any(dim=1).double().mean().item()

    calculate_recall_at_1 = partialmethod(_recall, 1)
    calculate_recall_at_2 = partialmethod(_recall, 2)
    calculate_recall_at_4 = partialmethod(_recall, 4)
    calculate_recall_at_8 = partialmethod(_recall, 8)


_NAMES = {f"recall_at_{k}": f"Recall@{k}" for k in RECALL_AT} | {
    "mean_average_precision_at_r": "MAP@R",
    "NMI": "NMI",
}


@torch.no_grad()
def embed(network: nn.Module, batches: Iterable[Tensor], device: torch.device | str) -> Tensor:
    """Unit embeddings, on the CPU, of batches of images."""
    network.eval()
    return torch.cat([F.normalize(network(images.to(device)).float(), dim=1).cpu() for images in batches])


def scores(
    embeddings: Tensor, labels: Tensor, gallery: Tensor | None = None, gallery_labels: Tensor | None = None
) -> dict[str, float]:
    """Recall@1, 2, 4 and 8, MAP@R and NMI, with every row as a query.

    The queries search ``gallery``, or each other where there is none. A query that has nothing to find
    does not count. NMI is of a k-means clustering of the queries.
    """
    searched, searched_labels = (embeddings, labels) if gallery is None else (gallery, gallery_labels)
    most_to_find = int(searched_labels.unique(return_counts=True)[1].max())
    calculator = _Calculator(
        include=tuple(_NAMES),
        k=min(max(most_to_find, *RECALL_AT), len(searched) - (gallery is None)),
        device=torch.device("cpu"),
    )
    found = calculator.get_accuracy(embeddings, labels, gallery, gallery_labels)
    return {title: float(found[name]) for name, title in _NAMES.items()}


def neighbours(embeddings: Tensor, queries: list[int], count: int, gallery: Tensor | None = None) -> Tensor:
    """``[len(queries), count]``: the rows of ``gallery``, or the other rows, nearest to those rows."""
    s = embeddings[queries] @ (embeddings if gallery is None else gallery).T
    if gallery is None:
        s[range(len(queries)), queries] = -torch.inf  # not itself
    return s.topk(count).indices
