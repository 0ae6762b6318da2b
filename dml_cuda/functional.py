"""The losses as functions of a batch, and the weights of their pairs."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._inputs import autocast as _autocast
from ._ops import listed_pairs as listed
from ._ops.evaluate import Call, validate
from .losses._classifier import ClassifierLoss
from .losses._formula import Formula
from .losses._pair import PairLoss
from .losses.binomial_deviance import binomial_deviance_loss
from .losses.circle import circle_loss
from .losses.contrastive import contrastive_loss
from .losses.fast_ap import fast_ap_loss
from .losses.lifted_pairs import lifted_structure_loss
from .losses.lifted_structure import generalized_lifted_structure_loss
from .losses.margin import margin_loss
from .losses.multi_similarity import multi_similarity_loss
from .losses.nca import nca_loss
from .losses.nt_xent import nt_xent_loss
from .losses.ranked_list import ranked_list_loss
from .losses.recall_at_k import recall_at_k_loss
from .losses.smooth_ap import smooth_ap_loss
from .losses.sup_con import sup_con_loss
from .losses.triplet_margin import triplet_margin_loss
from .losses.tuplet_margin import tuplet_margin_loss
from .miners.mined_pairs import mined_pairs

__all__ = [
    "PairWeights",
    "binomial_deviance_loss",
    "circle_loss",
    "contrastive_loss",
    "fast_ap_loss",
    "generalized_lifted_structure_loss",
    "lifted_structure_loss",
    "margin_loss",
    "multi_similarity_loss",
    "nca_loss",
    "nt_xent_loss",
    "pair_weights",
    "ranked_list_loss",
    "recall_at_k_loss",
    "smooth_ap_loss",
    "sup_con_loss",
    "triplet_margin_loss",
    "tuplet_margin_loss",
]


class PairWeights(NamedTuple):
    """The kept pairs of a batch, their similarities and their weights in the gradient.

    Attributes:
        pos_anchors, positives, neg_anchors, negatives: ``[P]``, ``[P]``, ``[Q]``, ``[Q]`` int64.
        pos_similarities, neg_similarities: ``[P]``, ``[Q]``.
        pos_weights, neg_weights: ``[P]``, ``[Q]``: dL/ds, negative if the loss pulls a pair together and
            positive if it pushes it apart.
    """

    pos_anchors: Tensor
    positives: Tensor
    pos_similarities: Tensor
    pos_weights: Tensor
    neg_anchors: Tensor
    negatives: Tensor
    neg_similarities: Tensor
    neg_weights: Tensor


def pair_weights(
    loss: PairLoss | torch.nn.Module,
    embeddings: Tensor,
    labels: Tensor | None = None,
    *,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    indices_tuple: object = None,
) -> PairWeights:
    r"""The kept pairs of a batch, their similarities and their weights in the gradient.

    .. math:: w_{ij} = \frac{\partial L}{\partial s_{ij}}

    as in the general pair weighting of Wang et al., *Multi-Similarity Loss with General Pair Weighting for
    Deep Metric Learning*, CVPR 2019 (there without the sign). For diagnosis and plots: it materialises the
    pairs, so it synchronises with the device and needs memory for all of them.

    Args:
        loss: a pair loss of dml_cuda, or of dml_cuda.pml if dml_cuda computes it; its options set the
            mining, the similarity and the reduction (``"none"`` acts as ``"sum"``). Or a class-level loss:
            its pairs are rows and classes; for SoftTriple rows and centres (those of class c are columns
            c K to c K + K - 1); for proxy anchor proxies and rows.
        embeddings, labels, ref_emb, ref_labels, indices_tuple: as the loss takes them.

    Returns:
        :class:`PairWeights`, float32 (float64 for float64 embeddings), pairs in the order of their rows.
        A pair that is listed twice appears twice if the loss counts it twice, else once.

    Raises:
        TypeError, ValueError: as the loss does, and for a loss that has no pairs.
    """
    call = getattr(loss, "call", None)  # the adapters of dml_cuda.pml have it too
    if not isinstance(call, Call):
        raise TypeError(f"loss: expected a pair loss of dml_cuda, got {type(loss).__name__}")
    if isinstance(loss, ClassifierLoss):
        if ref_emb is not None or ref_labels is not None or indices_tuple is not None:
            raise ValueError("ref_emb, ref_labels, indices_tuple: expected None for a class-level loss")
        found = loss.center_weights(embeddings, labels)
        if found is not None:
            return PairWeights(*found)
        embeddings, labels, ref_emb, ref_labels = loss.pairs(embeddings, loss.check(embeddings, labels))
    formula, params, options, similarity = call.formula, call.params, call.options, call.similarity
    if formula.row is Formula.row or formula.ranks:
        raise TypeError(f"loss: expected a loss of pairs, got {type(loss).__name__}")
    unchecked = call._replace(options=options._replace(check_pairs=False))
    batch = validate(unchecked, embeddings, labels, indices_tuple, ref_emb, ref_labels)
    embeddings, ref_emb = batch.embeddings.detach(), batch.ref_emb
    ref_emb = None if ref_emb is None else ref_emb.detach()
    indices = batch.indices
    if indices is None:
        rule = {"epsilon": batch.epsilon, "similarity": similarity, "self_index": batch.self_index}
        rule["num_valid_refs"] = batch.num_valid_refs
        indices = tuple(mined_pairs(embeddings, batch.labels, ref_emb, batch.ref_labels, **rule))
    reduction = "sum" if options.reduction == "none" else options.reduction
    with torch.inference_mode(False), _autocast.off(embeddings.device):
        found, kinds = listed.measured_pairs(embeddings, ref_emb, indices, similarity)
        for s in found:
            s.requires_grad_()
        with torch.enable_grad():
            value = listed.reduced_loss(formula, params, found, kinds, reduction)
        weights = torch.autograd.grad(value, found, allow_unused=True, materialize_grads=True)
    columns = []
    for s, pairs, weight in zip(found, kinds, weights, strict=True):
        once = slice(None) if formula.repeats else pairs.fresh
        columns += [pairs.rows[once], pairs.cols[once], s.detach()[once], weight[once]]
    return PairWeights(*columns)
