"""timm: any of its networks as the trunk, without its classifier, and a linear layer to the embedding."""

import timm
import torch

import dml_cuda


def main() -> list[float]:
    trunk = timm.create_model(
        "resnet18", pretrained=False, num_classes=0
    )  # pretrained=True for your training
    network = torch.nn.Sequential(trunk, torch.nn.Linear(trunk.num_features, 32))
    loss_fn = dml_cuda.MultiSimilarityLoss(epsilon=0.1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)

    classes = torch.randn(4, 3, 64, 64)
    losses = []
    for _ in range(8):
        labels = torch.arange(4).repeat_interleave(4)  # 4 classes, 4 images each
        images = classes[labels] + torch.randn(16, 3, 64, 64)
        loss = loss_fn(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
