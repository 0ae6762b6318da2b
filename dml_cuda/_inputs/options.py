"""The options that all pair losses share: declared, documented and checked here."""

from collections.abc import Mapping
from typing import NamedTuple

from typing_extensions import TypedDict

from .checks import (
    BACKENDS,
    REDUCTIONS,
    SIMILARITIES,
    Backend,
    Reduction,
    Similarity,
    check_choice,
    check_flag,
    check_number,
)


class PairOptions(TypedDict, total=False):
    """The options that all pair losses share; those left out are the loss's defaults.

    Attributes:
        epsilon: the margin of multi-similarity mining, or ``None`` (the default) to use every pair. A
            positive is kept when ``s - epsilon < max(negatives of the row)``, a negative when
            ``s + epsilon > min(positives of the row)``; a row without either keeps nothing. The paper of
            multi-similarity loss uses 0.1.
        similarity: ``"cosine"``; ``"dot"``, the inner product; or ``"euclidean"``, the distance with its sign
            turned, ``s = -|x - y|``, so that every formula reads the same. Margins, and ``base``, are then
            distances. The gradient of a distance of 0 is 0.
        normalize_embeddings: whether rows are divided by their length first. ``None`` (the default) is what
            the similarity says: yes for ``"cosine"`` and ``"euclidean"``, no for ``"dot"``. ``False`` with
            ``"euclidean"`` measures distances between the rows as they come; ``"cosine"`` without it is
            ``"dot"``, and ``"dot"`` with it ``"cosine"``.
        reduction: of a loss whose unit is the row, ``"mean"`` over the N rows, ``"mean_nonzero"`` over rows
            whose loss is not 0, ``"mean_valid"`` over rows with a kept pair, ``"sum"``, or ``"none"`` for all
            ``[N]``. A loss whose unit is the pair (it says so) averages over kept pairs instead: ``"mean"``
            and ``"mean_valid"`` over all of them, ``"mean_nonzero"`` over those whose loss is not 0;
            ``"none"`` gives each row's sum over its pairs.
        backend: ``"auto"`` (the default) uses the fused kernel where there is one for the device; ``"fused"``
            insists on it; ``"reference"`` is plain PyTorch, which has second derivatives.
        check_pairs: look at the indices of listed pairs on a GPU too, which waits for it (without that an
            index out of range gives NaN there), and at the labels of mined pairs. ``False`` by default.
    """

    epsilon: float | None
    similarity: Similarity
    normalize_embeddings: bool | None
    reduction: Reduction
    backend: Backend
    check_pairs: bool


NAMES = tuple(PairOptions.__annotations__)


class Options(NamedTuple):
    """The shared options, checked, none left out."""

    epsilon: float | None
    similarity: str
    normalize_embeddings: bool | None
    reduction: str
    backend: str
    check_pairs: bool

    @property
    def measure(self) -> str:
        """The similarity as the ops name it."""
        return measure(self.similarity, self.normalize_embeddings)


def measure(similarity: str, normalize_embeddings: bool | None) -> str:
    """The similarity as the ops name it: cosine, dot, euclidean (of unit rows) or euclidean_raw."""
    if normalize_embeddings is None:
        return similarity
    if similarity == "euclidean":
        return "euclidean" if normalize_embeddings else "euclidean_raw"
    return "cosine" if normalize_embeddings else "dot"


def check_options(options: Mapping[str, object], *, similarity: str, reduction: str) -> Options:
    """The options with a loss's defaults. Raises TypeError or ValueError for one that cannot be."""
    for name in options:
        if name not in NAMES:
            raise TypeError(f"{name}: expected one of the options {', '.join(NAMES)}")
    checked = Options(
        options.get("epsilon"),
        options.get("similarity", similarity),
        options.get("normalize_embeddings"),
        options.get("reduction", reduction),
        options.get("backend", "auto"),
        options.get("check_pairs", False),
    )
    if checked.epsilon is not None:
        check_number("epsilon", checked.epsilon)
    check_choice("similarity", checked.similarity, SIMILARITIES)
    if checked.normalize_embeddings is not None:
        check_flag("normalize_embeddings", checked.normalize_embeddings)
    check_choice("reduction", checked.reduction, REDUCTIONS)
    check_choice("backend", checked.backend, BACKENDS)
    check_flag("check_pairs", checked.check_pairs)
    return checked
