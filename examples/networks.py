"""Networks that turn images into embeddings."""

import urllib.error

import torch
from torch import Tensor, nn

NETWORKS = ("small", "resnet50")


class NetworkError(Exception):
    """A network that cannot be had here; the message says what to install."""


def small_cnn(channels: int, embedding_size: int, pooled: int = 1) -> nn.Sequential:
    """Three convolutions, an average over ``pooled x pooled`` fields, and a linear layer."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(channels, 16), nn.MaxPool2d(2), *block(16, 32), nn.MaxPool2d(2), *block(32, 64),
        nn.AdaptiveAvgPool2d(pooled), nn.Flatten(), nn.Linear(64 * pooled**2, embedding_size),
    )  # fmt: skip


class _Standardise(nn.Module):
    """Red, green and blue as ImageNet's networks want them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def _resnet50(channels: int, embedding_size: int) -> nn.Sequential:
    """torchvision's ResNet-50, trained on ImageNet, with an embedding in place of its classes."""
    if channels != 3:
        raise NetworkError("resnet50 is for colour images (--data folder:PATH); here --network small fits")
    try:
        from torchvision.models import ResNet50_Weights, resnet50
    except (ImportError, RuntimeError) as error:  # not there, or built for another torch
        raise NetworkError(f"resnet50 needs a torchvision that fits this torch: {error}") from None
    try:
        trunk = resnet50(weights=ResNet50_Weights.IMAGENET1K_V2)
    except urllib.error.URLError as error:
        raise NetworkError(f"the weights of resnet50 cannot be downloaded: {error}") from None
    trunk.fc = nn.Linear(trunk.fc.in_features, embedding_size)
    return nn.Sequential(_Standardise(), trunk)


def make_network(name: str, channels: int, embedding_size: int) -> nn.Sequential:
    """One of ``NETWORKS``, for images ``[n, channels, height, width]``; gives ``[n, embedding_size]``."""
    make = {"small": small_cnn, "resnet50": _resnet50}[name]
    return make(channels, embedding_size)
