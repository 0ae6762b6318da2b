"""Two losses that dml_cuda has not, as custom formulas; docs/custom_loss.md tells how they came about."""

import math
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

import dml_cuda
from dml_cuda.losses._formula import Formula, Pairs, Part, softplus

HERE = Path(__file__).parent


class Unified(Formula):
    """Sun et al., CVPR 2020, equation 1."""

    @staticmethod
    def row(pos: Pairs, neg: Pairs, scale: float) -> Tensor:
        push, pull = neg.lse(scale * neg.s), pos.lse(-scale * pos.s)
        return softplus(push + pull, where=(pos.count > 0) & (neg.count > 0))


class ArcCon(Formula):
    """Zhang et al., ACL 2022, equation 2."""

    repeats: ClassVar[bool] = True

    @staticmethod
    def row(pos: Pairs, neg: Pairs, scale: float, margin: float) -> tuple[Part, ...]:
        square = torch.relu((1 - pos.s) * (1 + pos.s))
        sine = torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0)
        turned = math.cos(margin) * pos.s - math.sin(margin) * sine  # cos(theta + margin)
        lse = pos.spread(neg.lse(scale * neg.s))
        return (pos.each(softplus(lse - scale * turned, where=pos.spread(neg.count > 0))),)


@cache
def unified_loss() -> type[dml_cuda.custom.CustomLoss]:
    """The class of the loss; compiled when it is first asked for."""
    return dml_cuda.compile_loss(HERE / "unified.h", Unified, name="UnifiedLoss")


@cache
def arc_con_loss() -> type[dml_cuda.custom.CustomLoss]:
    return dml_cuda.compile_loss(HERE / "arc_con.h", ArcCon, name="ArcConLoss")
