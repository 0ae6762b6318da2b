"""Real images to embed: handwritten digits, or Fashion-MNIST where it is installed."""

import gzip
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
# fmt: off
FASHION_NAMES = [
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
]
# fmt: on
# Of digits the last three. Of clothes a dress, a top and a shoe: of the last three, all shoes and bags, too
# little would be left to learn from.
DIGITS_HELD_OUT, FASHION_HELD_OUT = (7, 8, 9), (3, 6, 9)
_TRAIN_PER_CLASS, _HELD_OUT_PER_CLASS = 1000, 200


class DataError(Exception):
    """Data that is not there, or that cannot be used; the message says what to do."""


@dataclass
class Images:
    """Images ``[n, 1, side, side]`` in 0..1 with their labels; the held-out classes are not in training."""

    title: str
    class_names: list[str]
    held_out: tuple[int, ...]  # the classes
    train_images: Tensor
    train_labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


def _first_of_each_class(labels: Tensor, classes: list[int], count: int) -> Tensor:
    return torch.cat([torch.nonzero(labels == label)[:count, 0] for label in classes])


def _read_idx(path: Path, header: int) -> np.ndarray:
    try:
        with gzip.open(path) as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)
    except (OSError, EOFError) as error:  # not there, not gzip, cut short
        raise DataError(f"cannot read {path}: {error}") from None


def _fashion(folder: Path, part: str, classes: list[int], count: int) -> tuple[Tensor, Tensor]:
    labels = torch.tensor(_read_idx(folder / f"{part}-labels-idx1-ubyte.gz", header=8), dtype=torch.long)
    images = _read_idx(folder / f"{part}-images-idx3-ubyte.gz", header=16).reshape(-1, 1, 28, 28)
    chosen = _first_of_each_class(labels, classes, count)
    return torch.tensor(images[chosen.numpy()], dtype=torch.float32) / 255, labels[chosen]


def read_fashion(held_out: tuple[int, ...] = FASHION_HELD_OUT, folder: Path | None = None) -> Images:
    """The first images of each class of Fashion-MNIST; those held out are of its test part."""
    folder = folder or FASHION_FOLDER
    if not folder.is_dir():
        raise DataError(
            f"Fashion-MNIST is not at {folder}; make data, or on Debian: apt install dataset-fashion-mnist"
        )
    seen = [label for label in range(10) if label not in held_out]
    train = _fashion(folder, "train", seen, _TRAIN_PER_CLASS)
    return Images(
        "Fashion-MNIST", FASHION_NAMES, held_out, *train,
        *_fashion(folder, "t10k", list(held_out), _HELD_OUT_PER_CLASS),
    )  # fmt: skip


def read_digits(held_out: tuple[int, ...] = DIGITS_HELD_OUT) -> Images:
    """Scikit-learn's digits, which are always there."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    # Twice the size, so that a turn by a few degrees does more than blur.
    images = F.interpolate(images, scale_factor=2, mode="bilinear")
    labels = torch.tensor(digits.target)
    is_held_out = torch.isin(labels, torch.tensor(held_out))
    train, test = ((images[rows], labels[rows]) for rows in (~is_held_out, is_held_out))
    return Images("Handwritten digits", list("0123456789"), held_out, *train, *test)


def load(name: str = "auto") -> Images:
    """Images split by class: "digits", "fashion-mnist", or "auto" for the latter where it is installed."""
    if name == "auto":
        name = "fashion-mnist" if FASHION_FOLDER.is_dir() else "digits"
    return read_fashion() if name == "fashion-mnist" else read_digits()


def distort(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Each image turned by up to 25 degrees, moved by up to 6 % of its side and scaled by up to 15 %."""

    def uniform(limit: float) -> Tensor:
        return limit * (2 * torch.rand(len(images), generator=generator) - 1)

    angle, scale = uniform(math.radians(25)), 1 + uniform(0.15)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = (torch.stack([cos, -sin, uniform(0.12)], 1), torch.stack([sin, cos, uniform(0.12)], 1))
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
