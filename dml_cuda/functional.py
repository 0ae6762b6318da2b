"""The losses as functions of a batch."""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from . import _C, _autocast, listed, ops, reference
from ._arguments import check_batch, check_choice, check_flag, check_number, check_options, check_points
from .formulas import Circle, Formula, MultiSimilarity
from .pairs import MinedPairs, listed_pairs, mined_pairs

BACKENDS = ("auto", "fused", "reference")
_warned: set[str] = set()


def _has_kernel(device: torch.device) -> bool:
    return device.type == "cpu" or (device.type == "cuda" and bool(_C.cuda_version))


def _use_kernel(device: torch.device, backend: str) -> bool:
    check_choice("backend", backend, BACKENDS)
    if backend == "reference":
        return False
    if _has_kernel(device):
        return True
    if backend == "fused":
        raise RuntimeError(
            f'backend: expected a device with a kernel for "fused", got embeddings on {device}; '
            "dml_cuda.build_info() tells what was built"
        )
    if device.type not in _warned:
        _warned.add(device.type)
        warnings.warn(f"dml_cuda has no kernel for {device.type}: using the reference", stacklevel=4)
    return False


class _Batch(NamedTuple):
    """Rows and columns, and which of their pairs count: by label, or as listed."""

    embeddings: Tensor
    ref_emb: Tensor | None
    labels: Tensor | None = None
    ref_labels: Tensor | None = None
    epsilon: float | None = None
    self_ref: Tensor | None = None
    ref_count: Tensor | None = None
    indices: tuple[Tensor, Tensor, Tensor, Tensor] | None = None


def _fused(formula: Formula, batch: _Batch, similarity: str, reduction: str) -> Tensor:
    embeddings, ref_emb = batch.embeddings, batch.ref_emb
    if batch.indices is not None:
        return listed.pair_loss(formula, embeddings, ref_emb, batch.indices, similarity, reduction)
    needs_grad = embeddings.requires_grad or (ref_emb is not None and ref_emb.requires_grad)
    value, *_ = ops.call(
        "pair_loss",
        embeddings,
        batch.labels.long(),
        ref_emb,
        None if batch.ref_labels is None else batch.ref_labels.long(),
        batch.self_ref,
        batch.ref_count,
        formula.name,
        formula.params,
        None if batch.epsilon is None else float(batch.epsilon),
        similarity,
        reduction,
        True,
        True,
        needs_grad and torch.is_grad_enabled(),
    )
    return value


def _reference(formula: Formula, batch: _Batch, similarity: str, reduction: str) -> Tensor:
    options = batch._asdict() | {"similarity": similarity, "reduction": reduction}
    if _autocast.is_on(batch.embeddings.device):
        # As the kernels do: float32 from the embeddings as they come. Autocast would round the similarities.
        for name in ("embeddings", "ref_emb"):
            options[name] = None if options[name] is None else options[name].float()
    with _autocast.off(batch.embeddings.device):
        return reference.pair_loss(formula, **options)


def _same_dtype(embeddings: Tensor, ref_emb: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Under autocast points of a layer meet points in full precision: both then take the wider type."""
    if not isinstance(ref_emb, Tensor) or not isinstance(embeddings, Tensor):
        return embeddings, ref_emb
    if embeddings.dtype == ref_emb.dtype or not _autocast.is_on(embeddings.device):
        return embeddings, ref_emb
    if not (embeddings.is_floating_point() and ref_emb.is_floating_point()):
        return embeddings, ref_emb
    wider = torch.promote_types(embeddings.dtype, ref_emb.dtype)
    return embeddings.to(wider), ref_emb.to(wider)


def _check_mined(
    mined: MinedPairs, embeddings: Tensor, labels: Tensor | None, ref_emb: Tensor | None, check_pairs: bool
) -> None:
    """Pairs of another batch can be told by its size, and by its labels if those may be looked at."""
    for name, mined_from, points in (
        ("embeddings", mined.embeddings, embeddings),
        ("ref_emb", mined.ref_emb, ref_emb),
    ):
        was = None if mined_from is None else mined_from.shape[0]
        now = None if points is None else points.shape[0]
        if was != now:
            raise ValueError(
                f"indices_tuple: expected pairs mined from this batch, got pairs mined with {was} rows of "
                f"{name} where there are {now}"
            )
    if check_pairs and labels is not None and not torch.equal(labels.to(mined.labels), mined.labels):
        raise ValueError("indices_tuple: expected pairs mined from this batch, got pairs of other labels")


def _batch(
    embeddings: Tensor,
    labels: Tensor | None,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    indices_tuple: object,
    epsilon: float | None,
    similarity: str,
    check_pairs: bool,
) -> _Batch:
    """Which pairs of the batch count."""
    given = embeddings, ref_emb
    embeddings, ref_emb = _same_dtype(embeddings, ref_emb)
    if indices_tuple is None:
        labels, ref_labels = check_batch(embeddings, labels, ref_emb, ref_labels)
        return _Batch(embeddings, ref_emb, labels, ref_labels, epsilon)
    check_points(embeddings, ref_emb)
    mined = indices_tuple if isinstance(indices_tuple, MinedPairs) else None
    if epsilon is not None and (mined is None or mined.epsilon not in (None, epsilon)):
        raise ValueError(
            f"epsilon: expected None where the pairs are given by indices_tuple, got {epsilon}: it mines "
            "inside the loss"
        )
    if mined is not None:
        _check_mined(mined, embeddings, labels, ref_emb, check_pairs)
        rule = epsilon if mined.epsilon is None else mined.epsilon
        if mined.is_of(*given) and (rule is None or mined.similarity == similarity):
            mined.check_unchanged()
            return _Batch(
                embeddings, ref_emb, mined.labels, mined.ref_labels, rule, mined.self_ref, mined.ref_count
            )
    look = check_pairs or (embeddings.device.type == "cpu" and not torch.compiler.is_compiling())
    indices = listed_pairs(indices_tuple, embeddings, ref_emb, check_range=mined is None and look)
    return _Batch(embeddings, ref_emb, indices=indices)


def _pair_loss(
    formula: Formula,
    embeddings: Tensor,
    labels: Tensor | None,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    indices_tuple: object,
    epsilon: float | None,
    similarity: str,
    reduction: str,
    backend: str,
    check_pairs: bool,
) -> Tensor:
    check_options(similarity, reduction, epsilon)
    batch = _batch(embeddings, labels, ref_emb, ref_labels, indices_tuple, epsilon, similarity, check_pairs)
    run = _fused if _use_kernel(embeddings.device, backend) else _reference
    value = run(formula, batch, similarity, reduction)
    return value.to(torch.float32 if _autocast.is_on(embeddings.device) else embeddings.dtype)


def multi_similarity_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    epsilon: float | None = None,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    indices_tuple: object = None,
    similarity: str = "cosine",
    reduction: str = "mean",
    backend: str = "auto",
    check_pairs: bool = False,
) -> Tensor:
    r"""Multi-similarity loss, with its hard-pair mining when ``epsilon`` is given.

    For every row :math:`i`, over its kept positives :math:`P_i` and negatives :math:`N_i`:

    .. math::
        L_i = \frac{1}{\alpha} \log\Big(1 + \sum_{j \in P_i} e^{-\alpha (s_{ij} - \lambda)}\Big)
            + \frac{1}{\beta}  \log\Big(1 + \sum_{j \in N_i} e^{ \beta  (s_{ij} - \lambda)}\Big)

    with :math:`\lambda` = ``base``. Wang et al., *Multi-Similarity Loss with General Pair Weighting
    for Deep Metric Learning*, CVPR 2019.

    Args:
        embeddings: ``[N, D]`` float16, bfloat16, float32 or float64, any strides. They need not be
            normalised.
        labels: ``[N]``, any integer type. Rows with equal labels are positive pairs, all others
            negative; a row is no pair with itself. Not needed with ``indices_tuple``.
        alpha: weight of positives, above 0.
        beta: weight of negatives, above 0.
        base: the similarity (lambda in the paper) about which both are measured.
        epsilon: the miner's margin, or ``None`` to use every pair. A positive is kept when
            ``s - epsilon < max(negatives of the row)``, a negative when
            ``s + epsilon > min(positives of the row)``; a row without either keeps nothing. The paper
            uses 0.1.
        ref_emb: ``[M, D]``, dtype and device of ``embeddings``: the columns to pair the rows with.
            ``None`` pairs the rows among themselves.
        ref_labels: ``[M]``, given exactly when ``ref_emb`` is.
        indices_tuple: the pairs that count, instead of those that the labels make: what a miner of
            dml_cuda or pytorch-metric-learning returns, ``(anchors, positives, anchors, negatives)`` or
            triplets ``(anchors, positives, negatives)``, int64 or int32, anchors from ``embeddings`` and
            the others from ``ref_emb`` where it is given. A pair listed twice counts once. What
            :class:`dml_cuda.MultiSimilarityMiner` made of these very embeddings is never listed.
        similarity: ``"cosine"``, or ``"dot"`` for the plain inner product.
        reduction: ``"mean"`` over the N rows, ``"mean_nonzero"`` over rows whose loss is not 0,
            ``"mean_valid"`` over rows with a kept pair, ``"sum"``, or ``"none"`` for all ``[N]``.
        backend: ``"auto"`` uses the fused kernel where there is one for the device; ``"fused"``
            insists on it; ``"reference"`` is plain PyTorch.
        check_pairs: look at the indices on a GPU too, which waits for it (without that an index out of
            range gives NaN there), and at the labels of mined pairs.

    Returns:
        A scalar, or ``[N]`` for ``reduction="none"``, in the dtype of ``embeddings`` (float32 under
        autocast), differentiable once with respect to ``embeddings`` and ``ref_emb``. A batch without
        pairs gives 0 with a zero gradient; NaN or infinite embeddings give NaN.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, shape or value, naming it.
        RuntimeError: ``backend="fused"`` on a device without a kernel.
    """
    check_number("alpha", alpha, positive=True)
    check_number("beta", beta, positive=True)
    check_number("base", base)
    return _pair_loss(
        MultiSimilarity(alpha, beta, base),
        embeddings,
        labels,
        ref_emb,
        ref_labels,
        indices_tuple,
        epsilon,
        similarity,
        reduction,
        backend,
        check_pairs,
    )


def circle_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    *,
    m: float = 0.4,
    gamma: float = 80.0,
    detach_weights: bool = True,
    epsilon: float | None = None,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    indices_tuple: object = None,
    similarity: str = "cosine",
    reduction: str = "mean_nonzero",
    backend: str = "auto",
    check_pairs: bool = False,
) -> Tensor:
    r"""Circle loss on pairs, with multi-similarity mining when ``epsilon`` is given.

    For every row :math:`i` that has kept positives :math:`P_i` and kept negatives :math:`N_i` (other
    rows have loss 0):

    .. math::
        L_i = \log\Big(1 + \sum_{j \in P_i} e^{-\gamma [1 + m - s_{ij}]_+ (s_{ij} - (1 - m))}
                           \sum_{j \in N_i} e^{ \gamma [s_{ij} + m]_+ (s_{ij} - m)}\Big)

    Sun et al., *Circle Loss: A Unified Perspective of Pair Similarity Optimization*, CVPR 2020. The
    paper uses m 0.25 and gamma 256 for faces, m 0.4 and gamma 80 for fine-grained retrieval.

    Args:
        embeddings: ``[N, D]`` float16, bfloat16, float32 or float64, any strides. They need not be
            normalised.
        labels: ``[N]``, any integer type. Rows with equal labels are positive pairs, all others
            negative; a row is no pair with itself. Not needed with ``indices_tuple``.
        m: the relaxation margin.
        gamma: the scale of the logits, above 0.
        detach_weights: hold the weights :math:`[\cdot]_+` constant in the gradient, as the paper does.
            ``False`` gives the true derivative of the value.
        epsilon: the miner's margin as in :func:`multi_similarity_loss`, or ``None`` for every pair.
        ref_emb: ``[M, D]``, dtype and device of ``embeddings``: the columns to pair the rows with.
            ``None`` pairs the rows among themselves.
        ref_labels: ``[M]``, given exactly when ``ref_emb`` is.
        similarity: ``"cosine"``, or ``"dot"`` for the plain inner product.
        indices_tuple, reduction, backend, check_pairs: as in :func:`multi_similarity_loss`.

    Returns:
        As :func:`multi_similarity_loss`.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, shape or value, naming it.
        RuntimeError: ``backend="fused"`` on a device without a kernel.
    """
    check_number("m", m)
    check_number("gamma", gamma, positive=True)
    check_flag("detach_weights", detach_weights)
    return _pair_loss(
        Circle(m, gamma, detach_weights),
        embeddings,
        labels,
        ref_emb,
        ref_labels,
        indices_tuple,
        epsilon,
        similarity,
        reduction,
        backend,
        check_pairs,
    )


class PairWeights(NamedTuple):
    """The kept pairs of a batch: what their similarities are, and how the loss weighs them.

    Attributes:
        pos_anchors, positives, neg_anchors, negatives: ``[P]``, ``[P]``, ``[Q]``, ``[Q]`` int64.
        pos_similarities, neg_similarities: ``[P]``, ``[Q]``.
        pos_weights, neg_weights: ``[P]``, ``[Q]``: dL/ds, below 0 where the loss pulls a pair together and
            above 0 where it pushes it apart.
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
    loss: torch.nn.Module,
    embeddings: Tensor,
    labels: Tensor | None = None,
    *,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    indices_tuple: object = None,
) -> PairWeights:
    r"""The kept pairs of a batch, with their similarity and their weight in the gradient.

    .. math:: w_{ij} = \frac{\partial L}{\partial s_{ij}}

    as the general pair weighting of Wang et al., *Multi-Similarity Loss with General Pair Weighting for
    Deep Metric Learning*, CVPR 2019, defines it (there without the sign). For diagnosing and plotting: it
    lists the pairs, so it waits for the device, and its memory grows with them.

    Args:
        loss: a :class:`dml_cuda.MultiSimilarityLoss` or :class:`dml_cuda.CircleLoss`; its options choose
            the mining, the similarity and the reduction (``"none"`` counts as ``"sum"``).
        embeddings, labels, ref_emb, ref_labels, indices_tuple: as the loss takes them.

    Returns:
        :class:`PairWeights`, float32 (float64 for float64 embeddings), pairs in the order of their rows.

    Raises:
        TypeError, ValueError: as the loss does, and for a loss without a pair formula.
    """
    formula = getattr(loss, "formula", None)
    if not isinstance(formula, Formula):
        raise TypeError(
            f"loss: expected a MultiSimilarityLoss or CircleLoss of dml_cuda, got {type(loss).__name__}"
        )
    options = loss.options
    similarity, reduction = options["similarity"], options["reduction"]
    batch = _batch(
        embeddings, labels, ref_emb, ref_labels, indices_tuple, options["epsilon"], similarity, False
    )
    embeddings, ref_emb = batch.embeddings.detach(), batch.ref_emb
    ref_emb = None if ref_emb is None else ref_emb.detach()
    indices = batch.indices
    if indices is None:
        rule = {"epsilon": batch.epsilon, "similarity": similarity, "self_ref": batch.self_ref}
        rule["ref_count"] = batch.ref_count
        indices = tuple(mined_pairs(embeddings, batch.labels, ref_emb, batch.ref_labels, **rule))
    with torch.inference_mode(False), _autocast.off(embeddings.device):
        found, kinds = listed.measured_pairs(embeddings, ref_emb, indices, similarity)
        for s in found:
            s.requires_grad_()
        with torch.enable_grad():
            value = listed.reduced_loss(formula, found, kinds, "sum" if reduction == "none" else reduction)
        weights = torch.autograd.grad(value, found)
    columns = []
    for s, pairs, weight in zip(found, kinds, weights, strict=True):
        once = pairs.fresh
        columns += [pairs.rows[once], pairs.cols[once], s.detach()[once], weight[once]]
    return PairWeights(*columns)
