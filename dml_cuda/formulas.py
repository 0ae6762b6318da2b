"""The formulas of the losses on similarities, as csrc/pair_math.h has them for the kernels.

A loss is known by the logits of its positives and negatives, whose log-sum-exp each row takes over its
kept pairs, and by what a row makes of the two.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MultiSimilarity:
    """Wang et al., CVPR 2019, equation 15."""

    alpha: float
    beta: float
    base: float

    name = "multi_similarity"
    plus_one = True  # the log-sum-exps are log(1 + sum exp)

    @property
    def params(self) -> list[float]:
        return [float(self.alpha), float(self.beta), float(self.base)]

    def positive_logits(self, s: Tensor) -> Tensor:
        return -self.alpha * (s - self.base)

    def negative_logits(self, s: Tensor) -> Tensor:
        return self.beta * (s - self.base)

    def row_losses(self, lse_pos: Tensor, lse_neg: Tensor) -> Tensor:
        return lse_pos / self.alpha + lse_neg / self.beta


@dataclass(frozen=True)
class Circle:
    """Sun et al., CVPR 2020, equations 4 to 8."""

    m: float
    gamma: float
    detach_weights: bool

    name = "circle"
    plus_one = False

    @property
    def params(self) -> list[float]:
        return [float(self.m), float(self.gamma), float(self.detach_weights)]

    def _fixed(self, s: Tensor) -> Tensor:
        return s.detach() if self.detach_weights else s

    def positive_logits(self, s: Tensor) -> Tensor:
        return -self.gamma * torch.relu(1 + self.m - self._fixed(s)) * (s - (1 - self.m))

    def negative_logits(self, s: Tensor) -> Tensor:
        return self.gamma * torch.relu(self._fixed(s) + self.m) * (s - self.m)

    def row_losses(self, lse_pos: Tensor, lse_neg: Tensor) -> Tensor:
        """0 where a row lacks either kind (a log-sum-exp of -inf)."""
        both = (lse_pos != -float("inf")) & (lse_neg != -float("inf"))
        # softplus, by logaddexp: torch's own softplus drops the last digits above 20.
        total = torch.where(both, lse_pos + lse_neg, 0.0)
        return torch.where(both, torch.logaddexp(total, torch.zeros_like(total)), 0.0)


Formula = MultiSimilarity | Circle
