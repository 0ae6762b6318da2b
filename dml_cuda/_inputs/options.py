"""The options that all pair losses share: declared, documented and checked."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import wraps
from typing import Any, NamedTuple

from torch import Tensor
from typing_extensions import TypedDict

from .checks import (
    BACKENDS,
    REDUCTIONS,
    SIMILARITIES,
    Backend,
    Reduction,
    Similarity,
    check_choice,
    check_count,
    check_flag,
    check_number,
)
from .row_weights import check_factors


class PairOptions(TypedDict, total=False):
    """The options that all pair losses share. Each loss documents its defaults.

    Attributes:
        epsilon: the margin of multi-similarity mining, or ``None`` (the default) to use every pair. A
            positive is kept when ``s - epsilon < max(negatives of the row)``, a negative when
            ``s + epsilon > min(positives of the row)``; a row without positives or without negatives keeps
            nothing. The paper of the multi-similarity loss uses 0.1.
        similarity: ``"cosine"``; ``"dot"``, the inner product; or ``"euclidean"``, the negated distance
            ``s = -|x - y|``, with which the formulas stay the same. Margins and ``base`` are then distances.
            The gradient at distance 0 is 0.
        normalize_embeddings: whether rows are divided by their L2 norm first. ``None`` (the default) depends
            on the similarity: yes for ``"cosine"`` and ``"euclidean"``, no for ``"dot"``. ``False`` with
            ``"euclidean"`` measures distances between the rows as they are; ``"cosine"`` with ``False`` is
            ``"dot"``, and ``"dot"`` with ``True`` is ``"cosine"``.
        reduction: ``"mean"`` over the N rows, ``"mean_nonzero"`` over rows whose loss is not 0,
            ``"mean_valid"`` over rows with a kept pair, ``"sum"``, or ``"none"`` for all ``[N]``. Pair-level
            losses (their documentation says so) average over kept pairs instead: ``"mean"`` and
            ``"mean_valid"`` over all, ``"mean_nonzero"`` over those whose loss is not 0; ``"none"`` gives
            each row's sum over its pairs. A loss ``log(1 + x)`` counts as 0 where ``1 + x`` rounds to 1.
        backend: ``"auto"`` (the default) uses the fused kernel if the device has one; ``"fused"`` raises
            RuntimeError otherwise; ``"reference"`` runs the plain PyTorch implementation, which has second
            derivatives.
        check_pairs: also check listed pairs on a GPU, which synchronises (without it an index out of range
            gives NaN there), and compare the labels of mined pairs with those of the batch. ``False`` by
            default.
        class_weights: ``[C]`` factors of the rows' losses by their label, which is then a class in [0, C); as
            ``row_weights=class_weights[labels]`` in every call. ``None`` by default.
        cache_bytes: how many bytes of similarities the fused kernels keep from forward to backward, which
            computes the others again: more memory for less time, in float32 (of float64 points: float64).
            ``None`` (the default): 64 MiB on the CPU, 32 with ``ref_emb``; on a GPU, which keeps all or none
            of a batch beyond 32 MiB, 34. The result does not depend on it.
    """

    epsilon: float | None
    similarity: Similarity
    normalize_embeddings: bool | None
    reduction: Reduction
    backend: Backend
    check_pairs: bool
    class_weights: Tensor | None
    cache_bytes: int | None


NAMES = tuple(PairOptions.__annotations__)


class Options(NamedTuple):
    """All shared options, validated."""

    epsilon: float | None
    similarity: str
    normalize_embeddings: bool | None
    reduction: str
    backend: str
    check_pairs: bool
    class_weights: Tensor | None = None
    cache_bytes: int | None = None

    @property
    def measure(self) -> str:
        """The similarity as the ops name it; see :func:`measure`."""
        return measure(self.similarity, self.normalize_embeddings)


def measure(similarity: str, normalize_embeddings: bool | None) -> str:
    """The similarity as the ops name it: cosine, dot, euclidean (of unit rows) or euclidean_raw."""
    if normalize_embeddings is None:
        return similarity
    if similarity == "euclidean":
        return "euclidean" if normalize_embeddings else "euclidean_raw"
    return "cosine" if normalize_embeddings else "dot"


# Arguments of pytorch-metric-learning's classes that those of dml_cuda do not have.
_OF_PML = frozenset(
    ("distance", "embedding_regularizer", "reducer", "weight_regularizer", "weight_init_func")
)


def unknown_argument(name: str, known: Sequence[str]) -> TypeError:
    """The error for a keyword argument that is not among ``known``."""
    similar = get_close_matches(name, known, n=1)
    hint = f"; did you mean {similar[0]}?" if similar else ""
    if name in _OF_PML:
        hint = f"; the class of the same name in dml_cuda.pml takes pytorch-metric-learning's {name}"
    return TypeError(f"{name}: expected one of the parameters or options {', '.join(known)}{hint}")


def check_names(options: Mapping[str, object], names: Sequence[str], parameters: Iterable[str] = ()) -> None:
    """Raises TypeError for an option that is none; ``parameters`` are those of the loss."""
    for name in options:
        if name not in names:
            raise unknown_argument(name, (*parameters, *names))


def with_known_names(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that names an argument which it does not have as :func:`unknown_argument` does."""
    parameters = inspect.signature(init).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)][1:]
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        return init

    @wraps(init)
    def checked(self: object, *arguments: Any, **keywords: Any) -> None:
        check_names(keywords, names)
        init(self, *arguments, **keywords)

    return checked


def check_options(
    options: Mapping[str, object], *, similarity: str, reduction: str, parameters: Iterable[str] = ()
) -> Options:
    """Validates options and adds a loss's defaults. Raises TypeError or ValueError."""
    check_names(options, NAMES, parameters)
    checked = Options(
        options.get("epsilon"),
        options.get("similarity", similarity),
        options.get("normalize_embeddings"),
        options.get("reduction", reduction),
        options.get("backend", "auto"),
        options.get("check_pairs", False),
        options.get("class_weights"),
        options.get("cache_bytes"),
    )
    if checked.epsilon is not None:
        check_number("epsilon", checked.epsilon)
    check_choice("similarity", checked.similarity, SIMILARITIES)
    if checked.normalize_embeddings is not None:
        check_flag("normalize_embeddings", checked.normalize_embeddings)
    check_choice("reduction", checked.reduction, REDUCTIONS)
    check_choice("backend", checked.backend, BACKENDS)
    check_flag("check_pairs", checked.check_pairs)
    if checked.class_weights is not None:
        check_factors("class_weights", checked.class_weights, "[C]")
    if checked.cache_bytes is not None:
        check_count("cache_bytes", checked.cache_bytes, least=0)
    return checked
