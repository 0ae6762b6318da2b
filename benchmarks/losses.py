"""The losses of dml_cuda by name, read from the package, for benchmarks, examples and figures."""

import re

from torch import nn

import dml_cuda
from dml_cuda.losses._classifier import ClassifierLoss
from dml_cuda.losses._pair import PairLoss
from dml_cuda.losses._ranking import RankingLoss
from dml_cuda.losses._triplet import TripletLoss

_WORD_ENDS = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def short_name(name: str) -> str:
    """The name of a loss's class without its ending: "ProxyNCALoss" to "ProxyNCA"."""
    return name.removesuffix("Loss")


def snake_case(name: str) -> str:
    """The name of a loss's class as options spell it: "ProxyNCALoss" to "proxy_nca"."""
    return _WORD_ENDS.sub("_", short_name(name)).lower()


def _by_name(kind: type[nn.Module]) -> dict[str, type[nn.Module]]:
    classes = (getattr(dml_cuda, name) for name in dml_cuda.__all__)
    return {
        snake_case(cls.__name__): cls for cls in classes if isinstance(cls, type) and issubclass(cls, kind)
    }


PAIR_LOSSES = _by_name(PairLoss)
CLASS_LOSSES = _by_name(ClassifierLoss)
TRIPLET_LOSSES = _by_name(TripletLoss)
RANKING_LOSSES = _by_name(RankingLoss)
LOSSES = PAIR_LOSSES | CLASS_LOSSES | TRIPLET_LOSSES | RANKING_LOSSES
