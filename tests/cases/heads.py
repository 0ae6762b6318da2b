"""The table of class-level losses."""

from dataclasses import dataclass

import pytest
import torch

import dml_cuda


@dataclass(frozen=True)
class Head:
    """A class-level loss by its name, which is pytorch-metric-learning's where it has it."""

    name: str
    cases: tuple[dict, ...] = ({},)  # parameters to compare with others at
    smooth: tuple[tuple[str, object], ...] = ()  # with which finite differences see the derivative
    pml: bool = True

    def make(self, classes, dim, **options):
        return getattr(dml_cuda, self.name)(classes, dim, **options)


HEADS = {
    head.name: head
    for head in (
        Head("NormalizedSoftmaxLoss", ({}, {"temperature": 0.5})),
        Head("CosFaceLoss", ({}, {"margin": 0.1, "scale": 10}), (("scale", 8.0),)),
        Head("ArcFaceLoss", ({}, {"margin": 0, "scale": 10}, {"margin": 100}), (("scale", 8.0),)),
        Head("ProxyAnchorLoss", ({}, {"margin": 0.3, "alpha": 8}), (("alpha", 8.0),)),
        Head("ProxyNCALoss", ({}, {"softmax_scale": 10})),
        Head("SoftTripleLoss", ({}, {"centers_per_class": 3, "la": 5, "gamma": 0.01, "margin": 0.2})),
        Head(
            "SubCenterArcFaceLoss",
            ({}, {"margin": 0, "scale": 10, "sub_centers": 1}, {"margin": 45, "sub_centers": 4}),
            (("scale", 8.0),),
        ),
        Head("SphereFaceLoss", ({}, {"margin": 2, "scale": 4}, {"margin": 1})),
        Head("CircleClassifierLoss", smooth=(("gamma", 4.0), ("detach_weights", False)), pml=False),
    )
}
EVERY_HEAD = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


def make_rows(module, n, spread=1.0):
    """``[N, D]`` embeddings near their classes' weights, some nearer than others, and labels ``[N]``."""
    labels = torch.randint(0, module.num_classes, (n,))
    rows = module.rows().detach().view(module.num_classes, -1, module.embedding_size)[:, 0]
    rows = torch.nn.functional.normalize(rows, dim=1) * module.embedding_size**0.5
    return (rows[labels] + spread * torch.randn(n, module.embedding_size, dtype=rows.dtype)), labels


def parameter(module):
    return getattr(module, module.weight)


def evaluate(module, embeddings, labels, *more):
    """``[loss, gradient to the embeddings, gradient to the weights]``"""
    leaf = embeddings.detach().clone().requires_grad_()
    value = module(leaf, labels, *more)
    weight = next(module.parameters())
    return [value.detach(), *torch.autograd.grad(value, [leaf, weight], torch.ones_like(value))]
