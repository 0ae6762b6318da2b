"""A formula that has no reference in PyTorch: its functions are ops with first derivatives.

Listed pairs and ``backend="reference"`` use it; the fused kernels do not.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _C
from .._ops.autograd import call, register_derivative
from .._ops.fake import fake_kernel
from ..losses._formula import Formula, Pairs, Part, logaddexp


@fake_kernel("formula_terms")
def _formula_terms(a):
    return torch.empty_like(a.s), torch.empty_like(a.s), torch.empty_like(a.s)


@fake_kernel("formula_rows")
def _formula_rows(a):
    return a.gathered.new_empty(6, a.gathered.shape[1])


class _Once(torch.autograd.Function):
    """Identity of a gradient that cannot be differentiated, as the ops have first derivatives only."""

    @staticmethod
    def forward(ctx, grad):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(
            "a custom formula without a reference has no second derivative: pass a reference to "
            'compile_loss, and use backend="reference"'
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
    """The terms of pairs and their derivatives by ``s`` and by the context, all in the shape of ``s``."""
    context = None if context is None else context.to("cpu")
    results = call("formula_terms", s.to("cpu"), context, formula, list(params), positives)
    return tuple(result.to(s.device) for result in results)


def rows(formula: str, params: Sequence[float], *gathered: Tensor) -> Tensor:
    """``[6, N]``: parts 0 and 1, counts 0 and 1, derivatives by the accumulators of negatives and positives.

    ``gathered`` are ``[N]`` each: the accumulators of negatives and positives, then their counts.
    """
    stacked = torch.stack(gathered)
    return call("formula_rows", stacked.to("cpu"), formula, list(params)).to(stacked.device)


class CompiledFormula(Formula):
    """The formula that ``compile_loss`` makes without a reference.

    For tensors on a GPU its functions run on the CPU, which synchronises.
    """

    facts: ClassVar[dict[str, bool]]

    @classmethod
    def _accumulate(cls, pairs: Pairs, terms: Tensor, sums: bool) -> Tensor:
        return pairs.sum(terms) if sums else pairs.lse(terms, cls.facts["plus_one"])

    @classmethod
    def row(cls, pos: Pairs, neg: Pairs, *params: float) -> Any:
        facts = cls.facts

        def terms_of(pairs: Pairs, positives: bool, context: Tensor | None = None) -> Tensor:
            return terms(cls.name, params, pairs.s, context, positives)[0]

        push = cls._accumulate(neg, terms_of(neg, False), facts["sums_negatives"])
        if facts["pos_in_neg"]:
            push = logaddexp(push, pos.lse(terms_of(pos, False)))
        context = pos.spread(push).expand(pos.s.shape) if facts["context"] else None
        pulled = neg if facts["only_negatives"] else pos
        pulls = terms_of(pulled, True, context)
        pull = cls._accumulate(pulled, pulls, facts["sums_positives"])

        incomplete = torch.zeros_like(push, dtype=torch.bool)
        if facts["needs_pos"]:
            incomplete = incomplete | (pos.count == 0)
        if facts["needs_neg"]:
            incomplete = incomplete | (neg.count == 0)

        def without_incomplete(value: Tensor, sums: bool) -> Tensor:
            return torch.where(incomplete, 0.0 if sums or facts["plus_one"] else -torch.inf, value)

        values = (
            without_incomplete(push, facts["sums_negatives"]),
            without_incomplete(pull, facts["sums_positives"]),
        )

        def finish(neg_count: Tensor, pos_count: Tensor) -> Tensor:
            counts = (torch.where(incomplete, 0, count).to(push.dtype) for count in (neg_count, pos_count))
            return rows(cls.name, params, *values, *counts)

        results = finish(neg.count, pulled.count)
        losses, counts = results[:2], results[2:4].detach().long()
        if facts["counts_pairs"]:
            pushes = terms_of(neg, False).detach() if facts["sums_negatives"] else neg.s
            results = finish(neg.number(cls.is_nonzero(pushes)), pulled.number(cls.is_nonzero(pulls)))
            nonzero = results[2:4].detach().long()
        elif facts["two_parts"] or facts["counts_rows_with_loss"]:
            nonzero = cls.is_nonzero(losses).long()
        else:
            return losses[0]
        count = 2 if facts["two_parts"] else 1
        return tuple(Part(losses[k], counts[k], nonzero[k]) for k in range(count))
