"""The table of public classes: how each is made, and called as a module of embeddings and labels.

The tests of this folder run every one of them through every tool. A class is in the table by being public:
its base says how it is made. One that no rule can make needs an entry of ``SPECIAL``; without it
``test_every_public_class_can_be_made`` fails.
"""

import inspect
from pathlib import Path

import torch
from torch import nn

import dml_cuda
from dml_cuda import distributed
from dml_cuda.losses._classifier import ClassifierLoss
from dml_cuda.losses._pair import PairLoss
from dml_cuda.losses._ranking import RankingLoss
from dml_cuda.losses._triplet import TripletLoss
from dml_cuda.losses._two_towers import TwoTowerLoss
from dml_cuda.miners.triplets import SelectingMiner

try:
    from dml_cuda import pml
except ImportError:
    pml = None

ROWS, DIM, CLASSES = 24, 8, 6
ROOT = Path(__file__).parents[2]


class WithMiner(nn.Module):
    """A loss of what a miner finds."""

    def __init__(self, loss, miner):
        super().__init__()
        self.loss, self.miner = loss, miner

    def forward(self, embeddings, labels):
        return self.loss(embeddings, labels, self.miner(embeddings, labels))


class OfTwoTowers(nn.Module):
    """A loss of embeddings and what another network makes of them."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, embeddings, labels):
        other = embeddings.flip(1)
        return self.loss(embeddings, other, labels) if self.takes_labels else self.loss(embeddings, other)

    @property
    def takes_labels(self):
        return isinstance(self.loss, TwoTowerLoss)


def learned(value):
    return nn.Parameter(torch.tensor(value))


def _custom():
    return dml_cuda.compile_loss(ROOT / "examples" / "custom_losses" / "unified.h")(scale=8.0)


def _memory():
    return dml_cuda.CrossBatchMemory(
        dml_cuda.MultiSimilarityLoss(), DIM, 4 * ROWS, dml_cuda.MultiSimilarityMiner(0.1)
    )


def _distributed():
    return distributed.DistributedLoss(dml_cuda.MultiSimilarityLoss(epsilon=0.1))


# Classes that no rule of maker_of covers, or that are to be made otherwise.
SPECIAL = {
    dml_cuda.CrossBatchMemory: _memory,
    dml_cuda.custom.CustomLoss: _custom,
    distributed.DistributedLoss: _distributed,
    dml_cuda.NPairsLoss: dml_cuda.NPairsLoss,
    dml_cuda.MarginLoss: lambda: dml_cuda.MarginLoss(learn_beta=True, num_classes=CLASSES),
}
# The bases of the classes: losses, which need no argument; heads; miners of triplets and of pairs.
LOSS_BASES, HEAD_BASES, TRIPLET_BASES, PAIR_BASES = [
    [PairLoss, RankingLoss, TripletLoss],
    [ClassifierLoss],
    [SelectingMiner],
    [dml_cuda.MultiSimilarityMiner, dml_cuda.PairMarginMiner],
]
if pml is not None:
    SPECIAL[pml.MarginLoss] = lambda: pml.MarginLoss(learn_beta=True, num_classes=CLASSES)
    SPECIAL[pml.RankedListLoss] = lambda: pml.RankedListLoss(margin=0.4, Tn=2)
    SPECIAL[pml.SubCenterArcFaceLoss] = lambda: pml.SubCenterArcFaceLoss(
        num_classes=CLASSES, embedding_size=DIM
    )
    LOSS_BASES += [
        pml.pair_losses._Fused,
        pml.pair_losses._FusedRows,
        pml.triplet_losses._FusedTriplets,
    ]
    HEAD_BASES += [pml.class_losses._FusedClassifier]
    TRIPLET_BASES += [pml.miners._Lazy]
    PAIR_BASES += [pml.MultiSimilarityMiner, pml.PairMarginMiner]


def maker_of(cls):
    """What makes a module of embeddings and labels with the class; None for an unknown kind of class."""
    if cls in SPECIAL:
        return SPECIAL[cls]
    if issubclass(cls, tuple(LOSS_BASES)):
        return cls
    if issubclass(cls, TwoTowerLoss | dml_cuda.InfoNCELoss):
        return lambda: OfTwoTowers(cls())
    if issubclass(cls, tuple(HEAD_BASES)):
        return lambda: cls(CLASSES, DIM)
    package = pml if cls.__module__.startswith("dml_cuda.pml") else dml_cuda
    if issubclass(cls, tuple(PAIR_BASES)):
        return lambda: WithMiner(package.ContrastiveLoss(), cls())
    if issubclass(cls, tuple(TRIPLET_BASES)):
        return lambda: WithMiner(package.TripletMarginLoss(), cls())
    return None


def public_classes():
    """The modules that the package makes public, found by their names alone."""
    packages = [dml_cuda, distributed, dml_cuda.custom]
    packages += [getattr(dml_cuda, name) for name in ("losses", "miners") if name in dml_cuda.__all__]
    packages += [] if pml is None else [pml]
    names = {(package, name) for package in packages for name in getattr(package, "__all__", ())}
    found = {getattr(package, name) for package, name in names}
    modules = {x for x in found if inspect.isclass(x) and issubclass(x, nn.Module)}
    return sorted(modules, key=lambda cls: (cls.__module__, cls.__name__))


MAKERS = {cls: maker_of(cls) for cls in public_classes()}
# The same classes with other ways through the package.
MORE = {
    "DistributedLoss-ring": lambda: distributed.DistributedLoss(dml_cuda.CircleLoss(), mode="ring"),
    "DistributedLoss-triplets": lambda: distributed.DistributedLoss(dml_cuda.TripletMarginLoss()),
    "DistributedLoss-CosFaceLoss": lambda: distributed.DistributedLoss(dml_cuda.CosFaceLoss(CLASSES, DIM)),
    "DistributedLoss-SoftTripleLoss": lambda: distributed.DistributedLoss(
        dml_cuda.SoftTripleLoss(CLASSES, DIM, tau=0.2)
    ),
    "DistributedLoss-ProxyAnchorLoss": lambda: distributed.DistributedLoss(
        dml_cuda.ProxyAnchorLoss(CLASSES, DIM)
    ),
    "DistributedLoss-ranking": lambda: distributed.DistributedLoss(dml_cuda.SmoothAPLoss()),
    "MultiSimilarityLoss-mined": lambda: dml_cuda.MultiSimilarityLoss(epsilon=0.1),
    "TripletMarginLoss-smooth": lambda: dml_cuda.TripletMarginLoss(smooth_loss=True),
    "TripletMarginLoss-learned": lambda: dml_cuda.TripletMarginLoss(
        nn.Parameter(torch.linspace(0.1, 0.4, CLASSES))
    ),
    "MarginLoss-fixed": dml_cuda.MarginLoss,
    "MultiSimilarityLoss-learned": lambda: dml_cuda.MultiSimilarityLoss(learned(2.0), learned(40.0)),
    "ArcFaceLoss-learned": lambda: dml_cuda.ArcFaceLoss(CLASSES, DIM, scale=learned(16.0)),
    "CLIPLoss-learned": lambda: OfTwoTowers(dml_cuda.CLIPLoss(learned(0.2))),
    "SigLIPLoss-learned": lambda: OfTwoTowers(dml_cuda.SigLIPLoss(learned(5.0), learned(-3.0))),
    "RecallAtKLoss-learned": lambda: dml_cuda.RecallAtKLoss(
        temperature=learned(0.1), temperature_k=learned(2.0)
    ),
    "InfoNCELoss-learned": lambda: OfTwoTowers(dml_cuda.InfoNCELoss(learned(0.2))),
    "DistributedLoss-ring-learned": lambda: distributed.DistributedLoss(
        dml_cuda.NTXentLoss(learned(0.2)), mode="ring"
    ),
}


def name_of(cls):
    return f"pml.{cls.__name__}" if cls.__module__.startswith("dml_cuda.pml") else cls.__name__


SUBJECTS = {**{name_of(cls): make for cls, make in MAKERS.items() if make is not None}, **MORE}
HEADS = {name_of(cls): make for cls, make in MAKERS.items() if issubclass(cls, ClassifierLoss)}


def make(name):
    """The module of that name, always with the same weights."""
    torch.manual_seed(1)
    return SUBJECTS[name]()


def make_batch(dtype=torch.float32):
    """Embeddings ``[N, D]`` and labels ``[N]`` of all classes."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(ROWS) % CLASSES
    centres = torch.randn(CLASSES, DIM, generator=generator)
    return (centres[labels] + torch.randn(ROWS, DIM, generator=generator)).to(dtype), labels


def call(module, embeddings, labels):
    """The loss; miners that draw draw alike."""
    torch.manual_seed(3)
    return module(embeddings, labels)


def step(module, embeddings, labels):
    """The loss, and the gradients of the embeddings and of the parameters."""
    leaf = embeddings.detach().clone().requires_grad_()
    value = call(module, leaf, labels)
    return [value.detach(), *torch.autograd.grad(value, [leaf, *module.parameters()])]
