"""The laws in float64, pair by pair as the papers write them: the truth for the CUDA kernels.

Independent of the package on purpose. `rounded` imitates a multiplication in a narrower type.
"""

import torch


def unit(x):
    largest = x.detach().abs().amax(1, keepdim=True).clamp_min(1e-300) if x.numel() else 1.0
    scaled = x / largest  # of which no square overflows
    norm = scaled.norm(dim=1, keepdim=True)
    return torch.where(norm * largest <= 1e-12, torch.zeros_like(x), scaled / norm.clamp_min(1e-300))


def distances(x, y):
    """[N, M]; where a distance is 0 its derivative is, too."""
    squares = (x[:, None, :] - y[None, :, :]).square().sum(2)
    apart = squares > 0
    return torch.where(apart, squares.where(apart, torch.ones_like(squares)).sqrt(), 0.0)


def similarities(q, r, normalize, rounded, euclidean=False):
    """[N, M] in float64, differentiable as if nothing had been rounded."""

    def product(a, b):
        return a @ b.T

    x, y = (unit(q), unit(r)) if normalize else (q, r)
    exact = -distances(x, y) if euclidean else product(x, y)
    if rounded is None:
        return exact
    narrow = product(rounded(q.detach()), rounded(r.detach()))
    if normalize:
        narrow = narrow / (q.detach().norm(dim=1)[:, None] * r.detach().norm(dim=1)[None, :])
    if euclidean:  # near distances are not taken from a product
        both = x.detach().square().sum(1)[:, None] + y.detach().square().sum(1)[None, :]
        squares = both - 2 * narrow
        narrow = torch.where(squares > both / 64, -squares.clamp_min(0).sqrt(), exact.detach())
    return exact + (narrow - exact).detach()


def pair_masks(labels, ref_labels):
    positive = labels[:, None] == (labels if ref_labels is None else ref_labels)[None, :]
    negative = ~positive
    if ref_labels is None:
        positive = positive & ~torch.eye(len(labels), dtype=torch.bool)
    return positive, negative


def kept_masks(s, positive, negative, epsilon):
    """What the multi-similarity miner keeps of the pairs."""
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


def log_sum_exp(logits, keep, one=False):
    """[N]; of nothing -inf, with a derivative of 0."""
    terms = [logits.masked_fill(~keep, -torch.inf)]
    if one:
        terms.append(torch.zeros(len(logits), 1, dtype=logits.dtype))
    terms = torch.cat(terms, 1)
    some = (terms > -torch.inf).any(1)
    value = torch.logsumexp(torch.where(some[:, None], terms, 0.0 * terms.nan_to_num(neginf=0.0)), 1)
    return torch.where(some, value, -torch.inf)


def softplus(x):
    """torch's own leaves out what is below its threshold."""
    return torch.logaddexp(x, torch.zeros_like(x))


def total(terms, keep):
    """[N] sum of each row's kept terms."""
    return torch.where(keep, terms, 0.0).sum(1)


# Each law: similarities [N, M], masks of the kept positives and negatives, parameters. Returns the parts of the
# loss [N] each, and for laws that count in pairs the terms [N, M] of each part with their mask.


def multi_similarity(s, pos, neg, alpha, beta, base):
    pull = log_sum_exp(-alpha * (s - base), pos, True) / alpha
    return [pull + log_sum_exp(beta * (s - base), neg, True) / beta], None


def circle(s, pos, neg, m, gamma, detach):
    weight_pos, weight_neg = (1 + m - s).relu(), (s + m).relu()
    if detach:
        weight_pos, weight_neg = weight_pos.detach(), weight_neg.detach()
    some = pos.any(1) & neg.any(1)
    out = 0.0 * s.sum(1)  # a row that lacks either kind has a loss of 0
    if some.any():
        lse_pos = log_sum_exp((-gamma * weight_pos * (s - 1 + m))[some], pos[some])
        lse_neg = log_sum_exp((gamma * weight_neg * (s - m))[some], neg[some])
        out = out.index_put((some,), softplus(lse_pos + lse_neg))
    return [out], None


def contrastive(s, pos, neg, pos_level, neg_level):
    terms = [((pos_level - s).relu(), pos), ((s - neg_level).relu(), neg)]
    return [total(*t) for t in terms], terms


def binomial_deviance(s, pos, neg, alpha, beta, base):
    pull, push = total(softplus(-alpha * (s - base)), pos), total(softplus(beta * (s - base)), neg)
    return [pull / pos.sum(1).clamp_min(1) + push / neg.sum(1).clamp_min(1)], None


def nt_xent(s, pos, neg, temperature):
    lse = log_sum_exp(s / temperature, neg)
    some = (lse > -torch.inf)[:, None]
    terms = torch.where(some, softplus(torch.where(some[:, 0], lse, 0.0)[:, None] - s / temperature), 0.0)
    return [total(terms, pos)], [(terms, pos)]


def sup_con(s, pos, neg, temperature):
    some = pos.any(1)
    lse = torch.where(some, log_sum_exp(s / temperature, pos | neg), 0.0)
    return [torch.where(some, lse - total(s / temperature, pos) / pos.sum(1).clamp_min(1), 0.0)], None


LAWS = [multi_similarity, circle, contrastive, binomial_deviance, nt_xent, sup_con]
LAWS = {law.__name__: law for law in LAWS}


def parts_and_units(s, pos, neg, loss, params, reduction):
    """Rows' losses [N], the parts of the loss and what they are divided by under a mean."""
    parts, pair_terms = LAWS[loss](s, pos, neg, *params)
    units = []
    for k, part in enumerate(parts):
        if pair_terms is not None:
            terms, keep = pair_terms[k]
            counts = keep & (terms != 0) if reduction == "mean_nonzero" else keep
        elif reduction == "mean_nonzero":
            counts = part != 0
        elif reduction == "mean_valid":
            counts = (pos | neg).any(1)
        else:
            counts = torch.ones(len(s))
        units.append(counts.sum())
    return sum(parts), [part.sum() for part in parts], units


def loss_and_gradients(
    q, labels, r, ref_labels, loss, params, epsilon, normalize, reduction, upstream=1.0, rounded=None,
    self_ref=None, euclidean=False, mine_self=True, divide=True,
):  # fmt: skip
    """The loss, dq and dr (None where r is None), in float64."""
    q = q.detach().double().requires_grad_()
    refs = q if r is None else r.detach().double().requires_grad_()
    s = similarities(q, refs, normalize, rounded, euclidean)
    positive, negative = pair_masks(labels, ref_labels)
    own = torch.zeros_like(positive) if self_ref is None else self_mask(self_ref, len(refs)) & positive
    keep_pos, keep_neg = kept_masks(s, positive if mine_self else positive & ~own, negative, epsilon)
    # A row may be mined with itself, but that is no pair to learn from.
    rows, parts, units = parts_and_units(s, keep_pos & ~own, keep_neg, loss, params, reduction)
    if reduction == "none":
        value = rows
    elif not divide:
        value = torch.stack([*parts, *[q.new_zeros(())] * (2 - len(parts))])
    elif reduction == "sum":
        value = sum(parts)
    else:
        value = sum(part / unit if unit > 0 else 0.0 * part for part, unit in zip(parts, units, strict=True))
    (value * (upstream if divide else upstream[:2])).sum().backward()
    value = value.detach()
    if not divide:
        value = torch.cat([value, torch.tensor([*units, *[0.0] * (2 - len(units))], dtype=torch.float64)])

    def gradient(x):
        return torch.zeros_like(x) if x.grad is None else x.grad

    return value, gradient(q), None if r is None else gradient(refs)


def mining_margin(q, labels, r, ref_labels, epsilon, normalize, rounded=None, euclidean=False):
    """How far the pair nearest to its mining threshold is from it: nearer than rounding, nobody can tell."""
    q, refs = q.double(), (q if r is None else r).double()
    if epsilon is None:
        return float("inf")
    s = similarities(q, refs, normalize, rounded, euclidean)
    positive, negative = pair_masks(labels, ref_labels)
    if s.numel() == 0:
        return float("inf")
    max_neg = s.masked_fill(~negative, -torch.inf).amax(1, keepdim=True)
    min_pos = s.masked_fill(~positive, torch.inf).amin(1, keepdim=True)
    gap = torch.where(positive, (s - epsilon - max_neg).abs(), (s + epsilon - min_pos).abs())
    return gap[positive | negative].min().item() if (positive | negative).any() else float("inf")
