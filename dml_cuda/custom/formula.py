"""A formula that is stated in C++ alone, as Python sees it: its formulas are ops, with their first
derivatives.

It serves what the fused kernels do not: pairs given as lists, and the reference.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _C
from .._ops.autograd import call, register_derivative
from .._ops.fake import fake_kernel
from ..losses._formula import Formula, Pairs, Part


@fake_kernel("formula_terms")
def _formula_terms(a):
    return torch.empty_like(a.s), torch.empty_like(a.s), torch.empty_like(a.s)


@fake_kernel("formula_rows")
def _formula_rows(a):
    return a.gathered.new_empty(6, a.gathered.shape[1])


class _Once(torch.autograd.Function):
    """A gradient that cannot be differentiated: the formulas give first derivatives."""

    @staticmethod
    def forward(ctx, grad):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(
            "a formula that is stated in C++ alone has no second derivative: give compile_loss a reference, "
            "and pass "
            'backend="reference"'
        )


def _first_derivative(grad: Tensor) -> Tensor:
    return _Once.apply(grad) if torch.is_grad_enabled() else grad


def _terms_setup_context(ctx, inputs, output) -> None:
    _, derivative, by_context = output
    ctx.mark_non_differentiable(derivative, by_context)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(derivative, by_context)


def _terms_backward(ctx, grad, *_):
    derivative, by_context = ctx.saved_tensors
    if grad is None:
        return (None,) * 5
    of_s, of_context = ctx.needs_input_grad[:2]
    return (
        _first_derivative(grad * derivative) if of_s else None,
        _first_derivative(grad * by_context) if of_context else None,
        *(None,) * 3,
    )


def _rows_setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(output)
    ctx.last = int(_C.formula_facts(inputs[1])[1]["two_parts"])


def _rows_backward(ctx, grad):
    (out,) = ctx.saved_tensors
    none = torch.zeros_like(out[0])
    by = torch.stack([grad[ctx.last] * out[4], grad[0] * out[5], none, none])
    return _first_derivative(by), None, None


register_derivative("formula_terms", _terms_backward, _terms_setup_context)
register_derivative("formula_rows", _rows_backward, _rows_setup_context)


def terms(
    formula: str, params: Sequence[float], s: Tensor, context: Tensor | None, positives: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The terms of pairs, with their derivatives by ``s`` and by the context; all of the shape of ``s``."""
    beside = None if context is None else context.to("cpu")
    found = call("formula_terms", s.to("cpu"), beside, formula, list(params), positives)
    return tuple(each.to(s.device) for each in found)


def rows(formula: str, params: Sequence[float], *gathered: Tensor) -> Tensor:
    """``[6, N]`` parts 0 and 1, counts 0 and 1, derivatives by the two accumulators; from the values and
    counts ``[N]`` of negatives and positives."""
    stacked = torch.stack(gathered)
    return call("formula_rows", stacked.to("cpu"), formula, list(params)).to(stacked.device)


def _both(first: Tensor, second: Tensor) -> Tensor:
    """log(exp(first) + exp(second)), -inf without a gradient where both are."""
    some = (first != -torch.inf) | (second != -torch.inf)
    value = torch.logaddexp(torch.where(some, first, 0.0), torch.where(some, second, 0.0))
    return torch.where(some, value, -torch.inf)


class CompiledFormula(Formula):
    """What ``compile_loss`` makes of a formula without a reference.

    On a GPU the formulas go through the CPU, which waits for it; the fused kernels do not use them.
    """

    facts: ClassVar[dict[str, bool]]

    @classmethod
    def _fold(cls, pairs: Pairs, found: Tensor, sums: bool) -> Tensor:
        return pairs.sum(found) if sums else pairs.lse(found, cls.facts["plus_one"])

    @classmethod
    def row(cls, pos: Pairs, neg: Pairs, *params: float) -> Any:
        facts = cls.facts

        def of(pairs: Pairs, positives: bool, context: Tensor | None = None) -> Tensor:
            return terms(cls.name, params, pairs.s, context, positives)[0]

        push = cls._fold(neg, of(neg, False), facts["sums_negatives"])
        if facts["pos_in_neg"]:
            push = _both(push, pos.lse(of(pos, False)))
        context = pos.spread(push).expand(pos.s.shape) if facts["context"] else None
        pulls = of(pos, True, context)
        pull = cls._fold(pos, pulls, facts["sums_positives"])

        lacks = torch.zeros_like(push, dtype=torch.bool)
        if facts["needs_pos"]:
            lacks = lacks | (pos.count == 0)
        if facts["needs_neg"]:
            lacks = lacks | (neg.count == 0)

        def gathered(value: Tensor, sums: bool) -> Tensor:
            return torch.where(lacks, 0.0 if sums or facts["plus_one"] else -torch.inf, value)

        values = gathered(push, facts["sums_negatives"]), gathered(pull, facts["sums_positives"])

        def finished(neg_count: Tensor, pos_count: Tensor) -> Tensor:
            counts = (torch.where(lacks, 0, count).to(push.dtype) for count in (neg_count, pos_count))
            return rows(cls.name, params, *values, *counts)

        found = finished(neg.count, pos.count)
        losses, counts = found[:2], found[2:4].detach().long()
        if facts["counts_pairs"]:
            pushes = of(neg, False).detach() if facts["sums_negatives"] else neg.s
            some = finished(neg.number(pushes != 0), pos.number(pulls.detach() != 0))
            nonzero = some[2:4].detach().long()
        elif facts["two_parts"]:
            nonzero = (losses != 0).long()
        else:
            return losses[0]
        count = 2 if facts["two_parts"] else 1
        return tuple(Part(losses[k], counts[k], nonzero[k]) for k in range(count))
