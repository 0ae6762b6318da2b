"""The demo's embedding network, and its training with the fused loss."""

import torch
from pytorch_metric_learning.samplers import MPerClassSampler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import dml_cuda
from benchmarks.chunked import kept_share

from .data import distort
from .networks import small_cnn

EMBEDDING_SIZE = 8
PER_CLASS = 24
EPSILON = 0.1


def make_network() -> nn.Sequential:
    """Images ``[n, 1, side, side]`` to embeddings ``[n, 8]``."""
    return small_cnn(1, EMBEDDING_SIZE, pooled=4)


def train(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    steps: int,
    device: str,
    generator: torch.Generator,
    loss_fn: nn.Module | None = None,
) -> dict[str, list[float]]:
    """Train in place, by default with mined multi-similarity loss; the loss and the share of pairs that
    mining keeps, step by step."""
    if loss_fn is None:
        loss_fn = dml_cuda.MultiSimilarityLoss(epsilon=EPSILON)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batch_size = PER_CLASS * len(labels.unique())
    sampler = MPerClassSampler(labels, PER_CLASS, batch_size, length_before_new_iter=steps * batch_size)
    batches = DataLoader(TensorDataset(images, labels), batch_size, sampler=sampler)
    history: dict[str, list[float]] = {"loss": [], "kept": []}
    network.train()
    for batch, batch_labels in (bar := tqdm(batches, desc="training", unit="step")):
        embeddings = network(distort(batch, generator).to(device))
        batch_labels = batch_labels.to(device)
        loss = loss_fn(embeddings, batch_labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        kept = kept_share(embeddings.detach(), batch_labels, EPSILON)
        history["loss"].append(loss.item())
        history["kept"].append(kept)
        bar.set_postfix(loss=f"{loss.item():.3f}", pairs_kept=f"{kept:.0%}", refresh=False)
    return history
