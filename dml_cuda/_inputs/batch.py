"""A validated batch: rows, columns, and which of their pairs count."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..miners.mined import Mined
from ..miners.mined_pairs import MinedPairs
from . import autocast as _autocast
from .checks import check_batch, check_points
from .indices import listed_pairs
from .row_weights import check_row_weights


class Batch(NamedTuple):
    """Rows and columns, and which of their pairs count: by label, or as listed."""

    embeddings: Tensor  # [N, D]
    labels: Tensor | None  # [N]
    ref_emb: Tensor | None  # [M, D]
    ref_labels: Tensor | None = None  # [M]
    self_index: Tensor | None = None  # [N] int64, as in reference.pair_loss
    num_valid_refs: Tensor | None = None  # int64 scalar
    row_weights: Tensor | None = None  # [N] factors of the rows' losses
    epsilon: float | None = None
    mine_self_pair: bool = True
    indices: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # listed pairs, instead of labels

    def with_row_weights(self, row_weights: Tensor | None) -> "Batch":
        """The same with factors of the rows' losses. Raises TypeError or ValueError for those that cannot
        be."""
        if row_weights is None:
            return self
        check_row_weights(row_weights, self.embeddings)
        return self._replace(row_weights=to_save(row_weights))


def same_dtype(embeddings: Tensor, ref_emb: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Promotes both to the wider dtype under autocast, where a layer's output meets full precision."""
    if not isinstance(ref_emb, Tensor) or not isinstance(embeddings, Tensor):
        return embeddings, ref_emb
    if embeddings.dtype == ref_emb.dtype or not _autocast.is_on(embeddings.device):
        return embeddings, ref_emb
    if not (embeddings.is_floating_point() and ref_emb.is_floating_point()):
        return embeddings, ref_emb
    wider = torch.promote_types(embeddings.dtype, ref_emb.dtype)
    return embeddings.to(wider), ref_emb.to(wider)


def check_mined(
    mined: Mined, embeddings: Tensor, labels: Tensor | None, ref_emb: Tensor | None, check_pairs: bool
) -> None:
    """Raises ValueError for pairs of another batch, recognised by its size, and with ``check_pairs`` (which
    synchronises) by its labels."""
    for name, mined_from, points in (
        ("embeddings", mined.embeddings, embeddings),
        ("ref_emb", mined.ref_emb, ref_emb),
    ):
        was = 0 if mined_from is None else mined_from.shape[0]
        now = 0 if points is None else points.shape[0]
        if was != now:
            raise ValueError(
                f"indices_tuple: expected pairs mined from this batch, got pairs mined with "
                f"{was or 'no'} rows of {name} where there are {now or 'none'}"
            )
    if check_pairs and labels is not None and not torch.equal(labels.to(mined.labels), mined.labels):
        raise ValueError(
            "indices_tuple: expected pairs mined from this batch, got pairs mined with other labels"
        )


def to_save(x: Tensor | None) -> Tensor | None:
    """A tensor that autograd may save: a copy of one that was made in inference mode."""
    if x is None or torch.compiler.is_compiling():
        return x
    if not x.is_inference() or torch.is_inference_mode_enabled():
        return x
    return x.clone() if torch.is_grad_enabled() else x


def make_batch(
    embeddings: Tensor,
    labels: Tensor | None,
    indices_tuple: object,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    *,
    epsilon: float | None,
    similarity: str,
    check_pairs: bool,
) -> Batch:
    """Validates a batch and finds which of its pairs count. Raises TypeError or ValueError."""
    points = embeddings, ref_emb  # as mined: not promoted
    if ref_emb is not None:
        embeddings, ref_emb = same_dtype(embeddings, ref_emb)
    if indices_tuple is None:
        if labels is None:
            raise ValueError("labels: expected labels, or pairs as indices_tuple; got neither")
        labels, ref_labels = check_batch(embeddings, labels, ref_emb, ref_labels)
        batch = map(to_save, (embeddings, labels, ref_emb, ref_labels))
        return Batch(*batch, epsilon=epsilon)
    check_points(embeddings, ref_emb)
    mined = indices_tuple if isinstance(indices_tuple, Mined) else None
    pairs = mined if isinstance(mined, MinedPairs) else None
    if epsilon is not None and (pairs is None or pairs.epsilon not in (None, epsilon)):
        raise ValueError(
            f"epsilon: expected None with indices_tuple, since epsilon mines inside the loss; got {epsilon}"
        )
    if mined is not None:
        check_mined(mined, embeddings, labels, ref_emb, check_pairs)
    if pairs is not None:
        rule = epsilon if pairs.epsilon is None else pairs.epsilon
        if (rule is None or pairs.similarity == similarity) and pairs.rule_applies(*points):
            batch = (
                embeddings,
                pairs.labels,
                ref_emb,
                pairs.ref_labels,
                pairs.self_index,
                pairs.num_valid_refs,
            )
            return Batch(*map(to_save, batch), epsilon=rule)
    listed = mined is None or mined.only_lists
    can_read = embeddings.device.type == "cpu" and not torch.compiler.is_compiling()  # without synchronising
    checks = {"check_range": listed and (check_pairs or can_read), "check_kinds": listed and check_pairs}
    indices = listed_pairs(indices_tuple, embeddings, ref_emb, **checks)
    return Batch(to_save(embeddings), None, to_save(ref_emb), indices=indices)
