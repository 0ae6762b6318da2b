"""Image folders as people have them on disk: one folder a class, or a benchmark with its own list of images.

==========================  ==================================  ===================================
data set                    found by                            trained on
==========================  ==================================  ===================================
CUB-200-2011                folder ``images``                   the first half of the classes (100)
Cars196                     ``cars_annos.mat``                  the first half of the classes (98)
Stanford Online Products    ``Ebay_train.txt``                  what that file lists
In-Shop                     ``list_eval_partition.txt``         "train"; "query" searches "gallery"
any other                   a folder of images for each class   the first half of the classes
==========================  ==================================  ===================================
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.io import loadmat
from torch import Tensor
from torch.utils.data import Dataset

from .data import DataError

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
Classes = dict[str, list[Path]]  # the images of each class


@dataclass
class Found:
    """The classes of the parts of a data set, in their order."""

    train: Classes
    test: Classes
    gallery: Classes | None = None  # what the test images search; each other where there is none


def _by_class(pairs: list[tuple[str, Path]]) -> Classes:
    classes = defaultdict(list)
    for name, path in pairs:
        classes[name].append(path)
    return dict(classes)


def _halves(classes: Classes, root: Path) -> Found:
    if len(classes) < 4:
        names = f" ({', '.join(classes)})" if classes else ""
        word = "class" if len(classes) == 1 else "classes"
        raise DataError(
            f"{root} has {len(classes)} {word} of images{names}; at least 4 are needed, two to train on "
            "and two to test on: one folder for each class"
        )
    names = list(classes)
    half = len(names) // 2
    return Found(*({name: classes[name] for name in part} for part in (names[:half], names[half:])))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")  # macOS leaves "._1.jpg" behind


def _class_folders(root: Path) -> Found:
    """The folder that an image lies in is its class; the folders above (train, test) do not matter."""
    base = root / "images" if (root / "images").is_dir() else root
    paths = (path for path in sorted(base.rglob("*")) if _is_image(path))
    return _halves(dict(sorted(_by_class([(path.parent.name, path) for path in paths]).items())), root)


def _cars(root: Path) -> Found:
    rows = loadmat(root / "cars_annos.mat", squeeze_me=True)["annotations"]
    pairs = sorted((int(row["class"]), root / str(row["relative_im_path"])) for row in rows)
    return _halves(_by_class([(str(number), path) for number, path in pairs]), root)


def _online_products(root: Path) -> Found:
    def part(name: str) -> Classes:
        lines = (root / f"Ebay_{name}.txt").read_text().splitlines()[1:]
        fields = (line.split() for line in lines)  # image_id class_id super_class_id path
        return _by_class([(number, root / path) for _, number, _, path in fields])

    return Found(part("train"), part("test"))


def _in_shop(root: Path, partition: Path) -> Found:
    folder = next((place for place in (root, root / "Img") if (place / "img").is_dir()), root)
    parts = defaultdict(list)
    for line in partition.read_text().splitlines()[2:]:  # after the count and the names of the columns
        path, item, part = line.split()
        parts[part].append((item, folder / path))
    return Found(*(_by_class(parts[part]) for part in ("train", "query", "gallery")))


def find(root: Path) -> Found:
    """The images under ``root``, split by class as is usual for the data set."""
    if not root.is_dir():
        raise DataError(f"there is no folder {root}")
    partitions = [root / "list_eval_partition.txt", root / "Eval" / "list_eval_partition.txt"]
    try:
        if (root / "cars_annos.mat").is_file():
            return _cars(root)
        if (root / "Ebay_train.txt").is_file():
            return _online_products(root)
        for partition in partitions:
            if partition.is_file():
                return _in_shop(root, partition)
    except (ValueError, KeyError, OSError) as error:
        raise DataError(f"the list of images in {root} cannot be read: {error}") from error
    return _class_folders(root)


def _random_box(width: int, height: int) -> tuple[float, float, float, float]:
    """A part of the image of 16 to 100 % of its area, up to a third wider or higher than a square."""
    area, shape, x, y = torch.rand(4).tolist()
    side = math.sqrt((0.16 + 0.84 * area) * width * height)
    stretch = math.exp((2 * shape - 1) * math.log(4 / 3) / 2)
    w, h = min(width, side * stretch), min(height, side / stretch)
    left, top = x * (width - w), y * (height - h)
    return left, top, left + w, top + h


def _middle_box(width: int, height: int) -> tuple[float, float, float, float]:
    """The square in the middle, 7/8 of the shorter side: 224 of 256 pixels."""
    side = min(width, height) * 7 / 8
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


class ImageFiles(Dataset):
    """A list of rows gives their images ``[n, 3, size, size]`` in 0..1, read from disk, and their labels.

    Those to train on are cropped and mirrored at random; of the others the middle is taken.
    """

    def __init__(self, classes: Classes, size: int, augment: bool) -> None:
        self.paths = [path for paths in classes.values() for path in paths]
        counts = torch.tensor([len(paths) for paths in classes.values()])
        self.labels = torch.arange(len(classes)).repeat_interleave(counts)
        self.size, self.augment = size, augment

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        return torch.stack([self._read(self.paths[row]) for row in rows]), self.labels[rows]

    def _read(self, path: Path) -> Tensor:
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # not there, no image, cut short, broken
            raise DataError(f"cannot read the image {path}: {error}") from None
        box = (_random_box if self.augment else _middle_box)(*image.size)
        pixels = np.array(image.resize((self.size, self.size), Image.Resampling.BILINEAR, box))
        tensor = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
        return tensor.flip(2) if self.augment and torch.rand(()) < 0.5 else tensor
