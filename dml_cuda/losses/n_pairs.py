"""N-pairs loss."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from .._inputs.batch import Batch, make_batch
from .._inputs.checks import check_batch
from .._inputs.indices import listed_indices
from .._inputs.row_weights import check_row_weights
from .._ops.evaluate import evaluate
from ._two_towers import TowerModule, TowerOptions
from .nt_xent import NTXent


class NPairs(NTXent):
    """Sohn, NeurIPS 2016: NT-Xent of one pair a class, without a temperature."""

    parameters: ClassVar = {}

    @classmethod
    def params(cls, values: Mapping[str, float | Tensor], similarity: str) -> list[float | Tensor]:
        return [1.0]


def _one_pair_a_class(labels: Tensor, lists: tuple[Tensor, ...] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors and positives ``[P]``, of which the first ``count`` are a pair of a class each, the first by
    anchor, then positive, or as listed; and ``count``."""
    rows = torch.arange(labels.shape[0], device=labels.device)
    anchors, positives = (rows, rows) if lists is None else lists[:2]
    of_class, order = labels[anchors].sort(stable=True)
    begins = torch.ones_like(of_class, dtype=torch.bool)
    begins[1:] = of_class[1:] != of_class[:-1]
    anchors, positives = anchors[order], positives[order]
    if lists is None:  # with the next row of its class
        positives = positives.roll(-1)
        begins = begins & (of_class == of_class.roll(-1)) & (anchors != positives)
    first = (~begins).long().sort(stable=True)[1]
    return anchors[first], positives[first], begins.sum()


def batch_of_pairs(
    embeddings: Tensor, labels: Tensor, indices_tuple: object, similarity: str
) -> tuple[Batch, Tensor, Tensor]:
    """Anchors as rows and positives as columns; which rows ``[P]`` the anchors are; and how many of the
    first count. Raises TypeError or ValueError for a batch that cannot be."""
    labels, _ = check_batch(embeddings, labels, None, None)
    lists = None
    if indices_tuple is not None:
        can_read = embeddings.device.type == "cpu" and not torch.compiler.is_compiling()
        lists = listed_indices(indices_tuple, embeddings, None, check_range=can_read)
    anchors, positives, count = _one_pair_a_class(labels.long(), lists)
    a, p = (nn.functional.embedding(index, embeddings) for index in (anchors, positives))
    columns = torch.arange(anchors.shape[0], device=labels.device)
    rows = torch.where(columns < count, columns, -1)  # the others have no positive, and so no loss
    rule = {"epsilon": None, "similarity": similarity, "check_pairs": False}
    batch = make_batch(a, rows, None, p, columns, **rule)
    return batch._replace(num_valid_refs=count), anchors, count


class NPairsLoss(TowerModule):
    r"""Softmax over pairs of one anchor and one positive a class: another class's positive is a negative.

    .. math:: L_c = -\log \frac{e^{s(a_c, p_c)}}{\sum_{c'} e^{s(a_c, p_{c'})}}

    for every class c with at least two rows, whose first two are :math:`a_c` and :math:`p_c`. Sohn, *Improved
    Deep Metric Learning with Multi-class N-pair Loss Objective*, NeurIPS 2016, without the regulariser of
    the norms.

    Args:
        options: ``similarity="cosine"``, ``normalize_embeddings``, ``reduction="mean"`` over the classes,
            ``backend``; see :class:`dml_cuda.TowerOptions`. With ``reduction="none"`` each row has the loss
            of the class that it is the anchor of, or 0.

    As in pytorch-metric-learning, ``similarity="cosine"`` is the default and has no scale: the paper's inner
    product of rows as they come is ``"dot"``.

    >>> loss_fn = NPairsLoss(similarity="dot")
    >>> loss = loss_fn(embeddings, labels)
    """

    formula = NPairs

    def __init__(self, **options: Unpack[TowerOptions]) -> None:
        super().__init__(options)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: object = None,
        ref_emb: None = None,
        ref_labels: None = None,
        row_weights: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: ``[N, D]``.
            labels: ``[N]`` integers.
            indices_tuple: pairs or triplets of a miner: the first listed pair of each class counts.
            ref_emb, ref_labels: ``None``, for callers that pass the arguments of every loss.
            row_weights: ``[N]`` factors of the losses by their anchors. What a mean divides by stays as it
                is.
        """
        for name, value in (("ref_emb", ref_emb), ("ref_labels", ref_labels)):
            if value is not None:
                raise ValueError(
                    f"{name}: expected None, as pairs are of one batch; got {type(value).__name__}"
                )
        batch, anchors, _ = batch_of_pairs(embeddings, labels, indices_tuple, self.call.similarity)
        if row_weights is not None:
            check_row_weights(row_weights, embeddings)
            batch = batch.with_row_weights(row_weights[anchors])
        value = evaluate(self.call, batch)
        if self.reduction != "none":
            return value
        return value.new_zeros(embeddings.shape[0]).index_add(0, anchors, value)

    if TYPE_CHECKING:  # nn.Module's gives Any
        __call__ = forward
