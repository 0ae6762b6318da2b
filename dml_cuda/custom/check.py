"""Whether a formula says what it should: its formulas one by one, then whole batches."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from .._ops.evaluate import evaluate_arguments
from ..losses._formula import Pairs
from ..losses._pair import PairLoss, make_call
from ..reference.pairs import MaskedPairs
from . import formula as formulas
from .formula import CompiledFormula

_STEP = 1e-6
_CLOSE = 1e-9  # of two ways to compute the same in float64
_DIFFERENCE = 1e-5  # of a derivative and a finite difference
_ROUNDED = 4e-7  # by so much a cosine may leave [-1, 1] in float32
_KINDS = {"neg_term": False, "pos_term": True}


class _Seen(Pairs):
    """The pairs of one row, and what a reference makes of them."""

    def __init__(self, s: Tensor) -> None:
        self._pairs = MaskedPairs(s, torch.ones_like(s, dtype=torch.bool))
        self.s, self.count = s, self._pairs.count
        self.terms: list[Tensor] = []

    def spread(self, of_rows: Tensor) -> Tensor:
        return self._pairs.spread(of_rows)

    def lse(self, logits: Tensor, plus_one: bool = False) -> Tensor:
        self.terms.append(logits)
        return self._pairs.lse(logits, plus_one)

    def sum(self, terms: Tensor) -> Tensor:
        self.terms.append(terms)
        return self._pairs.sum(terms)

    def number(self, which: Tensor) -> Tensor:
        return self._pairs.number(which)


class _Formulas:
    """A formula's formulas at a grid of similarities [G], in float64 or float32."""

    def __init__(self, loss: PairLoss) -> None:
        self.formula, self.params = loss.formula, loss.call.params
        self.name = self.formula.name
        self.facts = _C.formula_facts(self.name)[1]
        least, most = {"cosine": (-1.0, 1.0), "euclidean": (-2.0, 0.0)}.get(loss.call.similarity, (-3.0, 3.0))
        steps = torch.arange(-200, 201, dtype=torch.float64) / 200
        self.grid = (least + most) / 2 + (most - least) / 2 * steps
        ends = [least - _ROUNDED, most + _ROUNDED] if loss.call.similarity == "cosine" else []
        self.with_ends = torch.cat([self.grid, torch.tensor(ends, dtype=torch.float64)])

    def terms(self, s: Tensor, positives: bool, context: float | None) -> tuple[Tensor, Tensor, Tensor]:
        beside = None if context is None else torch.full_like(s, context)
        return formulas.terms(self.name, self.params, s, beside, positives)

    def contexts(self, positives: bool) -> list[float | None]:
        """What negatives may leave to positives."""
        if not (positives and self.facts["context"]):
            return [None]
        found = self.terms(self.grid, False, None)[0]
        if self.facts["sums_negatives"]:
            return [0.0, float(found.mean()), float(found.sum())]
        none = 0.0 if self.facts["plus_one"] else -math.inf
        return [none, float(found.min()), float(found.mean()), float(found.max()) + math.log(1e3)]


def _at(s: Tensor, k: int, context: float | None) -> str:
    beside = "" if context is None else f", context = {context:.6g}"
    return f"at s = {float(s[k]):.8g}{beside}"


def _first(wrong: Tensor) -> int | None:
    found = wrong.nonzero()
    return int(found[0, 0]) if len(found) else None


def _worst(a: Tensor, b: Tensor, tolerance: Tensor | float) -> int | None:
    """Where two differ most, if by more than they may."""
    beyond = (a - b).abs() - tolerance
    beyond = torch.where(torch.isfinite(a) & torch.isfinite(b), beyond, -1.0)
    return int(beyond.argmax()) if len(beyond) and float(beyond.max()) > 0 else None


# ---- the formulas ------------------------------------------------------------------------------------------


def _check_finite(of: _Formulas, found: list[str]) -> None:
    for name, positives in _KINDS.items():
        for context in of.contexts(positives):
            for dtype in (torch.float64, torch.float32):
                s = of.with_ends.to(dtype)
                names = "value", "derivative", "derivative by the context"
                results = dict(zip(names, of.terms(s, positives, context), strict=True))
                for what, numbers in results.items():
                    k = _first(~torch.isfinite(numbers))
                    if k is not None:
                        number = str(dtype).removeprefix("torch.")
                        found.append(
                            f"{name}: its {what} is {float(numbers[k])} {_at(s, k, context)} in {number}"
                        )
                        break
                else:
                    continue
                break


def _one_sided(f: Callable[[float], Tensor]) -> tuple[Tensor, Tensor]:
    """The least and the greatest of the differences to both sides: at a kink the derivative may be any
    between."""
    here = f(0.0)
    left, right = (here - f(-_STEP)) / _STEP, (f(_STEP) - here) / _STEP
    return torch.minimum(left, right), torch.maximum(left, right)


def _outside(derivative: Tensor, least: Tensor, most: Tensor) -> int | None:
    size = 1 + torch.maximum(least.abs(), most.abs())
    # Where the derivative itself changes quickly, the two sides differ.
    nearest = torch.minimum(torch.maximum(derivative, least), most)
    return _worst(derivative, nearest, _DIFFERENCE * size + (most - least))


def _check_derivatives(of: _Formulas, found: list[str]) -> None:
    inner = of.grid[1:-1]
    for name, positives in _KINDS.items():
        for context in of.contexts(positives):
            if context is not None and not math.isfinite(context):
                continue
            _, derivative, by_context = of.terms(inner, positives, context)

            def moved(step: float, positives: bool = positives, context: float | None = context) -> Tensor:
                return of.terms(inner + step, positives, context)[0]

            least, most = _one_sided(moved)
            k = _outside(derivative, least, most)
            if k is not None:
                found.append(
                    f"{name}: its derivative is {float(derivative[k]):.8g} {_at(inner, k, context)}, finite "
                    f"differences say {float((least[k] + most[k]) / 2):.8g}"
                )
            if context is None:
                continue

            def moved_context(step: float, positives: bool = positives, context: float = context) -> Tensor:
                return of.terms(inner, positives, context + step)[0]

            least, most = _one_sided(moved_context)
            k = _outside(by_context, least, most)
            if k is not None:
                found.append(
                    f"{name}: its derivative by the context is {float(by_context[k]):.8g} "
                    f"{_at(inner, k, context)}, finite differences say {float((least[k] + most[k]) / 2):.8g}"
                )


def _check_declarations(of: _Formulas, found: list[str]) -> None:
    facts = of.facts
    for name, positives in _KINDS.items():
        sums = facts["sums_positives" if positives else "sums_negatives"]
        context = of.contexts(positives)[-1]
        term, derivative, _ = of.terms(of.grid, positives, context)
        if facts["hinge"] and sums:
            k = _first((term == 0) & (derivative != 0))
            if k is not None:
                found.append(
                    f"kHinge: {name} is 0 {_at(of.grid, k, context)}, but its derivative is "
                    f"{float(derivative[k]):.8g}"
                )
        if sums:
            continue
        # Smaller somewhere before and somewhere after: then the largest logit is at neither end.
        before, after = term.cummin(0).values, term.flip(0).cummin(0).values.flip(0)
        peak = (term - before).minimum(term - after)
        k = int(peak.argmax())
        if float(peak[k]) > _CLOSE * (1 + float(term.abs().max())):
            found.append(
                f"{name}: has a maximum {_at(of.grid, k, context)}, between smaller logits; the CUDA kernels "
                "look for the largest at the least and the greatest similarity"
            )


def _row_points(of: _Formulas) -> Tensor:
    """``[4, N]`` gathered values."""
    generator = torch.Generator().manual_seed(0)
    values = 3 * torch.randn(2, 64, generator=generator, dtype=torch.float64)
    for k, sums in enumerate((of.facts["sums_negatives"], of.facts["sums_positives"])):
        if sums or of.facts["plus_one"]:
            values[k] = values[k].abs()
    counts = torch.randint(1, 20, (2, 64), generator=generator).to(torch.float64)
    return torch.cat([values, counts])


def _check_row(of: _Formulas, derivatives: bool, found: list[str]) -> None:
    points, two = _row_points(of), of.facts["two_parts"]

    def row(moved: Tensor) -> Tensor:
        return formulas.rows(of.name, of.params, *moved)

    result = row(points)
    if not two and bool((result[1] != 0).any()):
        found.append("row: gives a second part, but kParts is 1")
    if not derivatives:
        return
    for k, name in enumerate(("neg", "pos")):
        part = (1 if two else 0) if name == "neg" else 0

        def moved(step: float, k: int = k, part: int = part) -> Tensor:
            by = torch.zeros_like(points)
            by[k] = step
            return row(points + by)[part]

        least, most = _one_sided(moved)
        i = _outside(result[4 + k], least, most)
        if i is not None:
            found.append(
                f"row: its derivative by {name} is {float(result[4 + k, i]):.8g} at neg = "
                f"{float(points[0, i]):.6g}, pos = {float(points[1, i]):.6g}, finite differences say "
                f"{float((least[i] + most[i]) / 2):.8g}"
            )
        if not two:
            continue
        least, most = _one_sided(lambda step, k=k, part=1 - part: moved(step, k, part))
        if float(torch.maximum(least.abs(), most.abs()).max()) > _DIFFERENCE:
            found.append(
                f"row: part {1 - part} depends on {name}; of two parts each has its own kind of pair"
            )


def _compare_formulas(of: _Formulas) -> list[str]:
    """Where the formulas differ from those of the reference."""
    found: list[str] = []
    s = of.grid[None].clone().requires_grad_()
    neg, pos = _Seen(s), _Seen(s)
    of.formula.row(pos, neg, *of.params)
    context = None
    if of.facts["context"]:
        push = of.terms(of.grid, False, None)[0]
        one = push.new_zeros(1) if of.facts["plus_one"] else push.new_full((1,), -math.inf)
        sums = of.facts["sums_negatives"]
        context = float(push.sum() if sums else torch.cat([push, one]).logsumexp(0))
    for (name, positives), seen in zip(_KINDS.items(), (neg, pos), strict=True):
        beside = context if positives else None
        term, derivative, _ = of.terms(of.grid, positives, beside)
        differences = []
        for theirs in seen.terms:
            if theirs.shape != s.shape:
                continue
            grad = torch.zeros_like(s)
            if theirs.requires_grad:
                (grad,) = torch.autograd.grad(theirs.sum(), s, retain_graph=True)
            if beside is not None:  # what the reference differentiates goes through the context too
                grad = derivative[None]
            for what, ours, other in (
                ("it", term, theirs.detach()[0]),
                ("its derivative", derivative, grad[0]),
            ):
                k = _worst(ours, other, 1e-7 * (1 + other.abs()))
                if k is not None:
                    differences.append(
                        f"{name}: {_at(of.grid, k, beside)} {what} is {float(ours[k]):.8g}, the reference's "
                        f"is {float(other[k]):.8g}"
                    )
                    break
            else:
                break
        else:
            found.extend(differences[:1])
    return found


# ---- whole batches -----------------------------------------------------------------------------------------


class _Case(NamedTuple):
    name: str
    embeddings: Tensor
    labels: Tensor
    ref_emb: Tensor | None = None
    ref_labels: Tensor | None = None
    is_random: bool = False
    at_the_ends: bool = False  # similarities of 1 or -1, where a derivative may be anything


def _cases() -> Iterator[_Case]:
    generator = torch.Generator().manual_seed(0)

    def points(n: int) -> Tensor:
        return torch.randn(n, 8, generator=generator, dtype=torch.float64)

    def labels(n: int, classes: int) -> Tensor:
        return torch.randint(0, classes, (n,), generator=generator)

    yield _Case("40 random rows", points(40), labels(40, 6), is_random=True)
    yield _Case("two sets", points(13), labels(13, 4), points(29), labels(29, 4), True)
    yield _Case("one class", points(9), labels(9, 1))
    yield _Case("classes of one row", points(9), torch.arange(9))
    yield _Case("one row", points(1), labels(1, 1))
    yield _Case("no rows", points(0), labels(0, 1))
    yield _Case("rows of zeros", points(12) * (torch.arange(12) % 3 > 0)[:, None], labels(12, 3))
    yield _Case("rows that are equal", points(6).repeat(3, 1), labels(18, 3), at_the_ends=True)
    opposite = points(6)
    yield _Case("rows that are opposite", torch.cat([opposite, -opposite]), labels(12, 3), at_the_ends=True)


def _evaluate(loss: PairLoss, case: _Case, **options: Any) -> tuple[Tensor, Tensor]:
    """The loss and its gradient."""
    call = make_call(loss.formula, loss._values, {**loss.call.options._asdict(), **options})
    x = case.embeddings.detach().clone().requires_grad_()
    value = evaluate_arguments(call, x, case.labels, None, case.ref_emb, case.ref_labels)
    (grad,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), grad


def _check_batches(loss: PairLoss, found: list[str]) -> None:
    for case in _cases():
        for epsilon in (None, 0.1):
            where = f"a batch of {case.name}" + ("" if epsilon is None else f", mined with epsilon {epsilon}")
            # Which losses are exactly 0 is a matter of rounding where similarities are special.
            for reduction in ("none", "mean", "mean_nonzero")[: 3 if case.is_random else 2]:
                how = {"epsilon": epsilon, "reduction": reduction}
                value, grad = _evaluate(loss, case, backend="fused", **how)
                again = _evaluate(loss, case, backend="fused", **how)
                finite = torch.isfinite(value).all() and torch.isfinite(grad).all()
                if finite and not (torch.equal(value, again[0]) and torch.equal(grad, again[1])):
                    found.append(f"{where}: the loss differs from call to call")
                    return
                if not finite:
                    what = "loss" if not torch.isfinite(value).all() else "gradient"
                    found.append(f"{where}: the {what} is not finite (reduction {reduction!r})")
                    return
                truth, truth_grad = _evaluate(loss, case, backend="reference", **how)
                flat, true = value.reshape(-1), truth.reshape(-1)
                k = _worst(flat, true, (1e-5 if case.at_the_ends else 1e-7) * (1 + true.abs()))
                if k is not None:
                    found.append(
                        f"row, or what the formula declares: {where}, reduction {reduction!r}: the loss is "
                        f"{float(flat[k]):.8g}, the reference's {float(true[k]):.8g}"
                    )
                    return
                if case.at_the_ends:
                    continue
                flat, true = grad.reshape(-1), truth_grad.reshape(-1)
                k = _worst(flat, true, 1e-6 * (1e-3 + true.nan_to_num(0, 0, 0).abs().sum()))
                if k is not None:
                    found.append(
                        f"{where}, reduction {reduction!r}: an element of the gradient is "
                        f"{float(flat[k]):.8g}, the reference's {float(true[k]):.8g}"
                    )
                    return


def _check_directions(loss: PairLoss, found: list[str]) -> None:
    """The whole gradient against the whole loss, along some directions."""
    case = next(_cases())
    generator = torch.Generator().manual_seed(1)
    _, grad = _evaluate(loss, case, backend="fused", epsilon=None, reduction="sum")
    for _ in range(4):
        direction = torch.randn(grad.shape, generator=generator, dtype=torch.float64)

        def moved(step: float, direction: Tensor = direction) -> Tensor:
            at = case._replace(embeddings=case.embeddings + step * direction)
            return _evaluate(loss, at, backend="fused", epsilon=None, reduction="sum")[0].reshape(1)

        least, most = _one_sided(moved)
        along = (grad * direction).sum().reshape(1)
        if _outside(along, least, most) is not None:
            found.append(
                f"the gradient of a batch of {case.name} along a direction is {float(along):.8g}, finite "
                f"differences say {float((least + most) / 2):.8g}"
            )
            return


def check_loss(formula: PairLoss | type[PairLoss]) -> None:
    """Checks a formula: formula by formula, then on random and awkward batches, in float64.

    * Values and derivatives of ``neg_term`` and ``pos_term`` are finite over all similarities, in float32
    too.
    * With a reference: values and derivatives are its own, and so are the losses and gradients of whole
    batches.
    * Without one: derivatives, the derivatives of ``row`` and the gradient of a batch are the finite
    differences
      of their values. (Not where the formula holds a weight constant: then a reference must say what is
      meant.)
    * What the formula declares is so, and results repeat to the bit.

    >>> dml_cuda.check_loss(NCALoss(scale=16.0))

    Args:
        formula: what :func:`compile_loss` returned, or a loss that it made: parameters and similarity are
            those of
            the loss.

    Raises:
        ValueError: for a formula that is wrong; the message names each formula, with numbers.
        TypeError: for what is no pair loss.
    """
    loss = formula() if isinstance(formula, type) and issubclass(formula, PairLoss) else formula
    if not isinstance(loss, PairLoss):
        raise TypeError(
            f"formula: expected what compile_loss returns, or a loss of it; got {type(formula).__name__}"
        )
    of = _Formulas(loss)
    found: list[str] = []
    has_reference = not issubclass(loss.formula, CompiledFormula)
    origin = getattr(loss, "origin", None)
    text = origin.text if origin else ""
    # With a reference its gradient is the truth; without one a weight that is held has none.
    differentiates = not (has_reference or "constant(" in text or "with_share_of_derivative(" in text)
    _check_finite(of, found)
    if not found:
        if differentiates:
            _check_derivatives(of, found)
        _check_row(of, differentiates, found)
        _check_declarations(of, found)
        of_batches: list[str] = []
        _check_batches(loss, of_batches)
        # Both may split a loss into formulas differently: only where the loss itself differs does that count.
        found += (of_batches and has_reference and _compare_formulas(of)) or of_batches
        if differentiates and not found:
            _check_directions(loss, found)
    if found:
        raise ValueError(
            f"check_loss: {type(loss).__name__} is wrong:\n" + "\n".join(f"- {text}" for text in found)
        )
