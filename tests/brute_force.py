"""Both losses in float64, pair by pair as the papers write them: the truth for the CUDA kernels.

Independent of the package on purpose. `rounded` imitates a multiplication in a narrower type.
"""

import torch


def unit(x):
    largest = x.detach().abs().amax(1, keepdim=True).clamp_min(1e-300) if x.numel() else 1.0
    scaled = x / largest  # of which no square overflows
    norm = scaled.norm(dim=1, keepdim=True)
    return torch.where(norm * largest <= 1e-12, torch.zeros_like(x), scaled / norm.clamp_min(1e-300))


def similarities(q, r, normalize, rounded):
    """[N, M] in float64, differentiable as if nothing had been rounded."""

    def product(a, b):
        return a @ b.T

    exact = product(unit(q), unit(r)) if normalize else product(q, r)
    if rounded is None:
        return exact
    narrow = product(rounded(q.detach()), rounded(r.detach()))
    if normalize:
        narrow = narrow / (q.detach().norm(dim=1)[:, None] * r.detach().norm(dim=1)[None, :])
    return exact + (narrow - exact).detach()


def pair_masks(labels, ref_labels):
    positive = labels[:, None] == (labels if ref_labels is None else ref_labels)[None, :]
    negative = ~positive
    if ref_labels is None:
        positive = positive & ~torch.eye(len(labels), dtype=torch.bool)
    return positive, negative


def kept_masks(s, positive, negative, epsilon):
    if epsilon is None or s.shape[1] == 0:
        return positive, negative
    s = s.detach()
    max_neg = s.masked_fill(~negative, -torch.inf).amax(1, keepdim=True)
    min_pos = s.masked_fill(~positive, torch.inf).amin(1, keepdim=True)
    both = positive.any(1, keepdim=True) & negative.any(1, keepdim=True)
    return positive & both & (s - epsilon < max_neg), negative & both & (s + epsilon > min_pos)


def self_mask(self_ref, m):
    """[N, M] which pairs are of a row and itself."""
    return self_ref[:, None] == torch.arange(m)[None, :]


def log_sum_exp(logits, keep, one):
    terms = [logits.masked_fill(~keep, -torch.inf)]
    if one:
        terms.append(torch.zeros(len(logits), 1, dtype=logits.dtype))
    return torch.logsumexp(torch.cat(terms, 1), 1)


def row_losses(s, keep_pos, keep_neg, loss, params):
    if loss == "multi_similarity":
        alpha, beta, base = params
        lse_pos = log_sum_exp(-alpha * (s - base), keep_pos, True)
        lse_neg = log_sum_exp(beta * (s - base), keep_neg, True)
        return lse_pos / alpha + lse_neg / beta
    m, gamma, detach = params
    weight_pos, weight_neg = (1 + m - s).relu(), (s + m).relu()
    if detach:
        weight_pos, weight_neg = weight_pos.detach(), weight_neg.detach()
    some = keep_pos.any(1) & keep_neg.any(1)
    out = 0.0 * s.sum(1)  # a row that lacks either kind has a loss of 0
    if some.any():
        lse_pos = log_sum_exp((-gamma * weight_pos * (s - 1 + m))[some], keep_pos[some], False)
        lse_neg = log_sum_exp((gamma * weight_neg * (s - m))[some], keep_neg[some], False)
        # torch's softplus leaves out what is below its threshold.
        out = out.index_put((some,), torch.logaddexp(lse_pos + lse_neg, torch.zeros_like(lse_pos)))
    return out


def reduce_rows(losses, valid, reduction):
    if reduction == "none":
        return losses
    count = {"mean": len(losses), "mean_nonzero": (losses != 0).sum(), "mean_valid": valid.sum(), "sum": 1}[
        reduction
    ]
    return losses.sum() / count if count else losses.sum() * 0


def loss_and_gradients(
    q, labels, r, ref_labels, loss, params, epsilon, normalize, reduction, upstream=1.0, rounded=None,
    self_ref=None,
):  # fmt: skip
    """The loss, dq and dr (None where r is None), in float64."""
    q = q.detach().double().requires_grad_()
    refs = q if r is None else r.detach().double().requires_grad_()
    s = similarities(q, refs, normalize, rounded)
    keep_pos, keep_neg = kept_masks(s, *pair_masks(labels, ref_labels), epsilon)
    if self_ref is not None:  # mined with, but no pair to learn from
        keep_pos = keep_pos & ~self_mask(self_ref, len(refs))
    losses = row_losses(s, keep_pos, keep_neg, loss, params)
    value = reduce_rows(losses, (keep_pos | keep_neg).any(1), reduction)
    (value * upstream).sum().backward()

    def gradient(x):
        return torch.zeros_like(x) if x.grad is None else x.grad

    return value.detach(), gradient(q), None if r is None else gradient(refs)


def mining_margin(q, labels, r, ref_labels, epsilon, normalize, rounded=None):
    """How far the pair nearest to its mining threshold is from it: nearer than rounding, nobody can tell."""
    q, refs = q.double(), (q if r is None else r).double()
    s = similarities(q, refs, normalize, rounded)
    positive, negative = pair_masks(labels, ref_labels)
    if epsilon is None or s.numel() == 0:
        return float("inf")
    max_neg = s.masked_fill(~negative, -torch.inf).amax(1, keepdim=True)
    min_pos = s.masked_fill(~positive, torch.inf).amin(1, keepdim=True)
    gap = torch.where(positive, (s - epsilon - max_neg).abs(), (s + epsilon - min_pos).abs())
    return gap[positive | negative].min().item() if (positive | negative).any() else float("inf")
