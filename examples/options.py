"""What ``python -m examples.train_retrieval`` can be told."""

import argparse
from pathlib import Path

import torch

from benchmarks.losses import CLASS_LOSSES, RANKING_LOSSES, TRIPLET_LOSSES

from .criteria import DEFAULT_MINERS, LOSSES, MINERS
from .networks import NETWORKS

CLASS_RATE = 10  # times the learning rate, for what a loss itself learns: the weights of classes
JOINT_WEIGHT = 0.1  # of the metric loss beside a class-level one
_LEARNING_RATE = {"small": 2e-3, "resnet50": 3e-5}
_IMAGE_SIZE = {"small": 64, "resnet50": 224}


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.train_retrieval",
        description="Trains embeddings for image retrieval on some classes, and judges them on the others.",
    )
    switch = argparse.BooleanOptionalAction

    data = parser.add_argument_group("data").add_argument
    data("--data", default="auto", help="digits, fashion-mnist[:PATH] or folder:PATH (default: Fashion-MNIST "
         "where Debian's dataset-fashion-mnist is installed, else digits)")  # fmt: skip
    data("--image-size", type=_positive, help="side of a folder's images (default: 64; resnet50 224)")
    data("--batch-size", type=_positive, default=64, help="(default: %(default)s)")
    data(
        "--per-class",
        type=_positive,
        default=8,
        help="images of each class in a batch (default: %(default)s)",
    )
    data("--workers", type=int, default=0, help="processes that load images (default: %(default)s)")

    loss = parser.add_argument_group("loss").add_argument
    loss(
        "--loss",
        choices=LOSSES,
        default="multi_similarity",
        help="pml-...: pytorch-metric-learning's (default: %(default)s)",
    )
    loss(
        "--miner",
        nargs="?",
        const="multi_similarity",
        choices=MINERS,
        help="keep these pairs or triplets only (alone: multi_similarity; default: that of the papers of "
        "multi_similarity, triplet_margin and margin)",
    )
    loss("--no-miner", dest="miner", action="store_const", const="none", help="keep all")
    loss(
        "--epsilon",
        type=float,
        default=0.1,
        help="the margin of the multi_similarity miner (default: %(default)s)",
    )
    loss("--gamma", type=float, default=80, help="the scale of circle loss (default: %(default)s)")
    loss(
        "--memory",
        type=int,
        default=0,
        metavar="ROWS",
        help="pair a batch with that many earlier embeddings too",
    )
    loss(
        "--joint", choices=CLASS_LOSSES, help=f"{JOINT_WEIGHT} * the loss + this class-level loss of dml_cuda"
    )

    training = parser.add_argument_group("training").add_argument
    training(
        "--network",
        choices=NETWORKS,
        default="small",
        help="resnet50 needs torchvision (default: %(default)s)",
    )
    training("--embedding-size", type=_positive, default=64, help="(default: %(default)s)")
    training("--steps", type=_positive, default=300, help="(default: %(default)s)")
    training("--lr", type=float, help="Adam's learning rate (default: 2e-3; resnet50 3e-5)")
    training(
        "--amp", nargs="?", const="bf16", choices=("bf16", "fp16"), help="the network in bfloat16 or float16"
    )
    training("--float64", action="store_true", help="everything in float64, where rounding is no matter")
    training("--compile", action="store_true", help="torch.compile of the network")
    training(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="(default: a GPU where there is one)",
    )
    training("--distributed", action="store_true",
             help="a share of every batch to each of torchrun's processes: the training of one")  # fmt: skip
    training("--seed", type=int, default=0, help="(default: %(default)s)")

    output = parser.add_argument_group("output").add_argument
    output("--eval-every", type=_positive, default=50, metavar="STEPS", help="(default: %(default)s)")
    output(
        "--out", type=Path, default=Path("out/retrieval"), help="folder to write to (default: %(default)s)"
    )
    output("--pictures", action=switch, default=True, help="(default: yes)")
    return parser


def parse(options: list[str] | None = None) -> argparse.Namespace:
    """The options, with every default filled in; ends the program with a message where they do not fit."""
    parser = _parser()
    chosen = parser.parse_args(options)
    if chosen.device == "auto":
        chosen.device = "cuda" if torch.cuda.is_available() else "cpu"
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if chosen.float64 and chosen.amp:
        parser.error("--float64 and --amp: take one")
    if chosen.amp == "fp16" and chosen.device == "cpu":
        parser.error("--amp fp16 is for GPUs; on a CPU: --amp bf16")
    if chosen.loss.removeprefix("pml-") in CLASS_LOSSES and (chosen.miner or chosen.memory or chosen.joint):
        parser.error(f"--loss {chosen.loss} is class-level: without --miner, --memory and --joint")
    if chosen.loss in RANKING_LOSSES and chosen.miner not in (None, "none"):
        parser.error(f"--loss {chosen.loss} ranks all columns: without --miner")
    if chosen.memory and chosen.memory < chosen.batch_size:
        parser.error(f"--memory {chosen.memory} does not hold a batch of {chosen.batch_size}")
    if chosen.distributed and chosen.loss.startswith("pml-"):
        parser.error(f"--distributed is for dml_cuda's losses, not {chosen.loss}")
    chosen.miner = chosen.miner or DEFAULT_MINERS.get(chosen.loss.removeprefix("pml-"))
    if chosen.miner == "none":
        chosen.miner = None
    of_pairs = chosen.loss not in TRIPLET_LOSSES
    if chosen.distributed and chosen.miner and of_pairs != (chosen.miner == "multi_similarity"):
        parser.error(f"--distributed: --miner {chosen.miner} is not for --loss {chosen.loss}")
    if chosen.lr is None:
        chosen.lr = _LEARNING_RATE[chosen.network]
    if chosen.image_size is None:
        chosen.image_size = _IMAGE_SIZE[chosen.network]
    return chosen
