"""The losses of two towers against the published formulas in float64, and their options."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dml_cuda

SIZES = (1, 2, 31, 130, 300)


def towers(n, dim=24, dtype=torch.float64, seed=0):
    """Two towers ``[N, D]``, whose rows i are near each other."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, dim, dtype=torch.float64, generator=generator)
    b = a + 0.7 * torch.randn(n, dim, dtype=torch.float64, generator=generator)
    return a.to(dtype).requires_grad_(), (3 * b).to(dtype).requires_grad_()


def clip(a, b, temperature, weights=None):
    """open_clip's, from its paper: the mean of both directions of cross-entropy."""
    logits = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / temperature
    target = torch.arange(len(a))
    rows, columns = (F.cross_entropy(x, target, reduction="none") for x in (logits, logits.T))
    losses = (rows + columns) / 2
    return losses if weights is None else losses * weights


def siglip(a, b, scale, bias, weights=None):
    """The paper's algorithm 1."""
    logits = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T * scale + bias
    z = 2 * torch.eye(len(a), dtype=logits.dtype) - 1
    losses = -F.logsigmoid(z * logits).sum(1)
    return losses if weights is None else losses * weights


FORMULAS = {
    "CLIPLoss": (clip, {"temperature": 0.1}),
    "SigLIPLoss": (siglip, {"scale": 8.0, "bias": -5.0}),
}
EVERY = pytest.mark.parametrize("name", FORMULAS)


def learned(values, dtype=torch.float64):
    return {name: nn.Parameter(torch.tensor(value, dtype=dtype)) for name, value in values.items()}


def found(value, *leaves):
    up = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
    return [value.detach(), *torch.autograd.grad(value, leaves, up)]


@pytest.mark.check
@EVERY
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_as_published(name, n, reduction, backend):
    formula, values = FORMULAS[name]
    a, b = towers(n)
    weights = torch.linspace(0.0, 2.0, n, dtype=torch.float64)
    for row_weights in (None, weights):
        params = learned(values)
        loss = getattr(dml_cuda, name)(**params, reduction=reduction, backend=backend)
        truth = formula(a, b, **params, weights=row_weights)
        truth = {"mean": truth.mean, "sum": truth.sum, "none": lambda x=truth: x}[reduction]()
        leaves = a, b, *params.values()
        for got, expected in zip(
            found(loss(a, b, row_weights=row_weights), *leaves), found(truth, *leaves), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(name, dtype):
    """As near to the truth as plain PyTorch in float32 from the same points."""
    formula, values = FORMULAS[name]
    a, b = towers(200, dtype=dtype)
    got = found(getattr(dml_cuda, name)(**values)(a, b), a, b)
    truth = formula(a.detach().double(), b.detach().double(), **values).mean()
    assert got[0].dtype == dtype
    assert got[1].dtype == dtype
    step = torch.finfo(dtype).eps
    assert (got[0].double() - truth).abs() <= 2 * step * truth.abs()


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@EVERY
def test_labels_and_similarities(name, similarity):
    """Where several rows share a positive, as the reference."""
    a, b = towers(90)
    labels = torch.randint(0, 30, (90,))
    values = {"temperature": 0.7} if name == "CLIPLoss" else {"scale": 2.0, "bias": -1.0}
    both = []
    for backend in ("fused", "reference"):
        loss = getattr(dml_cuda, name)(**values, similarity=similarity, backend=backend)
        both.append(found(loss(a, b, labels), a, b))
    for got, expected in zip(*both, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    rows = torch.arange(90)
    loss = getattr(dml_cuda, name)(**values, similarity=similarity)
    assert torch.equal(loss(a, b), loss(a, b, rows))


@EVERY
def test_one_tower_alone_learns(name):
    a, b = towers(140, dtype=torch.float32)
    loss = getattr(dml_cuda, name)()
    both = found(loss(a, b), a, b)
    for k, leaf in enumerate((a, b)):
        points = [x if x is leaf else x.detach() for x in (a, b)]
        value, gradient = found(loss(*points), leaf)
        assert torch.equal(value, both[0])
        torch.testing.assert_close(gradient, both[1 + k], rtol=1e-5, atol=1e-8)


@EVERY
def test_compiled(name):
    a, b = towers(40, dtype=torch.float32)
    loss = getattr(dml_cuda, name)(**learned(FORMULAS[name][1], torch.float32))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = a, b, *loss.parameters()
    for got, expected in zip(found(compiled(a, b), *leaves), found(loss(a, b), *leaves), strict=True):
        assert torch.equal(got, expected)


@EVERY
@pytest.mark.parametrize("threads", [1, 3])
def test_repeatable(name, threads):
    a, b = towers(1100, dtype=torch.float32)
    loss = getattr(dml_cuda, name)()
    torch.set_num_threads(2)
    expected = found(loss(a, b), a, b)
    torch.set_num_threads(threads)
    for got, same in zip(found(loss(a, b), a, b), expected, strict=True):
        assert torch.equal(got, same)


@EVERY
def test_not_finite(name):
    a, b = towers(70, dtype=torch.float32)
    with torch.no_grad():
        b[40, 3] = math.nan
    value, *gradients = found(getattr(dml_cuda, name)()(a, b), a, b)
    assert value.isnan()
    assert all(gradient.isnan().any() for gradient in gradients)


@EVERY
def test_no_rows(name):
    a, b = (torch.zeros(0, 8, requires_grad=True) for _ in range(2))
    value, *gradients = found(getattr(dml_cuda, name)()(a, b), a, b)
    assert value == 0
    assert all(gradient.shape == (0, 8) for gradient in gradients)


@EVERY
def test_bad_input(name):
    a, b = towers(6, dtype=torch.float32)
    loss = getattr(dml_cuda, name)()
    with pytest.raises(ValueError, match="b: expected 6 rows, one for each of a; got 5"):
        loss(a, b[:5])
    with pytest.raises(TypeError, match="b: expected a floating-point tensor"):
        loss(a, [1])
    with pytest.raises(ValueError, match="row_weights: expected 6 numbers"):
        loss(a, b, row_weights=torch.ones(5))
    with pytest.raises(ValueError, match="reduction: expected one of mean, sum, none; got 'mean_valid'"):
        getattr(dml_cuda, name)(reduction="mean_valid")
    with pytest.raises(TypeError, match="epsilon: expected one of the parameters or options"):
        getattr(dml_cuda, name)(epsilon=0.1)
    with pytest.raises(ValueError, match="reduction"):
        loss.reduction = "mean_nonzero"


# ---- InfoNCE -----------------------------------------------------------------------------------------------


def info_nce(query, positive, negatives, temperature, paired, in_batch):
    q, p = F.normalize(query, dim=1), F.normalize(positive, dim=1)
    logits = [(q * p).sum(1, keepdim=True) / temperature]
    if in_batch:
        own = torch.eye(len(q), dtype=torch.bool)
        logits.append((q @ p.T / temperature).masked_fill(own, -math.inf))
    if negatives is not None:
        n = F.normalize(negatives, dim=-1)
        logits.append((torch.einsum("nd,nkd->nk", q, n) if paired else q @ n.T) / temperature)
    target = torch.zeros(len(q), dtype=torch.long)
    return F.cross_entropy(torch.cat(logits, 1), target, reduction="none")


@pytest.mark.check
@pytest.mark.parametrize(
    ("negatives", "in_batch"),
    [
        (negatives, in_batch)
        for negatives in (None, "unpaired", "paired")
        for in_batch in (None, True, False)
        if (negatives, in_batch) != (None, False)  # no negatives at all: the next test
    ],
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("n", [1, 40, 200])
def test_info_nce(negatives, in_batch, reduction, n):
    a, b = towers(n)
    shape = {"unpaired": (70, 24), "paired": (n, 5, 24), None: None}[negatives]
    given = None if shape is None else torch.randn(shape, dtype=torch.float64, requires_grad=True)
    temperature = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    loss = dml_cuda.InfoNCELoss(
        temperature, negative_mode=negatives or "unpaired", in_batch_negatives=in_batch, reduction=reduction
    )
    counted = negatives is None if in_batch is None else in_batch
    truth = info_nce(a, b, given, temperature, negatives == "paired", counted)
    truth = {"mean": truth.mean, "sum": truth.sum, "none": lambda: truth}[reduction]()
    leaves = [a, b, temperature] + ([] if given is None else [given])
    for got, expected in zip(found(loss(a, b, given), *leaves), found(truth, *leaves), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_info_nce_without_negatives():
    """Nothing to tell a positive from: the loss is 0, attached to the graph."""
    a, b = towers(5)
    loss = dml_cuda.InfoNCELoss(in_batch_negatives=False)
    assert loss(a, b) == 0
    assert all((x == 0).all() for x in found(loss(a, b), a, b))


def test_info_nce_bad_input():
    a, b = towers(6)
    loss = dml_cuda.InfoNCELoss()
    with pytest.raises(
        ValueError, match=r'negatives: expected shape \[M, 24\] with negative_mode="unpaired"'
    ):
        loss(a, b, torch.zeros(6, 2, 24))
    with pytest.raises(ValueError, match=r"negatives: expected shape \[6, K, 24\]"):
        dml_cuda.InfoNCELoss(negative_mode="paired")(a, b, torch.zeros(5, 2, 24))
    with pytest.raises(ValueError, match="positive: expected 6 rows"):
        loss(a, b[:4])
    with pytest.raises(ValueError, match="negative_mode: expected one of unpaired, paired"):
        dml_cuda.InfoNCELoss(negative_mode="hard")


def test_memory():
    """No N x N matrix: 16,384 rows of 64 within 256 MB."""
    import resource

    a, b = towers(16384, 64, torch.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for loss in (dml_cuda.CLIPLoss(), dml_cuda.SigLIPLoss()):
        found(loss(a, b), a, b)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) * 1024 < 256e6


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("learns", [False, True], ids=["fixed", "learned"])
def test_two_calls_of_one_direction(reduction, learns):
    """As GPUs compute both directions, here on the CPU."""
    from dml_cuda._ops.evaluate import _both_directions, compute

    a, b = towers(60)
    temperature = nn.Parameter(torch.tensor(0.1, dtype=torch.float64)) if learns else 0.1
    loss = dml_cuda.CLIPLoss(temperature=temperature, reduction=reduction)
    leaves = (a, b, temperature) if learns else (a, b)
    for weights in (None, torch.linspace(0.5, 2.0, 120, dtype=torch.float64)):
        batch = loss.batch(a, b, None, None)._replace(row_weights=weights)
        for sums in (False, True):
            if sums and reduction == "none":
                continue
            call = loss.call.with_both_directions().with_sums(sums)
            expected, by_two = (function(call, batch) for function in (compute, _both_directions))
            for got, want in zip(found(by_two, *leaves), found(expected, *leaves), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
