"""The torch side of pair_loss on CUDA, on CPU tensors and emulated kernels: its options and its checks."""

import contextlib

import pytest
import torch
from emulator import torch_side

from dml_cuda import _C
from dml_cuda._ops.arguments import OpOptions

pytestmark = pytest.mark.long

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

        self.batch = self.x, self.labels, self.r, self.ref_labels, None, None, None
        self.options = OpOptions(*FORMULA, 0.1, save_for_backward=True)

    def forward(self, ops, **changes):
        return ops.pair_loss(*self.batch, *self.options._replace(**changes))

    def backward(self, ops, saved, grad_loss=None, **changes):
        grad_loss = torch.ones(()) if grad_loss is None else grad_loss
        given = grad_loss, saved, True, self.r is not None, False
        return ops.pair_loss_backward(*self.batch, *self.options._replace(**changes), *given)


@pytest.mark.parametrize("m", [None, 13])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_as_on_the_cpu(on_host, dtype, m):
    call = Call(m=m, dtype=dtype)
    if m is None:
        call.batch = call.x.repeat(1, 2)[:, ::2], *call.batch[1:]  # strides that must be made dense
    loss, saved = call.forward(on_host)
    expected, cpu_saved = call.forward(torch.ops.dml_cuda)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert torch.allclose(loss, expected, tolerance)
    one = torch.ones((), dtype=dtype)
    found = call.backward(on_host, saved, one)[:2]
    for a, b in zip(found, call.backward(torch.ops.dml_cuda, cpu_saved, one)[:2], strict=True):
        assert a.dtype == dtype
        assert torch.allclose(a, b, tolerance, tolerance)


def allocations(step):
    with torch.profiler.profile() as profile:
        result = step()
    return sum(event.name == "aten::empty" for event in profile.events()), result


@pytest.mark.parametrize(("m", "d"), [(None, 8), (None, 200), (13, 8)])
def test_calls_that_allocate(on_host, m, d):
    """Forward: the loss, and what is saved with the workspace behind it. Backward: two gradients, one of them
    perhaps empty; a workspace only where the gradient is summed in parts."""
    call = Call(m=m, d=d)
    count, (_, saved) = allocations(lambda: call.forward(on_host))
    assert count == 2
    assert saved.untyped_storage().nbytes() - saved.numel() <= 256 << 10
    one = torch.ones(())
    assert allocations(lambda: call.backward(on_host, saved, one))[0] == 2


@pytest.mark.parametrize("m", [None, 13])
@pytest.mark.parametrize("weights", [None, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("epsilon", [None, 0.1], ids=["all", "mined"])
def test_parameters_that_learn_and_weights_of_rows(on_host, epsilon, weights, m):
    """Parameters on the device of the embeddings: their gradient is there, too."""
    call = Call(m=m, dtype=torch.float64)
    factors = None if weights is None else torch.linspace(0.5, 2.0, 40).to(weights)[::2]
    call.batch = *call.batch[:6], factors
    values = torch.tensor([*FORMULA[1], 0.1], dtype=torch.float64)
    changes = {"params": [], "epsilon": epsilon, "dynamic_params": values.repeat_interleave(2)[::2]}
    found = []
    for ops in (on_host, torch.ops.dml_cuda):
        options = call.options._replace(**changes)
        loss, saved = ops.pair_loss(*call.batch, *options)
        up = torch.full((), 0.7, dtype=torch.float64)
        found.append(
            (loss, *ops.pair_loss_backward(*call.batch, *options, up, saved, True, m is not None, True))
        )
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    # Without its gradient, the same of the points.
    loss, saved = on_host.pair_loss(*call.batch, *options)
    alone = on_host.pair_loss_backward(*call.batch, *options, up, saved, True, m is not None, False)
    assert torch.equal(alone[0], found[0][1])
    assert alone[2].numel() == 0


def test_only_the_parameters_learn(on_host):
    call = Call(dtype=torch.float64)
    values = torch.tensor([*FORMULA[1], 0.1], dtype=torch.float64)
    options = call.options._replace(params=[], dynamic_params=values)
    saved = on_host.pair_loss(*call.batch, *options)[1]
    up = torch.ones((), dtype=torch.float64)
    both, alone = (
        on_host.pair_loss_backward(*call.batch, *options, up, saved, need_emb, False, True)
        for need_emb in (True, False)
    )
    assert torch.equal(both[2], alone[2])
    assert alone[0].numel() == 0


def test_a_gradient_of_no_parameters_is_an_error(on_host):
    call = Call()
    _, saved = call.forward(on_host)
    with pytest.raises(ValueError, match="need_params: expected dynamic_params"):
        on_host.pair_loss_backward(*call.batch, *call.options, torch.ones(()), saved, True, False, True)
    with pytest.raises(ValueError, match="dynamic_params: expected"):
        call.forward(on_host, params=[], dynamic_params=torch.ones(10, dtype=torch.float64))
    with pytest.raises(ValueError, match="params: expected 3 numbers"):
        call.forward(on_host, params=[], dynamic_params=torch.ones(3, dtype=torch.float64))


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


# What is set, and which precision that means.
SETTINGS = {
    "default": (lambda: None, "ieee"),
    "highest": (set_old("highest"), "ieee"),
    "high": (set_old("high"), "tf32"),
    "medium": (set_old("medium"), "tf32"),
    "new for CUDA": (set_new(cuda__matmul__fp32_precision="tf32"), "tf32"),
    "new for all": (set_new(fp32_precision="tf32", cuda__matmul__fp32_precision="none"), "tf32"),
    "new, not for CUDA": (set_new(fp32_precision="tf32", cuda__matmul__fp32_precision="ieee"), "ieee"),
    "old and new": (mixed, "ieee"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_precision_however_it_was_set(setting):
    """The older getter of torch raises in half of these."""
    change, precision = SETTINGS[setting]
    change()
    assert _C.cuda_precision() == precision


def test_precision_is_an_option(on_host):
    """Forward and backward multiply as the option says, whatever torch is set to; of float32 only."""
    call = Call(n=60, d=40)
    results = {}
    for precision in ("ieee", "tf32"):
        loss, saved = call.forward(on_host, precision=precision)
        gradient = call.backward(on_host, saved, precision=precision)[0]
        torch.set_float32_matmul_precision("high")
        again, saved = call.forward(on_host, precision=precision)
        torch.set_float32_matmul_precision("highest")
        assert torch.equal(loss, again)
        assert torch.equal(call.backward(on_host, saved, precision=precision)[0], gradient)
        results[precision] = gradient
    assert not torch.equal(results["ieee"], results["tf32"])
    for dtype in (torch.bfloat16, torch.float64):
        call = Call(dtype=dtype)
        losses = [call.forward(on_host, precision=precision)[0] for precision in ("ieee", "tf32")]
        assert torch.equal(*losses)
    with pytest.raises(ValueError, match="precision: expected ieee or tf32"):
        call.forward(on_host, precision="high")


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
    _, of_rows = call.forward(on_host, reduction="none")
    with pytest.raises(ValueError, match="grad_loss: expected 20"):
        call.backward(on_host, of_rows, torch.ones(()), reduction="none")
    # Any floating type and layout will do.
    expected = call.backward(on_host, of_rows, torch.arange(20.0), reduction="none")[0]
    strided = torch.arange(20.0, dtype=torch.float64).repeat_interleave(2)[::2]
    assert torch.equal(call.backward(on_host, of_rows, strided, reduction="none")[0], expected)


def test_no_rows_leave_references_a_gradient_of_zero(on_host):
    """Norms that nobody has written must not matter, whatever lies there."""
    call = Call(n=0, m=50)
    for _ in range(3):
        junk = torch.full((100_000,), torch.nan)
        del junk
        loss, saved = call.forward(on_host)
        assert loss == 0
        assert torch.equal(call.backward(on_host, saved)[1], torch.zeros(50, 8))
