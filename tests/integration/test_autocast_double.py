"""float64 stays float64 under autocast, as in PyTorch."""

import pytest
import torch
from cases.heads import EVERY_HEAD
from cases.losses import EVERY_LOSS

import dml_cuda


def as_without(module, *batch):
    """The loss and the gradient under autocast are those without it, bit by bit."""
    results = []
    for enabled in (False, True):
        leaf = batch[0].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = module(leaf, *batch[1:])
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        results.append((loss, grad))
    for one, other in zip(*results, strict=True):
        assert other.dtype == torch.float64
        assert torch.equal(one, other)


BACKENDS = pytest.mark.parametrize("backend", ["fused", "reference"])


def batch(n=12, dim=5):
    return torch.randn(n, dim, dtype=torch.float64), torch.arange(n) % 4


@EVERY_LOSS
@BACKENDS
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_pair_losses(loss, backend, reduction):
    x, labels = batch()
    module = loss.module(backend=backend, reduction=reduction)
    as_without(module, x, labels)
    as_without(module, x, labels.int())  # not by the fast path
    as_without(module, x, labels, None, *batch())


@EVERY_HEAD
@BACKENDS
def test_heads(head, backend):
    x, labels = batch()
    module = head.make(4, 5, backend=backend)
    as_without(module.double(), x, labels)
    as_without(module.double(), x, labels, (torch.arange(4),) * 3)


@BACKENDS
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_triplet_losses(backend, reduction):
    x, labels = batch()
    for make in (dml_cuda.TripletMarginLoss, dml_cuda.MarginLoss):
        module = make(backend=backend, reduction=reduction)
        as_without(module, x, labels)
        as_without(module, x, labels, tuple(dml_cuda.BatchHardMiner()(x, labels)))


@EVERY_HEAD
def test_a_head_of_float32_under_float64(head):
    x, labels = batch()
    module = head.make(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(x, labels)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, module.double()(x, labels), rtol=1e-6, atol=1e-7)
