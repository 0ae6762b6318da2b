"""Lightning: the loss is a part of the LightningModule, so checkpoints and devices follow."""

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

import dml_cuda


class Embedder(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32))
        self.loss = dml_cuda.CosFaceLoss(num_classes=10, embedding_size=32, scale=16)
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        images, labels = batch
        loss = self.loss(self.network(images), labels)
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)  # the head's weights too


def main() -> list[float]:
    labels = torch.arange(320) % 10
    images = torch.randn(10, 8, 8)[labels] + 2.0 * torch.randn(320, 8, 8)
    loader = DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=4, accelerator="auto", devices=1, **options)
    embedder = Embedder()
    trainer.fit(embedder, loader)
    return embedder.losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
