"""The torch side of pair_loss on CUDA, on CPU tensors and emulated kernels: what it asks, what it checks."""

import contextlib

import pytest
import torch
from emulator import torch_side

FORMULA = ("multi_similarity", [2.0, 50.0, 0.5])


@pytest.fixture(scope="module")
def on_host():
    torch_side.load("pairs")
    return torch.ops.dml_cuda_pair_loss_on_host


@pytest.fixture(autouse=True)
def same_precision():
    """Each test leaves torch's switches as they were when it began: untouched."""
    yield
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.backends.fp32_precision = "none"
    with contextlib.suppress(RuntimeError):
        torch.set_float32_matmul_precision("highest")


class Call:
    def __init__(self, n=20, d=8, m=None, dtype=torch.float32):
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(n, d, generator=g).to(dtype)
        self.labels = torch.arange(n) % 3
        self.r = None if m is None else torch.randn(m, d, generator=g).to(dtype)
        self.ref_labels = None if m is None else torch.arange(m) % 3

    def forward(self, ops, reduction="mean"):
        sides = (self.x, self.labels, self.r, self.ref_labels, None, None)
        return ops.pair_loss(*sides, *FORMULA, 0.1, "cosine", reduction, True, True, True)

    def backward(self, ops, saved, grad_loss=None, reduction="mean"):
        grad_loss = torch.ones(()) if grad_loss is None else grad_loss
        sides = (self.x, self.labels, self.r, self.ref_labels, None, None)
        how = (*FORMULA, "cosine", reduction, True, True, self.r is not None)
        return ops.pair_loss_backward(grad_loss, *sides, saved, *how)


@pytest.mark.parametrize("m", [None, 13])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_as_on_the_cpu(on_host, dtype, m):
    call = Call(m=m, dtype=dtype)
    call.x = call.x.repeat(1, 2)[:, ::2] if m is None else call.x  # strides that must be made dense
    loss, saved = call.forward(on_host)
    expected, cpu_saved = call.forward(torch.ops.dml_cuda)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert torch.allclose(loss, expected, tolerance)
    grads = call.backward(on_host, saved, torch.ones((), dtype=dtype))
    for a, b in zip(
        grads, call.backward(torch.ops.dml_cuda, cpu_saved, torch.ones((), dtype=dtype)), strict=True
    ):
        assert a.dtype == dtype
        assert torch.allclose(a, b, tolerance, tolerance)


def set_old(name):
    return lambda: torch.set_float32_matmul_precision(name)


def set_new(**switches):
    def do():
        for name, value in switches.items():
            place = torch.backends
            *path, last = name.split("__")
            for part in path:
                place = getattr(place, part)
            setattr(place, last, value)

    return do


def mixed():
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.fp32_precision = "ieee"


# What is set, and which precision of csrc/cuda/pair_loss.h that means.
SETTINGS = {
    "default": (lambda: None, 0),
    "highest": (set_old("highest"), 0),
    "high": (set_old("high"), 1),
    "medium": (set_old("medium"), 1),
    "new for CUDA": (set_new(cuda__matmul__fp32_precision="tf32"), 1),
    "new for all": (set_new(fp32_precision="tf32", cuda__matmul__fp32_precision="none"), 1),
    "new, not for CUDA": (set_new(fp32_precision="tf32", cuda__matmul__fp32_precision="ieee"), 0),
    "old and new": (mixed, 0),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_precision_however_it_was_set(on_host, setting):
    """The older getter of torch raises in half of these. What is saved is longer by the precision's
    number."""
    usual = Call().forward(on_host)[1].numel()
    others = [Call(dtype=dtype).forward(on_host)[1].numel() for dtype in (torch.bfloat16, torch.float64)]
    change, precision = SETTINGS[setting]
    change()
    assert Call().forward(on_host)[1].numel() - usual == precision
    # Which is no matter of other types.
    assert [Call(dtype=d).forward(on_host)[1].numel() for d in (torch.bfloat16, torch.float64)] == others


@pytest.mark.parametrize(("before", "after"), [("high", "highest"), ("highest", "medium")])
def test_backward_multiplies_as_forward_did(on_host, before, after):
    call = Call(n=60, d=40)
    torch.set_float32_matmul_precision(after)
    _, others = call.forward(on_host)
    torch.set_float32_matmul_precision(before)
    _, saved = call.forward(on_host)
    expected = call.backward(on_host, saved)[0]
    torch.set_float32_matmul_precision(after)
    assert torch.equal(call.backward(on_host, saved)[0], expected)
    assert not torch.equal(call.backward(on_host, others)[0], expected)


def test_what_backward_is_given_is_checked(on_host):
    call = Call()
    _, saved = call.forward(on_host)
    longer, shorter = torch.cat([saved, saved[:16]]), saved[:-16]
    strided = saved.repeat_interleave(2)[::2]
    for wrong in (longer, shorter, saved.view(torch.int8), saved.view(1, -1), strided, saved.to("meta")):
        with pytest.raises(ValueError, match="saved: expected"):
            call.backward(on_host, wrong)
    for grad in (torch.ones(2), torch.ones(0), torch.ones((), device="meta")):
        with pytest.raises(ValueError, match="grad_loss: expected"):
            call.backward(on_host, saved, grad)
    _, of_rows = call.forward(on_host, "none")
    with pytest.raises(ValueError, match="grad_loss: expected 20"):
        call.backward(on_host, of_rows, torch.ones(()), "none")
    # Any floating type and layout will do.
    expected = call.backward(on_host, of_rows, torch.arange(20.0), "none")[0]
    strided = torch.arange(20.0, dtype=torch.float64).repeat_interleave(2)[::2]
    assert torch.equal(call.backward(on_host, of_rows, strided, "none")[0], expected)


def test_no_rows_leave_references_a_gradient_of_zero(on_host):
    """Norms that nobody has written must not matter, whatever lies there."""
    call = Call(n=0, m=50)
    for _ in range(3):
        junk = torch.full((100_000,), torch.nan)
        del junk
        loss, saved = call.forward(on_host)
        assert loss == 0
        assert torch.equal(call.backward(on_host, saved)[1], torch.zeros(50, 8))
