"""The table of public classes: how each is made, and called as a module of embeddings and labels.

The tests of this folder run every one of them through every tool. A public class without an entry fails
``test_every_public_class_is_here``.
"""

import inspect
from pathlib import Path

import torch
from torch import nn

import dml_cuda
from dml_cuda import distributed

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


def _heads(package):
    """The class-level losses of a package."""
    names = "ArcFace", "CosFace", "NormalizedSoftmax", "ProxyAnchor", "ProxyNCA", "SoftTriple"
    makers = [getattr(package, f"{name}Loss") for name in names]
    makers += [package.CircleClassifierLoss] if hasattr(package, "CircleClassifierLoss") else []
    return {make: lambda make=make: make(CLASSES, DIM) for make in makers}


def _losses(package):
    """The losses of pairs and triplets of a package, with their defaults."""
    names = "Circle", "Contrastive", "GeneralizedLiftedStructure", "MultiSimilarity", "NTXent", "SupCon"
    makers = [getattr(package, f"{name}Loss") for name in (*names, "TripletMargin")]
    makers += [package.BinomialDevianceLoss] if hasattr(package, "BinomialDevianceLoss") else []
    learnt = {package.MarginLoss: lambda: package.MarginLoss(learn_beta=True, num_classes=CLASSES)}
    return {**{make: make for make in makers}, **learnt}


def _miners(package):
    """The miners of a package, each with a loss that takes what it finds."""
    of_triplets = "BatchEasyHard", "BatchHard", "DistanceWeighted", "TripletMargin"
    makers = {getattr(package, f"{name}Miner"): package.TripletMarginLoss for name in of_triplets}
    makers |= {package.MultiSimilarityMiner: package.MultiSimilarityLoss}
    makers |= {package.PairMarginMiner: package.ContrastiveLoss}
    return {make: lambda make=make, loss=loss: WithMiner(loss(), make()) for make, loss in makers.items()}


def _custom():
    return dml_cuda.compile_loss(ROOT / "examples" / "custom_losses" / "nca.h")(scale=8.0)


def _memory():
    return dml_cuda.CrossBatchMemory(
        dml_cuda.MultiSimilarityLoss(), DIM, 4 * ROWS, dml_cuda.MultiSimilarityMiner(0.1)
    )


def _distributed():
    return distributed.DistributedLoss(dml_cuda.MultiSimilarityLoss(epsilon=0.1))


MAKERS = {
    **_heads(dml_cuda),
    **_losses(dml_cuda),
    **_miners(dml_cuda),
    dml_cuda.CrossBatchMemory: _memory,
    distributed.DistributedLoss: _distributed,
    dml_cuda.custom.CustomLoss: _custom,
    **({} if pml is None else {**_heads(pml), **_losses(pml), **_miners(pml)}),
}
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
    "MultiSimilarityLoss-mined": lambda: dml_cuda.MultiSimilarityLoss(epsilon=0.1),
    "TripletMarginLoss-smooth": lambda: dml_cuda.TripletMarginLoss(smooth_loss=True),
    "MarginLoss-fixed": dml_cuda.MarginLoss,
}


def public_classes():
    """The modules that the package makes public, found by their names alone."""
    packages = [dml_cuda, distributed, dml_cuda.custom]
    packages += [getattr(dml_cuda, name) for name in ("losses", "miners") if name in dml_cuda.__all__]
    packages += [] if pml is None else [pml]
    names = {(package, name) for package in packages for name in getattr(package, "__all__", ())}
    found = {getattr(package, name) for package, name in names}
    return {x for x in found if inspect.isclass(x) and issubclass(x, nn.Module)}


def name_of(cls):
    return f"pml.{cls.__name__}" if cls.__module__.startswith("dml_cuda.pml") else cls.__name__


SUBJECTS = {**{name_of(cls): make for cls, make in MAKERS.items()}, **MORE}
HEADS = {name_of(cls): make for cls, make in _heads(dml_cuda).items()}


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
