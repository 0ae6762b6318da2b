"""A small embedding network, and its training with the fused loss."""

import torch
from pytorch_metric_learning.samplers import MPerClassSampler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import dml_cuda
from benchmarks.chunked import kept_share

from .data import distort

EMBEDDING_SIZE = 8
PER_CLASS = 24
EPSILON = 0.1


def make_network() -> nn.Sequential:
    """Images ``[n, 1, side, side]`` to embeddings ``[n, 8]``."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, 16), nn.MaxPool2d(2), *block(16, 32), nn.MaxPool2d(2), *block(32, 64),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64 * 4 * 4, EMBEDDING_SIZE),
    )  # fmt: skip


def train(
    network: nn.Module, images: Tensor, labels: Tensor, steps: int, device: str, generator: torch.Generator
) -> dict[str, list[float]]:
    """Train in place; the loss and the share of pairs that mining kept, step by step."""
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
