"""Heads at points where a formula's derivative would be none, and their logits exported."""

import pytest
import torch
from cases.heads import EVERY_HEAD, HEADS

import dml_cuda


@EVERY_HEAD
@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}])
def test_rows_of_zeros(head, backend, options):
    """A row, and a weight, of zeros have gradients that are finite, 0 for the row."""
    module = head.make(5, 4, backend=backend, **options).double()
    with torch.no_grad():
        module.rows()[0].zero_()
    x = torch.randn(6, 4, dtype=torch.float64)
    x[2] = 0
    x.requires_grad_()
    loss = module(x, torch.arange(6) % 5)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert x.grad.isfinite().all()
    assert (x.grad[2] == 0).all()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_soft_triple_of_zeros_as_the_kernel(tau):
    """The reference and the kernel agree at rows and centres of zeros."""
    results = []
    for backend in ("fused", "reference"):
        torch.manual_seed(0)
        module = dml_cuda.SoftTripleLoss(4, 5, centers_per_class=3, tau=tau, backend=backend).double()
        with torch.no_grad():
            module.rows()[4].zero_()
        x = torch.randn(7, 5, dtype=torch.float64)
        x[0] = 0
        x.requires_grad_()
        loss = module(x, torch.arange(7) % 4)
        results.append([loss, *torch.autograd.grad(loss, [x, *module.parameters()])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


class Logits(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return self.head.get_logits(x)


WITH_LOGITS = [name for name in HEADS if hasattr(getattr(dml_cuda, name), "get_logits")]


@pytest.mark.parametrize("name", WITH_LOGITS)
def test_logits_export_with_a_dynamic_batch(name):
    model = Logits(HEADS[name].make(7, 4))
    exported = torch.export.export(
        model, (torch.randn(6, 4),), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1, max=512)}}
    )
    for rows in (1, 3, 60):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(exported.module()(x), model(x))


def test_proxy_nca_logits_are_squared_distances():
    head = dml_cuda.ProxyNCALoss(7, 4).double()
    x = torch.randn(40, 4, dtype=torch.float64)
    x[3] = 0
    x[4] = head.proxies[2].detach() * 3  # at a proxy
    unit = [torch.nn.functional.normalize(points, dim=1) for points in (x, head.proxies)]
    expected = torch.cdist(*unit, compute_mode="donot_use_mm_for_euclid_dist").square()
    torch.testing.assert_close(head.get_logits(x), expected, rtol=1e-9, atol=1e-12)
    assert (head.get_logits(x) >= 0).all()


@EVERY_HEAD
def test_second_derivatives_are_refused(head):
    """In the package's own words: a gradient penalty must not do nothing."""
    module = head.make(5, 4)
    x = torch.randn(6, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(module(x, torch.arange(6) % 5), x, create_graph=True)
    with pytest.raises(RuntimeError, match="the fused losses of dml_cuda have no second derivative"):
        gradient.square().sum().backward()
