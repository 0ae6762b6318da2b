"""pytorch-metric-learning: its trainer and sampler with the losses and miners of dml_cuda.pml."""

import torch
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.trainers import MetricLossOnly
from torch.utils.data import TensorDataset

from dml_cuda.pml import MultiSimilarityLoss, MultiSimilarityMiner


def main() -> list[float]:
    labels = torch.arange(320) % 10
    images = torch.randn(10, 64)[labels] + 2.0 * torch.randn(320, 64)
    network = torch.nn.Linear(64, 32)
    losses = []
    trainer = MetricLossOnly(
        models={"trunk": network, "embedder": torch.nn.Identity()},
        optimizers={"trunk_optimizer": torch.optim.AdamW(network.parameters(), lr=1e-2)},
        batch_size=64,
        loss_funcs={"metric_loss": MultiSimilarityLoss()},
        mining_funcs={"tuple_miner": MultiSimilarityMiner(epsilon=0.1)},
        dataset=TensorDataset(images, labels),
        sampler=MPerClassSampler(labels, m=8, batch_size=64, length_before_new_iter=320),
        dataloader_num_workers=0,
        end_of_iteration_hook=lambda trainer: losses.append(trainer.losses["total_loss"].item()),
    )
    trainer.train(num_epochs=4)
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
