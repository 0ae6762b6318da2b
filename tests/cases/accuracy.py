"""How close a result must be to the truth: twice as close as plain PyTorch in the same dtype gets."""

from functools import partial

import torch

from dml_cuda import functional

FUNCTIONS = {"multi_similarity": "multi_similarity_loss", "circle": "circle_loss"}


def reference(name):
    """A function of dml_cuda.functional, in plain PyTorch."""
    return partial(getattr(functional, name), backend="reference")


def evaluate(function, embeddings, labels, *, ref_emb=None, upstream=None, **options):
    """``(result, gradient to embeddings, gradient to ref_emb)`` of one loss, on fresh leaves."""
    q = embeddings.detach().clone().requires_grad_()
    leaves = [q]
    if ref_emb is not None:
        ref_emb = ref_emb.detach().clone().requires_grad_()
        leaves.append(ref_emb)
    value = function(q, labels, ref_emb=ref_emb, **options)
    if upstream is None:
        upstream = torch.ones_like(value)
    gradients = torch.autograd.grad(value, leaves, upstream.to(value.dtype))
    return value.detach(), gradients[0], gradients[1] if len(gradients) > 1 else None


def assert_as_accurate(what, fused, reference, truth, steps=8, logit=600.0):
    """``|fused - truth| <= 2 * |reference - truth| + steps * eps * |truth|``, each the largest of the tensor.

    ``reference`` is one result in plain PyTorch, or several that differ in rounding alone: then the largest
    of their errors counts. ``fused`` may be in a shorter dtype: one rounding to it is allowed on top. The
    truth is rounded too, to float64: an exponential multiplies that by its ``logit`` (600: circle loss with
    gamma 256 on cosines).
    """
    truth = torch.as_tensor(truth, dtype=torch.float64)
    references = [reference] if isinstance(reference, torch.Tensor) else reference
    dtype = references[0].dtype
    assert all(fused.shape == x.shape == truth.shape for x in references), what
    if truth.numel() == 0:
        return
    assert torch.isfinite(fused).all(), f"{what}: not finite"
    rounding = 0.0
    if fused.dtype != dtype:
        info = torch.finfo(fused.dtype)
        rounding = info.eps / 2 * truth.abs() + info.smallest_normal * info.eps
    error = ((fused.double() - truth).abs() - rounding).max().item()
    allowed = 2 * max((x.double() - truth).abs().max().item() for x in references)
    floor = steps * torch.finfo(dtype).eps + logit * torch.finfo(torch.float64).eps
    floor *= truth.abs().max().item()
    assert error <= allowed + floor, f"{what}: error {error:.3g}, allowed {allowed:.3g} + {floor:.3g}"
