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

    ``fused`` may be in a shorter dtype than ``reference``; then one rounding to it is allowed on top. The
    truth is rounded too, to float64: an exponential multiplies that by its ``logit`` (600: circle loss with
    gamma 256 on cosines).
    """
    truth = torch.as_tensor(truth, dtype=torch.float64)
    assert fused.shape == reference.shape == truth.shape, what
    if truth.numel() == 0:
        return
    assert torch.isfinite(fused).all(), f"{what}: not finite"
    rounding = 0.0
    if fused.dtype != reference.dtype:
        info = torch.finfo(fused.dtype)
        rounding = info.eps / 2 * truth.abs() + info.smallest_normal * info.eps
    error = ((fused.double() - truth).abs() - rounding).max().item()
    allowed = 2 * (reference.double() - truth).abs().max().item()
    floor = steps * torch.finfo(reference.dtype).eps + logit * torch.finfo(torch.float64).eps
    floor *= truth.abs().max().item()
    assert error <= allowed + floor, f"{what}: error {error:.3g}, allowed {allowed:.3g} + {floor:.3g}"
