"""A data set split by class: what a network is trained on, and what it is judged on."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from pytorch_metric_learning.samplers import MPerClassSampler
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler

from . import data
from .data import DataError, Images, distort
from .folders import ImageFiles, find

_TEST_BATCH = 256


class ImageTensors(Dataset):
    """Images that fit in memory: like ``folders.ImageFiles``, a list of rows gives images and labels."""

    def __init__(self, images: Tensor, labels: Tensor, augment: bool) -> None:
        self.images, self.labels, self.augment = images, labels, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        images = self.images[rows]
        return distort(images) if self.augment else images, self.labels[rows]


Part = ImageTensors | ImageFiles


@dataclass
class Split:
    """No class of ``train`` is in ``test``. The test images search ``gallery``, or each other."""

    title: str
    train: Part
    test: Part
    gallery: Part | None
    channels: int

    def describe(self) -> dict:
        parts = {"train": self.train, "test": self.test, "gallery": self.gallery}
        counts = {name: [len(part), len(part.labels.unique())] for name, part in parts.items() if part}
        return {"title": self.title} | {
            name: {"images": images, "classes": classes} for name, (images, classes) in counts.items()
        }


def _orientations(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Each class upright and by quarter turns, as ``count`` classes: five are too few to learn from.

    It is what few-shot learning does to Omniglot's characters.
    """
    turned = [torch.rot90(images, turn, dims=(2, 3)) for turn in range(count)]
    return torch.cat(turned), torch.cat([count * labels + turn for turn in range(count)])


def _from_tensors(images: Images, orientations: int) -> Split:
    train = _orientations(images.train_images, images.train_labels, orientations)
    test = _orientations(images.held_out_images, images.held_out_labels, orientations)
    train_classes, labels = train[1].unique(return_inverse=True)
    return Split(
        f"{images.title}, {len(train_classes) // orientations} + {len(images.held_out)} classes "
        f"in {orientations} orientations",
        ImageTensors(train[0], labels, augment=True), ImageTensors(*test, augment=False),
        gallery=None, channels=1,
    )  # fmt: skip


def _digits() -> Split:
    images = data.read_digits(held_out=(5, 6, 7, 8, 9))
    # Of digits as they are, an untrained network finds 94 % already. And only two orientations: 6 turned
    # twice is 9.
    fixed = torch.Generator().manual_seed(0)  # the same test images whatever the seed of the training
    images.held_out_images = distort(images.held_out_images, fixed)
    return _from_tensors(images, orientations=2)


def _folder(root: Path, size: int) -> Split:
    found = find(root)
    parts = {"train": found.train, "test": found.test, "gallery": found.gallery}
    if found.gallery is not None:  # the same label for the same name in both
        names = dict.fromkeys([*found.test, *found.gallery])
        parts |= {name: {key: parts[name].get(key, []) for key in names} for name in ("test", "gallery")}
    train, test, gallery = (
        None if part is None else ImageFiles(part, size, augment=name == "train")
        for name, part in parts.items()
    )
    if len(test if gallery is None else gallery) == 0 or len(test) == 0 or len(train) == 0:
        raise DataError(f"{root} lists no images to train on, or none to test on")
    if gallery is None and test.labels.bincount().max() < 2:
        raise DataError(f"{root}: no class to test on has two images, so there is nothing to find")
    return Split(root.name, train, test, gallery, channels=3)


def open_split(spec: str, image_size: int) -> Split:
    """The data that ``--data`` names: auto, digits, fashion-mnist[:PATH] or folder:PATH.

    ``image_size`` is the side to which the images of folders are brought.
    """
    kind, _, place = spec.partition(":")
    if kind == "auto" and not place:
        kind = "fashion-mnist" if data.FASHION_FOLDER.is_dir() else "digits"
    if kind == "digits" and not place:
        return _digits()
    if kind == "fashion-mnist":
        folder = Path(place) if place else None
        return _from_tensors(data.read_fashion(held_out=(5, 6, 7, 8, 9), folder=folder), orientations=4)
    if kind == "folder" and place:
        return _folder(Path(place), image_size)
    raise DataError(f"--data {spec}: it is auto, digits, fashion-mnist, fashion-mnist:PATH or folder:PATH")


def check_batch(labels: Tensor, batch_size: int, per_class: int) -> None:
    """Whether batches of ``per_class`` images of each of ``batch_size / per_class`` classes can be made."""
    classes, needed = len(labels.unique()), batch_size // per_class
    if batch_size % per_class:
        raise DataError(f"--batch-size {batch_size} is no multiple of --per-class {per_class}")
    if needed > classes:
        raise DataError(
            f"--batch-size {batch_size} with --per-class {per_class} needs {needed} classes, and "
            f"there are {classes} to train on: take at most {per_class * classes}, or more of each class"
        )
    if needed < 2:
        raise DataError(
            f"--batch-size {batch_size} holds one class of {per_class}: no negatives to learn from"
        )


def training_batches(part: Part, batch_size: int, per_class: int, steps: int, workers: int) -> DataLoader:
    """``steps`` batches of images and labels, each of the same number of images of each of its classes."""
    check_batch(part.labels, batch_size, per_class)
    sampler = MPerClassSampler(part.labels, per_class, batch_size, length_before_new_iter=steps * batch_size)
    rows = BatchSampler(sampler, batch_size, drop_last=True)
    return DataLoader(part, batch_size=None, sampler=rows, num_workers=workers)


def images_in_order(part: Part, workers: int) -> Iterator[Tensor]:
    """All images of a part, a batch at a time."""
    rows = BatchSampler(SequentialSampler(part), _TEST_BATCH, drop_last=False)
    return (images for images, _ in DataLoader(part, batch_size=None, sampler=rows, num_workers=workers))
