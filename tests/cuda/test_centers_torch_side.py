"""The torch side of the CUDA ops on classes with several centres, on CPU tensors and emulated kernels."""

import math

import pytest
import torch
from emulator import torch_side
from emulator.build import ROOT

pytestmark = pytest.mark.long

CPU = torch.ops.dml_cuda
LOSSES = {"soft_triple": [8.0, 0.2, 0.05], "sub_centers": [8.0, math.cos(0.5), math.sin(0.5)]}
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES)


@pytest.fixture(scope="module")
def on_host():
    torch_side.load("centers", [ROOT / "csrc" / "cuda" / "centers" / "centers.cu"])
    return torch.ops.dml_cuda_centers_on_host


def make(n, classes, per_class, dim=7, dtype=torch.float64, columns=True):
    """Embeddings, centres and labels, one row without a class; a row and a centre of zeros."""
    x, w = (
        torch.randn(n, dim, dtype=torch.float64),
        torch.randn(dim, classes * per_class, dtype=torch.float64),
    )
    labels = torch.randint(0, classes, (n,))
    if n > 2:
        labels[1], x[2] = -1, 0
    w[:, 0] = 0
    w = w.to(dtype)
    return x.to(dtype), w.T if columns else w.T.contiguous(), labels


def results(ops, batch, loss, per_class, block=1 << 19, learned=False, needs=(True, True, True), grad=None):
    params = LOSSES[loss]
    in_memory = torch.tensor(params, dtype=torch.float64) if learned else None
    how = per_class, loss, [] if learned else params, block
    losses, saved = ops.center_softmax(*batch, in_memory, *how)
    grad = torch.linspace(-1, 2, len(losses)).to(losses) if grad is None else grad
    return losses, saved, *ops.center_softmax_backward(grad, *batch, in_memory, saved, *how, *needs)


def check(on_host, batch, loss, per_class, tolerance=1e-11, **how):
    both = (results(ops, batch, loss, per_class, **how) for ops in (on_host, CPU))
    for a, b in zip(*both, strict=True):
        assert a.shape == b.shape
        assert a.stride() == b.stride()
        assert a.dtype == b.dtype
        scale = max(1.0, float(b.double().abs().max())) if b.numel() and b.isfinite().all() else 1.0
        assert torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance * scale, equal_nan=True)


@EVERY_LOSS
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    ("n", "classes", "per_class"), [(7, 5, 1), (6, 40, 3), (4, 300, 2), (3, 1, 4), (1, 2, 32), (3, 2, 5200)]
)
def test_sizes(on_host, loss, learned, n, classes, per_class):
    """More classes than a tile has, more centres than are staged; blocks of all, some and one class."""
    batch = make(n, classes, per_class)
    for block in {1 << 19, n * per_class * (classes // 2 + 1), 1} if classes < 100 else {1 << 19}:
        check(on_host, batch, loss, per_class, block=block, learned=learned)


@EVERY_LOSS
@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(on_host, loss, dtype, columns):
    batch = make(9, 30, 3, dtype=dtype, columns=columns)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for block in (1 << 19, 100):
        check(on_host, batch, loss, 3, tolerance, block=block)


@EVERY_LOSS
def test_needs(on_host, loss):
    batch = make(9, 30, 3)
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        check(on_host, batch, loss, 3, learned=True, needs=needs)


@EVERY_LOSS
def test_odd_batches(on_host, loss):
    check(on_host, make(0, 5, 2), loss, 2, learned=True)
    batch = make(5, 6, 2)
    batch[2][:] = torch.tensor([-1, 6, 100, -5, 6])
    check(on_host, batch, loss, 2, learned=True)
    assert not any(gradient.any() for gradient in results(on_host, batch, loss, 2, learned=True)[2:])


@EVERY_LOSS
def test_not_finite(on_host, loss):
    for where in (0, 1):
        batch = make(8, 6, 2)
        batch[where][5, 2] = math.nan if where else math.inf
        losses, _, *gradients = results(on_host, batch, loss, 2, learned=True)
        assert losses[5 if where == 0 else 0].isnan()
        assert all(gradient.isnan().any() for gradient in gradients)


def test_parameters_that_cannot_be(on_host):
    batch, known = make(8, 6, 2), torch.arange(8) != 1
    for values in ([0.0, 0.2, 0.0], [8.0, -1.0, 0.0], [math.nan, 0.2, 0.0]):
        learned = torch.tensor(values, dtype=torch.float64)
        for ops in (on_host, CPU):
            losses, _ = ops.center_softmax(*batch, learned, 2, "soft_triple", [], 1 << 19)
            assert losses[known].isnan().all()


@EVERY_LOSS
@pytest.mark.parametrize(("block", "blocks"), [(1 << 24, 1), (128 * 10 * 25, 4)])
def test_launches(on_host, loss, block, blocks):
    """Beside PyTorch's products. Forward: the rows' lengths and, for a block, its centres' lengths and the
    losses. Backward: these with weights instead of losses, and the way through lengths for each block and for
    the rows."""
    batch = make(128, 100, 10, dim=16, dtype=torch.float32)
    on_host.start_record()
    results(on_host, batch, loss, 10, block=block, learned=True)
    kernels = [line.split()[0] for line in on_host.end_record().splitlines()]
    known = ("store_inverse_lengths", "center_row_losses", "center_row_weights", "take_out_lengths")
    counts = {name: sum(name in kernel for kernel in kernels) for name in known}
    assert counts == dict(zip(known, (2 + 2 * blocks, blocks, blocks, blocks + 1), strict=True))
    assert sum(counts.values()) == len(kernels)
