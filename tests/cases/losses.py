"""The table of losses: what the tests that hold for every loss need to know of each."""

from dataclasses import dataclass, field
from functools import cached_property

import pytest
import torch

import dml_cuda
from dml_cuda import functional

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Loss:
    """A loss by its name in the ops."""

    name: str
    module: type
    defaults: dict  # every parameter, as users and pytorch-metric-learning know it
    changed: dict  # every parameter, at another value than its default
    similarity: str = "cosine"  # by default
    reduction: str = "mean"  # by default
    # Parameters that kernels are tried with on cosines and on distances, where the defaults do not suit.
    on_cosines: dict = field(default_factory=dict)
    on_distances: dict = field(default_factory=dict)
    smooth: dict = field(default_factory=dict)  # with which finite differences see the derivative
    wrong: dict = field(default_factory=dict)  # as the cases of test_bad_input.py
    pml: str | None = None  # its class in pytorch-metric-learning
    pml_squares: bool = False  # whether its distances are squared there
    pml_mines: bool = True  # whether a miner's pairs select pairs there, not weights of rows
    steep: bool = False  # whether the derivative has no bound, so that one pair may decide about rounding
    cases: tuple[dict, ...] = ({},)  # parameters to compare with others at
    called: str | None = None  # the function, where it has another name than the formula

    @cached_property
    def function(self):
        return getattr(functional, self.called or f"{self.name}_loss")

    @cached_property
    def learnable(self):
        """The parameters that may learn: numbers."""
        return [name for name, value in self.defaults.items() if not isinstance(value, bool)]

    def params(self, similarity="cosine", **changed):
        """The parameters as the ops take them."""
        return self.module.formula.params({**self.defaults, **changed}, similarity)


def _not_positive(*names):
    cases = {}
    for name in names:
        cases |= {
            f"{name} 0": ({name: 0}, ValueError, [name, "above 0", "0"]),
            f"{name} negative": ({name: -2.0}, ValueError, [name, "above 0", "-2"]),
        }
    return cases | _no_number(*names)


def _no_number(*names):
    cases = {}
    for name in names:
        cases |= {
            f"{name} infinite": ({name: INF}, ValueError, [name, "finite", "inf"]),
            f"{name} NaN": ({name: NAN}, ValueError, [name, "finite", "nan"]),
            f"{name} string": ({name: "0.5"}, TypeError, [name, "number", "str"]),
            f"{name} of integers": ({name: torch.tensor(2)}, TypeError, [name, "floating", "int64"]),
            f"{name} of two": ({name: torch.ones(2)}, ValueError, [name, "one number", "[2]"]),
            f"{name} NaN tensor": ({name: torch.tensor(NAN)}, ValueError, [name, "finite", "nan"]),
            f"{name} None": ({name: None}, TypeError, [name, "number", "NoneType"]),
            f"{name} beyond float": ({name: 10**400}, ValueError, [name, "finite", "1"]),
        }
    return cases


LOSSES = {
    loss.name: loss
    for loss in (
        Loss(
            "multi_similarity",
            dml_cuda.MultiSimilarityLoss,
            {"alpha": 2.0, "beta": 50.0, "base": 0.5},
            {"alpha": 3.0, "beta": 40.0, "base": 0.3},
            on_distances={"beta": 10.0, "base": 1.0},
            smooth={"beta": 5.0},
            wrong={**_not_positive("alpha", "beta"), **_no_number("base")},
            pml="MultiSimilarityLoss",
            cases=({}, {"beta": 40}),
        ),
        Loss(
            "circle",
            dml_cuda.CircleLoss,
            {"m": 0.4, "gamma": 80.0, "detach_weights": True},
            {"m": 0.25, "gamma": 64.0, "detach_weights": False},
            reduction="mean_nonzero",
            on_distances={"gamma": 4.0},
            smooth={"gamma": 4.0, "detach_weights": False},
            wrong={
                **_not_positive("gamma"),
                **_no_number("m"),
                "detach_weights": ({"detach_weights": 1}, TypeError, ["detach_weights", "True", "int"]),
            },
            pml="CircleLoss",
            cases=({}, {"m": 0.25, "gamma": 256}),
        ),
        Loss(
            "contrastive",
            dml_cuda.ContrastiveLoss,
            {"pos_margin": 0.0, "neg_margin": 1.0},
            {"pos_margin": 0.2, "neg_margin": 0.7},
            similarity="euclidean",
            reduction="mean_nonzero",
            on_cosines={"pos_margin": 0.9, "neg_margin": 0.2},
            on_distances={"pos_margin": 0.1, "neg_margin": 1.2},
            wrong=_no_number("pos_margin", "neg_margin"),
            pml="ContrastiveLoss",
            cases=({}, {"pos_margin": 0.9, "neg_margin": 0.4}),
        ),
        Loss(
            "binomial_deviance",
            dml_cuda.BinomialDevianceLoss,
            {"alpha": 2.0, "beta": 40.0, "base": 0.5},
            {"alpha": 3.0, "beta": 20.0, "base": 0.3},
            on_distances={"beta": 10.0, "base": 1.0},
            smooth={"beta": 5.0},
            wrong={**_not_positive("alpha", "beta"), **_no_number("base")},
        ),
        Loss(
            "nt_xent",
            dml_cuda.NTXentLoss,
            {"temperature": 0.07},
            {"temperature": 0.3},
            on_distances={"temperature": 0.2},
            smooth={"temperature": 0.5},
            wrong=_not_positive("temperature"),
            pml="NTXentLoss",
            cases=({}, {"temperature": 0.5}),
        ),
        Loss(
            "sup_con",
            dml_cuda.SupConLoss,
            {"temperature": 0.1},
            {"temperature": 0.3},
            reduction="mean_nonzero",
            on_distances={"temperature": 0.2},
            smooth={"temperature": 0.5},
            wrong=_not_positive("temperature"),
            pml="SupConLoss",
            cases=({}, {"temperature": 0.5}),
        ),
        Loss(
            "lifted_structure",
            dml_cuda.GeneralizedLiftedStructureLoss,
            {"neg_margin": 1.0, "pos_margin": 0.0},
            {"neg_margin": 1.5, "pos_margin": 0.2},
            similarity="euclidean",
            on_cosines={"neg_margin": 0.2, "pos_margin": 0.9},
            on_distances={"neg_margin": 1.2, "pos_margin": 0.1},
            wrong=_no_number("neg_margin", "pos_margin"),
            pml="GeneralizedLiftedStructureLoss",
            cases=({}, {"neg_margin": 0.5, "pos_margin": 0.3}),
            called="generalized_lifted_structure_loss",
        ),
        Loss(
            "nca",
            dml_cuda.NCALoss,
            {"softmax_scale": 1.0},
            {"softmax_scale": 6.0},
            similarity="euclidean",
            on_cosines={"softmax_scale": 16.0},
            on_distances={"softmax_scale": 8.0},
            wrong=_not_positive("softmax_scale"),
            pml="NCALoss",
            pml_squares=True,
            pml_mines=False,
            cases=({}, {"softmax_scale": 8.0}),
        ),
        Loss(
            "tuplet_margin",
            dml_cuda.TupletMarginLoss,
            {"margin": 5.73, "scale": 64.0},
            {"margin": 10.0, "scale": 16.0},
            on_distances={"scale": 8.0},
            smooth={"scale": 4.0},
            wrong={**_not_positive("scale"), **_no_number("margin")},
            pml="TupletMarginLoss",
            steep=True,
            cases=({}, {"margin": 20.0, "scale": 16.0}),
        ),
    )
}
ON_CUDA = {name: loss for name, loss in LOSSES.items() if loss.module.formula.on_cuda}
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
SIMILARITIES = ("cosine", "dot", "euclidean", "euclidean_raw")  # as the ops name them
REDUCTIONS = ("mean", "mean_nonzero", "mean_valid", "sum", "none")


def by_name(similarity):
    """The options that name a similarity of the ops."""
    if similarity == "euclidean_raw":
        return {"similarity": "euclidean", "normalize_embeddings": False}
    return {"similarity": similarity}
