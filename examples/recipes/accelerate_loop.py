"""Accelerate: the batches of all processes count as one.

``accelerate launch -m examples.recipes.accelerate_loop`` starts a process per device.
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import dml_cuda


def main() -> list[float]:
    accelerator = Accelerator()
    labels = torch.arange(320) % 10
    images = torch.randn(10, 64)[labels] + 2.0 * torch.randn(320, 64)
    loader = DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True)
    network = torch.nn.Linear(64, 32)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    network, optimizer, loader = accelerator.prepare(network, optimizer, loader)

    # The pairs of all processes count, as if one process had the whole batch.
    loss_fn = dml_cuda.distributed.DistributedLoss(dml_cuda.MultiSimilarityLoss(epsilon=0.1))
    losses = []
    for _ in range(4):
        for x, y in loader:
            with accelerator.autocast():
                loss = loss_fn(network(x), y)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
