"""Batches to test on."""

import torch

LABELS = ("few", "one", "distinct", "unequal")


def make_labels(n: int, kind: str = "few") -> torch.Tensor:
    """``[n]`` int64, shuffled. few: four of a class; unequal: half of one class, a quarter of the next."""
    labels = {
        "few": torch.arange(n) // 4,
        "one": torch.zeros(n, dtype=torch.long),
        "distinct": torch.arange(n),
        "unequal": torch.log2(torch.arange(1, n + 1, dtype=torch.float64)).long(),
    }[kind]
    return labels[torch.randperm(n)]


def make_points(labels: torch.Tensor, dim: int, dtype=torch.float32, spread: float = 1.0) -> torch.Tensor:
    """``[n, dim]``: 0.5 * N(0, 1) for each class plus N(0, 1) noise; less spread separates the classes."""
    classes, index = labels.unique(return_inverse=True)
    centres = 0.5 * torch.randn(len(classes), dim, dtype=torch.float64)
    noise = torch.randn(len(labels), dim, dtype=torch.float64)
    return (centres[index] + spread * noise).to(dtype)


def make_batch(n: int, dim: int, kind: str = "few", dtype=torch.float32, spread: float = 1.0):
    labels = make_labels(n, kind)
    return make_points(labels, dim, dtype, spread), labels


def make_integer_batch(n: int, dim: int = 4, classes: int = 5, dtype=torch.float32):
    """Points whose dot products are small integers, exact in every dtype and full of ties."""
    return torch.randint(-2, 3, (n, dim)).to(dtype), torch.randint(0, classes, (n,))
