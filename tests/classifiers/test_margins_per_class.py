"""A margin for each class: against the published formulas with dense logits in float64."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dml_cuda

CLASSES, DIM = 9, 16
HEADS = {
    "CosFaceLoss": (dml_cuda.CosFaceLoss, {"scale": 8.0}, torch.linspace(0.05, 0.6, CLASSES)),
    "ArcFaceLoss": (dml_cuda.ArcFaceLoss, {"scale": 8.0}, torch.linspace(5.0, 60.0, CLASSES)),
    "SubCenterArcFaceLoss": (
        dml_cuda.SubCenterArcFaceLoss,
        {"scale": 8.0, "sub_centers": 2},
        torch.linspace(5.0, 60.0, CLASSES),
    ),
}
EVERY = pytest.mark.parametrize("name", HEADS)


def make(name, dtype=torch.float64, margin=None, **options):
    kind, values, margins = HEADS[name]
    torch.manual_seed(0)
    margin = nn.Parameter(margins.to(dtype)) if margin is None else margin
    return kind(CLASSES, DIM, margin=margin, **values, **options).to(dtype)


def batch(n=40, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(CLASSES, (n,), generator=g)
    labels[3] = -1
    return torch.randn(n, DIM, generator=g, dtype=torch.float64).to(dtype).requires_grad_(), labels


def truth(name, head, x, labels):
    """Cross entropy of the logits, row by row."""
    cosines = F.normalize(x, dim=1) @ F.normalize(head.W, dim=0)
    if name == "SubCenterArcFaceLoss":
        cosines = cosines.view(len(x), CLASSES, -1).max(2).values
    losses = []
    for s, label in zip(cosines, labels.tolist(), strict=True):
        if label < 0:
            losses.append(s.new_zeros(()))
            continue
        m = head.margin[label]
        if name == "CosFaceLoss":
            own = s[label] - m
        else:
            angle = m * math.pi / 180
            theta = s[label].clamp(-1, 1).arccos()
            own = torch.where(theta <= math.pi - angle, (theta + angle).cos(), s[label] - angle * angle.sin())
        logits = head.scale * torch.where(F.one_hot(torch.tensor(label), CLASSES) > 0, own, s)
        losses.append(logits.logsumexp(0) - logits[label])
    return torch.stack(losses)


def found(value, *leaves):
    up = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
    return [value.detach(), *torch.autograd.grad(value, leaves, up)]


@pytest.mark.check
@EVERY
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_against_dense_logits(name, backend):
    x, labels = batch()
    weights = torch.linspace(0.5, 2.0, len(x), dtype=torch.float64)
    for reduction in ("none", "mean", "mean_valid", "sum", "mean_nonzero"):
        head = make(name, reduction=reduction, backend=backend)
        leaves = x, head.W, head.margin
        for row_weights in (None, weights):
            losses = truth(name, head, x, labels) * (1 if row_weights is None else row_weights)
            count = {"mean": 40, "mean_valid": 39, "mean_nonzero": 39, "sum": 1, "none": 1}[reduction]
            expected = found(losses if reduction == "none" else losses.sum() / count, *leaves)
            for got, want in zip(
                found(head(x, labels, row_weights=row_weights), *leaves), expected, strict=True
            ):
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@EVERY
def test_equal_margins_are_one_margin(name):
    x, labels = batch()
    for value in (0.3, 20.0):
        one = make(name, margin=value)
        many = make(name, margin=torch.full((CLASSES,), value, dtype=torch.float64))
        leaf = x.detach().requires_grad_()
        for got, want in zip(
            found(many(leaf, labels), leaf, many.W), found(one(leaf, labels), leaf, one.W), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accuracy(name, dtype):
    """As near to the truth as the reference in the same type, or twice as far."""
    x, labels = batch(300, dtype)
    fused, reference = make(name, torch.float32), make(name, torch.float32, backend="reference")
    exact = make(name, torch.float64, backend="reference")
    exact.load_state_dict({key: value.double() for key, value in fused.state_dict().items()})
    expected = found(exact(x.double(), labels), *exact.parameters())
    for got, by_reference, want in zip(
        *(found(head(x, labels), *head.parameters()) for head in (fused, reference)), expected, strict=True
    ):
        error, allowed = ((value.double() - want).norm() for value in (got, by_reference))
        assert error <= 2 * allowed + 1e-5 * want.norm()


@EVERY
def test_a_parameter_of_the_module(name):
    head = make(name, torch.float32)
    x, labels = batch(dtype=torch.float32)
    assert set(dict(head.named_parameters())) == {"W", "margin"}
    head(x, labels).backward()
    absent = torch.bincount(labels.clamp(min=0), minlength=CLASSES) == 0
    assert ((head.margin.grad != 0) == ~absent).all()
    other = copy.deepcopy(head)
    assert other(x, labels) == head(x, labels)
    other.margin = 0.2
    assert set(dict(other.named_parameters())) == {"W"}
    other.margin = nn.Parameter(head.margin.detach().clone())
    assert other(x, labels) == head(x, labels)
    assert "margin=tensor of 9" in repr(head)


@EVERY
def test_compiled_and_under_autocast(name):
    head = make(name, torch.float32)
    x, labels = batch(dtype=torch.float32)
    expected = found(head(x, labels), *head.parameters())
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (40, 31):
        for got, want in zip(
            found(compiled(x[:n], labels[:n]), *head.parameters()),
            found(head(x[:n], labels[:n]), *head.parameters()),
            strict=True,
        ):
            torch.testing.assert_close(got, want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = head(x, labels)
    torch.testing.assert_close(value, expected[0], rtol=0.05, atol=0.05)


@EVERY
def test_one_class_and_no_rows(name):
    kind, values, margins = HEADS[name]
    head = kind(1, DIM, margin=nn.Parameter(margins[:1]), **values)
    x, labels = torch.randn(5, DIM, requires_grad=True), torch.zeros(5, dtype=torch.long)
    assert head(x, labels) == 0
    head = make(name, torch.float32)
    value = head(x[:0], labels[:0])
    value.backward()
    assert value == 0
    assert (head.margin.grad == 0).all()


@EVERY
def test_not_finite(name):
    head = make(name, torch.float32)
    x, labels = batch(dtype=torch.float32)
    with torch.no_grad():
        x[5, 0] = torch.nan
    assert head(x, labels).isnan()


@EVERY
def test_bad_margins(name):
    x, labels = batch(dtype=torch.float32)
    with pytest.raises(
        ValueError, match="margin: expected a number for each of num_classes=9 classes, got 8"
    ):
        make(name, torch.float32, margin=torch.full((8,), 0.2))(x, labels)
    with pytest.raises(
        ValueError, match=r"margin: expected one number, a tensor of shape \[\] or \[1\], or \[C\]"
    ):
        make(name, torch.float32, margin=torch.full((9, 1), 0.2))
    with pytest.raises(ValueError, match="margin: expected a"):
        make(name, torch.float32, margin=torch.full((9,), torch.nan))
    with pytest.raises(ValueError, match=r"scale: expected one number, a tensor of shape \[\] or \[1\], got"):
        HEADS[name][0](9, DIM, scale=torch.ones(9))
