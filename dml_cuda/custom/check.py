"""Checks a custom loss: its functions one by one, then whole batches."""

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
from . import formula as formula_ops
from .formula import CompiledFormula
from .source import holds_constants

_STEP = 1e-6
_CLOSE = 1e-9  # tolerance of a maximum in float64
_DIFFERENCE = 1e-5  # tolerance of a derivative against finite differences
_ROUNDING = 4e-7  # how far a cosine may leave [-1, 1] in float32
_KINDS = {"neg_term": False, "pos_term": True}


class _RecordedPairs(Pairs):
    """The pairs of one row, which record the terms that a reference accumulates."""

    def __init__(self, s: Tensor) -> None:
        self._pairs = MaskedPairs(s, torch.ones_like(s, dtype=torch.bool))
        self.s, self.count = s, self._pairs.count
        self.columns, self.square = self._pairs.columns, False
        self.terms: list[Tensor] = []

    def spread(self, of_rows: Tensor) -> Tensor:
        return self._pairs.spread(of_rows)

    def spread_columns(self, of_columns: Tensor) -> Tensor:
        return self._pairs.spread_columns(of_columns)

    def lse(self, logits: Tensor, plus_one: bool = False) -> Tensor:
        self.terms.append(logits)
        return self._pairs.lse(logits, plus_one)

    def sum(self, terms: Tensor) -> Tensor:
        self.terms.append(terms)
        return self._pairs.sum(terms)

    def number(self, which: Tensor) -> Tensor:
        return self._pairs.number(which)


class _Functions:
    """The functions of a formula, on a grid of similarities ``[G]``, in float64 or float32."""

    def __init__(self, loss: PairLoss) -> None:
        self.formula, self.params = loss.formula, loss.call.params
        self.name = self.formula.name
        self.facts = _C.formula_facts(self.name)[1]
        least, most = {"cosine": (-1.0, 1.0), "euclidean": (-2.0, 0.0)}.get(loss.call.similarity, (-3.0, 3.0))
        steps = torch.arange(-200, 201, dtype=torch.float64) / 200
        self.grid = (least + most) / 2 + (most - least) / 2 * steps
        ends = [least - _ROUNDING, most + _ROUNDING] if loss.call.similarity == "cosine" else []
        self.with_ends = torch.cat([self.grid, torch.tensor(ends, dtype=torch.float64)])

    def terms(self, s: Tensor, positives: bool, context: float | None) -> tuple[Tensor, Tensor, Tensor]:
        contexts = None if context is None else torch.full_like(s, context)
        return formula_ops.terms(self.name, self.params, s, contexts, positives)

    def contexts(self, positives: bool) -> list[float | None]:
        """Values of the negatives' accumulator that positives may see."""
        if not (positives and self.facts["context"]):
            return [None]
        terms = self.terms(self.grid, False, None)[0]
        if self.facts["sums_negatives"]:
            return [0.0, float(terms.mean()), float(terms.sum())]
        empty = 0.0 if self.facts["plus_one"] else -math.inf
        return [empty, float(terms.min()), float(terms.mean()), float(terms.max()) + math.log(1e3)]


def _place(s: Tensor, k: int, context: float | None) -> str:
    suffix = "" if context is None else f", context = {context:.6g}"
    return f"at s = {float(s[k]):.8g}{suffix}"


def _first(wrong: Tensor) -> int | None:
    indices = wrong.nonzero()
    return int(indices[0, 0]) if len(indices) else None


def _worst(a: Tensor, b: Tensor, tolerance: Tensor | float) -> int | None:
    """The index where two finite tensors differ most, if by more than the tolerance."""
    beyond = (a - b).abs() - tolerance
    beyond = torch.where(torch.isfinite(a) & torch.isfinite(b), beyond, -1.0)
    return int(beyond.argmax()) if len(beyond) and float(beyond.max()) > 0 else None


# ---- the functions -----------------------------------------------------------------------------------------


def _check_finite(functions: _Functions, errors: list[str]) -> None:
    for name, positives in _KINDS.items():
        for context in functions.contexts(positives):
            for dtype in (torch.float64, torch.float32):
                s = functions.with_ends.to(dtype)
                names = "value", "derivative", "derivative by the context"
                results = dict(zip(names, functions.terms(s, positives, context), strict=True))
                for what, numbers in results.items():
                    k = _first(~torch.isfinite(numbers))
                    if k is not None:
                        number = str(dtype).removeprefix("torch.")
                        empty = context == -math.inf
                        guard = "; a row without negatives: guard it with is_empty" if empty else ""
                        errors.append(
                            f"{name}: its {what} is {float(numbers[k])} {_place(s, k, context)} in "
                            f"{number}{guard}"
                        )
                        break
                else:
                    continue
                break


def _one_sided(f: Callable[[float], Tensor]) -> tuple[Tensor, Tensor]:
    """The smaller and the larger one-sided difference; at a kink any value between is a derivative."""
    here = f(0.0)
    left, right = (here - f(-_STEP)) / _STEP, (f(_STEP) - here) / _STEP
    return torch.minimum(left, right), torch.maximum(left, right)


def _outside(derivative: Tensor, least: Tensor, most: Tensor) -> int | None:
    size = 1 + torch.maximum(least.abs(), most.abs())
    # The tolerance grows with the curvature, by which the two sides differ.
    nearest = torch.minimum(torch.maximum(derivative, least), most)
    return _worst(derivative, nearest, _DIFFERENCE * size + (most - least))


def _check_derivatives(functions: _Functions, errors: list[str]) -> None:
    inner = functions.grid[1:-1]
    for name, positives in _KINDS.items():
        for context in functions.contexts(positives):
            if context is not None and not math.isfinite(context):
                continue
            _, derivative, by_context = functions.terms(inner, positives, context)

            def moved(step: float, positives: bool = positives, context: float | None = context) -> Tensor:
                return functions.terms(inner + step, positives, context)[0]

            least, most = _one_sided(moved)
            k = _outside(derivative, least, most)
            if k is not None:
                errors.append(
                    f"{name}: its derivative is {float(derivative[k]):.8g} {_place(inner, k, context)}, "
                    f"finite differences say {float((least[k] + most[k]) / 2):.8g}"
                )
            if context is None:
                continue

            def moved_context(step: float, positives: bool = positives, context: float = context) -> Tensor:
                return functions.terms(inner, positives, context + step)[0]

            least, most = _one_sided(moved_context)
            k = _outside(by_context, least, most)
            if k is not None:
                errors.append(
                    f"{name}: its derivative by the context is {float(by_context[k]):.8g} "
                    f"{_place(inner, k, context)}, finite differences say "
                    f"{float((least[k] + most[k]) / 2):.8g}"
                )


def _check_declarations(functions: _Functions, errors: list[str]) -> None:
    facts = functions.facts
    for name, positives in _KINDS.items():
        sums = facts["sums_positives" if positives else "sums_negatives"]
        context = functions.contexts(positives)[-1]
        term, derivative, _ = functions.terms(functions.grid, positives, context)
        if facts["hinge"] and sums:
            k = _first((term == 0) & (derivative != 0))
            if k is not None:
                errors.append(
                    f"kHinge: {name} is 0 {_place(functions.grid, k, context)}, but its derivative is "
                    f"{float(derivative[k]):.8g}"
                )
        if sums:
            continue
        # An inner maximum: smaller values on both sides of it.
        before, after = term.cummin(0).values, term.flip(0).cummin(0).values.flip(0)
        peak = (term - before).minimum(term - after)
        k = int(peak.argmax())
        if float(peak[k]) > _CLOSE * (1 + float(term.abs().max())):
            errors.append(
                f"{name}: has a maximum {_place(functions.grid, k, context)}, between smaller logits; the "
                "CUDA kernels look for the largest at the least and the greatest similarity"
            )


def _row_points(functions: _Functions) -> Tensor:
    """``[4, N]`` random accumulators of negatives and positives, and their counts."""
    generator = torch.Generator().manual_seed(0)
    values = 3 * torch.randn(2, 64, generator=generator, dtype=torch.float64)
    for k, sums in enumerate((functions.facts["sums_negatives"], functions.facts["sums_positives"])):
        if sums or functions.facts["plus_one"]:
            values[k] = values[k].abs()
    counts = torch.randint(1, 20, (2, 64), generator=generator).to(torch.float64)
    return torch.cat([values, counts])


def _check_row(functions: _Functions, derivatives: bool, errors: list[str]) -> None:
    points, two = _row_points(functions), functions.facts["two_parts"]

    def row(moved: Tensor) -> Tensor:
        return formula_ops.rows(functions.name, functions.params, *moved)

    result = row(points)
    if not two and bool((result[1] != 0).any()):
        errors.append("row: gives a second part, but kParts is 1")
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
            errors.append(
                f"row: its derivative by {name} is {float(result[4 + k, i]):.8g} at neg = "
                f"{float(points[0, i]):.6g}, pos = {float(points[1, i]):.6g}, finite differences say "
                f"{float((least[i] + most[i]) / 2):.8g}"
            )
        if not two:
            continue
        least, most = _one_sided(lambda step, k=k, part=1 - part: moved(step, k, part))
        if float(torch.maximum(least.abs(), most.abs()).max()) > _DIFFERENCE:
            errors.append(
                f"row: part {1 - part} depends on {name}; with two parts, each may depend on one kind of pair"
            )


def _compare_terms(functions: _Functions) -> list[str]:
    """Where the terms differ from those of the reference."""
    errors: list[str] = []
    s = functions.grid[None].clone().requires_grad_()
    neg, pos = _RecordedPairs(s), _RecordedPairs(s)
    functions.formula.row(pos, neg, *functions.params)
    context = None
    if functions.facts["context"]:
        push = functions.terms(functions.grid, False, None)[0]
        one = push.new_zeros(1) if functions.facts["plus_one"] else push.new_full((1,), -math.inf)
        sums = functions.facts["sums_negatives"]
        context = float(push.sum() if sums else torch.cat([push, one]).logsumexp(0))
    for (name, positives), recorded in zip(_KINDS.items(), (neg, pos), strict=True):
        seen_context = context if positives else None
        term, derivative, _ = functions.terms(functions.grid, positives, seen_context)
        differences = []
        for reference in recorded.terms:
            if reference.shape != s.shape:
                continue
            grad = torch.zeros_like(s)
            if reference.requires_grad:
                (grad,) = torch.autograd.grad(reference.sum(), s, retain_graph=True)
            if seen_context is not None:  # the reference's gradient includes the path through the context
                grad = derivative[None]
            for what, value, expected in (
                ("it", term, reference.detach()[0]),
                ("its derivative", derivative, grad[0]),
            ):
                k = _worst(value, expected, 1e-7 * (1 + expected.abs()))
                if k is not None:
                    differences.append(
                        f"{name}: {_place(functions.grid, k, seen_context)} {what} is "
                        f"{float(value[k]):.8g}, the reference's is {float(expected[k]):.8g}"
                    )
                    break
            else:
                break
        else:
            errors.extend(differences[:1])
    return errors


# ---- whole batches -----------------------------------------------------------------------------------------


class _Case(NamedTuple):
    name: str
    embeddings: Tensor
    labels: Tensor
    ref_emb: Tensor | None = None
    ref_labels: Tensor | None = None
    is_random: bool = False
    at_ends: bool = False  # similarities of 1 or -1, where a derivative need not exist


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
    yield _Case("rows that are equal", points(6).repeat(3, 1), labels(18, 3), at_ends=True)
    opposite = points(6)
    yield _Case("rows that are opposite", torch.cat([opposite, -opposite]), labels(12, 3), at_ends=True)


def _evaluate(loss: PairLoss, case: _Case, **options: Any) -> tuple[Tensor, Tensor]:
    """The loss and its gradient."""
    call = make_call(loss.formula, loss.values, {**loss.call.options._asdict(), **options})
    x = case.embeddings.detach().clone().requires_grad_()
    value = evaluate_arguments(call, x, case.labels, None, case.ref_emb, case.ref_labels)
    (grad,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), grad


def _check_batches(loss: PairLoss, errors: list[str]) -> None:
    for case in _cases():
        for epsilon in (None, 0.1):
            where = f"a batch of {case.name}" + ("" if epsilon is None else f", mined with epsilon {epsilon}")
            # In special cases rounding decides which losses are exactly 0.
            for reduction in ("none", "mean", "mean_nonzero")[: 3 if case.is_random else 2]:
                options = {"epsilon": epsilon, "reduction": reduction}
                value, grad = _evaluate(loss, case, backend="fused", **options)
                repeated = _evaluate(loss, case, backend="fused", **options)
                finite = torch.isfinite(value).all() and torch.isfinite(grad).all()
                if finite and not (torch.equal(value, repeated[0]) and torch.equal(grad, repeated[1])):
                    errors.append(f"{where}: the loss differs from call to call")
                    return
                if not finite:
                    what = "loss" if not torch.isfinite(value).all() else "gradient"
                    errors.append(f"{where}: the {what} is not finite (reduction {reduction!r})")
                    return
                truth, truth_grad = _evaluate(loss, case, backend="reference", **options)
                flat, true = value.reshape(-1), truth.reshape(-1)
                k = _worst(flat, true, (1e-5 if case.at_ends else 1e-7) * (1 + true.abs()))
                if k is not None:
                    errors.append(
                        f"row, or what the formula declares: {where}, reduction {reduction!r}: the loss is "
                        f"{float(flat[k]):.8g}, the reference's {float(true[k]):.8g}"
                    )
                    return
                if case.at_ends:
                    continue
                flat, true = grad.reshape(-1), truth_grad.reshape(-1)
                k = _worst(flat, true, 1e-6 * (1e-3 + true.nan_to_num(0, 0, 0).abs().sum()))
                if k is not None:
                    errors.append(
                        f"{where}, reduction {reduction!r}: an element of the gradient is "
                        f"{float(flat[k]):.8g}, the reference's {float(true[k]):.8g}"
                    )
                    return


def _check_directions(loss: PairLoss, errors: list[str]) -> None:
    """The gradient of a batch against finite differences along random directions."""
    case = next(_cases())
    generator = torch.Generator().manual_seed(1)
    _, grad = _evaluate(loss, case, backend="fused", epsilon=None, reduction="sum")
    for _ in range(4):
        direction = torch.randn(grad.shape, generator=generator, dtype=torch.float64)

        def moved(step: float, direction: Tensor = direction) -> Tensor:
            moved_case = case._replace(embeddings=case.embeddings + step * direction)
            return _evaluate(loss, moved_case, backend="fused", epsilon=None, reduction="sum")[0].reshape(1)

        least, most = _one_sided(moved)
        along = (grad * direction).sum().reshape(1)
        if _outside(along, least, most) is not None:
            errors.append(
                f"the gradient of a batch of {case.name} along a direction is {float(along):.8g}, finite "
                f"differences say {float((least + most) / 2):.8g}"
            )
            return


def check_loss(formula: PairLoss | type[PairLoss]) -> None:
    """Checks a custom loss, in float64: its functions one by one, then random and special batches.

    * Values and derivatives of ``neg_term`` and ``pos_term`` are finite for all similarities, in float32
      too.
    * With a reference, values and derivatives equal the reference's, as do losses and gradients of batches.
    * Without a reference, the derivatives of ``neg_term``, ``pos_term`` and ``row`` and the gradient of a
      batch equal finite differences. This is skipped if the formula treats a weight as constant, since only a
      reference can then define the gradient.
    * The formula's declarations are true, and results are bitwise repeatable.

    >>> dml_cuda.check_loss(UnifiedLoss(scale=16.0))

    Args:
        formula: a class that :func:`compile_loss` returned, or an instance, whose parameters and similarity
            are used.

    Raises:
        ValueError: the formula is wrong; the message lists each wrong function, with numbers.
        TypeError: ``formula`` is not a pair loss.
    """
    loss = formula() if isinstance(formula, type) and issubclass(formula, PairLoss) else formula
    if not isinstance(loss, PairLoss):
        raise TypeError(
            f"formula: expected what compile_loss returns, or an instance of it; got {type(formula).__name__}"
        )
    functions = _Functions(loss)
    errors: list[str] = []
    has_reference = not issubclass(loss.formula, CompiledFormula)
    origin = getattr(loss, "origin", None)
    text = origin.text if origin else ""
    # A reference defines the gradient; without one, finite differences do, unless a weight is constant.
    differentiates = not (has_reference or holds_constants(text))
    _check_finite(functions, errors)
    if not errors:
        if differentiates:
            _check_derivatives(functions, errors)
        _check_row(functions, differentiates, errors)
        _check_declarations(functions, errors)
        of_batches: list[str] = []
        _check_batches(loss, of_batches)
        # A reference may split a loss into other terms, so terms are compared only if the losses differ.
        errors += (of_batches and has_reference and _compare_terms(functions)) or of_batches
        if differentiates and not errors:
            _check_directions(loss, errors)
    if errors:
        raise ValueError(
            f"check_loss: {type(loss).__name__} is wrong:\n" + "\n".join(f"- {text}" for text in errors)
        )
