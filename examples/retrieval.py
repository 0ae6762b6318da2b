"""How well embeddings find images of the same class."""

import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn


@torch.no_grad()
def embed(network: nn.Module, images: Tensor, device: str) -> Tensor:
    """Unit embeddings on the CPU."""
    network.eval()
    return torch.cat([F.normalize(network(part.to(device)), dim=1).cpu() for part in images.split(512)])


def scores(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    """Recall@1 and MAP@R with every row as a query against all others."""
    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"),
        k="max_bin_count",
        knn_func=CustomKNN(CosineSimilarity(), batch_size=512),  # the default needs faiss
    )
    found = calculator.get_accuracy(embeddings, labels)
    # With one nearest neighbour, recall and precision are the same number.
    return {"Recall@1": found["precision_at_1"], "MAP@R": found["mean_average_precision_at_r"]}


def neighbours(embeddings: Tensor, count: int) -> Tensor:
    """``[n, count]``: the rows nearest to each row, itself left out."""
    search = NearestNeighbors(n_neighbors=count, metric="cosine").fit(embeddings.numpy())
    return torch.from_numpy(search.kneighbors(return_distance=False))
