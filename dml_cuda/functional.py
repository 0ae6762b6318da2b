"""The losses as functions of a batch."""

import warnings

import torch
from torch import Tensor

from . import ops, reference  # noqa: F401  (ops registers the derivatives)
from ._arguments import check_arguments, check_choice, check_flag, check_number

BACKENDS = ("auto", "fused", "reference")
_warned: set[str] = set()


def _has_kernel(device: torch.device) -> bool:
    from . import build_info

    return device.type == "cpu" or (device.type == "cuda" and build_info()["cuda"] is not None)


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
        warnings.warn(f"dml_cuda has no kernel for {device.type}: using the reference", stacklevel=3)
    return False


def _result_dtype(embeddings: Tensor) -> torch.dtype:
    return torch.float32 if torch.is_autocast_enabled(embeddings.device.type) else embeddings.dtype


def _fused(
    loss: str,
    params: list[float],
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    epsilon: float | None,
    similarity: str,
    reduction: str,
) -> Tensor:
    needs_grad = embeddings.requires_grad or (ref_emb is not None and ref_emb.requires_grad)
    value, *_ = torch.ops.dml_cuda.pair_loss.default(
        embeddings,
        labels.long(),
        ref_emb,
        None if ref_labels is None else ref_labels.long(),
        None,
        loss,
        params,
        None if epsilon is None else float(epsilon),
        similarity == "cosine",
        reduction,
        needs_grad and torch.is_grad_enabled(),
    )
    return value.to(_result_dtype(embeddings))


def _reference(function, embeddings: Tensor, labels: Tensor, *, ref_emb: Tensor | None, **options) -> Tensor:
    device = embeddings.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return function(embeddings, labels, ref_emb=ref_emb, **options)
    # As the kernels do: float32 from the embeddings as they come. Autocast would round the similarities.
    ref_emb = None if ref_emb is None else ref_emb.float()
    with torch.autocast(device, enabled=False):
        return function(embeddings.float(), labels, ref_emb=ref_emb, **options)


def multi_similarity_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    epsilon: float | None = None,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    similarity: str = "cosine",
    reduction: str = "mean",
    backend: str = "auto",
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
            negative; a row is no pair with itself.
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
        similarity: ``"cosine"``, or ``"dot"`` for the plain inner product.
        reduction: ``"mean"`` over the N rows, ``"mean_nonzero"`` over rows whose loss is not 0,
            ``"mean_valid"`` over rows with a kept pair, ``"sum"``, or ``"none"`` for all ``[N]``.
        backend: ``"auto"`` uses the fused kernel where there is one for the device; ``"fused"``
            insists on it; ``"reference"`` is plain PyTorch.

    Returns:
        A scalar, or ``[N]`` for ``reduction="none"``, in the dtype of ``embeddings`` (float32 under
        autocast), differentiable once with respect to ``embeddings`` and ``ref_emb``. A batch without
        pairs gives 0 with a zero gradient; NaN or infinite embeddings give NaN.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, shape or value, naming it.
        RuntimeError: ``backend="fused"`` on a device without a kernel.
    """
    check_arguments(embeddings, labels, ref_emb, ref_labels, similarity, reduction, epsilon)
    check_number("alpha", alpha, positive=True)
    check_number("beta", beta, positive=True)
    check_number("base", base)
    if _use_kernel(embeddings.device, backend):
        params = [float(alpha), float(beta), float(base)]
        batch = embeddings, labels, ref_emb, ref_labels
        return _fused("multi_similarity", params, *batch, epsilon, similarity, reduction)
    return _reference(
        reference.multi_similarity_loss,
        embeddings,
        labels,
        alpha=alpha,
        beta=beta,
        base=base,
        epsilon=epsilon,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        similarity=similarity,
        reduction=reduction,
    )


def circle_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    m: float = 0.4,
    gamma: float = 80.0,
    detach_weights: bool = True,
    epsilon: float | None = None,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    similarity: str = "cosine",
    reduction: str = "mean_nonzero",
    backend: str = "auto",
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
            negative; a row is no pair with itself.
        m: the relaxation margin.
        gamma: the scale of the logits, above 0.
        detach_weights: hold the weights :math:`[\cdot]_+` constant in the gradient, as the paper does.
            ``False`` gives the true derivative of the value.
        epsilon: the miner's margin as in :func:`multi_similarity_loss`, or ``None`` for every pair.
        ref_emb: ``[M, D]``, dtype and device of ``embeddings``: the columns to pair the rows with.
            ``None`` pairs the rows among themselves.
        ref_labels: ``[M]``, given exactly when ``ref_emb`` is.
        similarity: ``"cosine"``, or ``"dot"`` for the plain inner product.
        reduction: as in :func:`multi_similarity_loss`.
        backend: as in :func:`multi_similarity_loss`.

    Returns:
        As :func:`multi_similarity_loss`.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, shape or value, naming it.
        RuntimeError: ``backend="fused"`` on a device without a kernel.
    """
    check_arguments(embeddings, labels, ref_emb, ref_labels, similarity, reduction, epsilon)
    check_number("m", m)
    check_number("gamma", gamma, positive=True)
    check_flag("detach_weights", detach_weights)
    if _use_kernel(embeddings.device, backend):
        params = [float(m), float(gamma), float(detach_weights)]
        batch = embeddings, labels, ref_emb, ref_labels
        return _fused("circle", params, *batch, epsilon, similarity, reduction)
    return _reference(
        reference.circle_loss,
        embeddings,
        labels,
        m=m,
        gamma=gamma,
        detach_weights=detach_weights,
        epsilon=epsilon,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        similarity=similarity,
        reduction=reduction,
    )
