"""The CUDA kernels on a GPU, through the ops, against the same brute force as the emulated ones."""

import pytest
import torch
from cuda_cases import ARITHMETICS, BY_NAME, CIRCLE, MS, Case, check, couples, make, partners

import dml_cuda

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not dml_cuda._C.cuda_archs,
    reason="needs a GPU, and dml_cuda built with its CUDA kernels",
)

ON_GPU = [a for a in ARITHMETICS if a.precision != "plain"]
MATMUL_PRECISION = {"full": "highest", "tf32": "high", "bf16": "medium"}
F32, F64, BF16, F16 = BY_NAME["f32"], BY_NAME["f64"], BY_NAME["bf16"], BY_NAME["f16"]


@pytest.fixture(autouse=True)
def same_precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def on_gpu(x):
    """A copy on the GPU with the same strides."""
    if x is None or x.dim() != 2:
        return None if x is None else x.cuda()
    y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
    return y.copy_(x)


def run(case, arithmetic, need_q=True, need_r=True):
    torch.set_float32_matmul_precision(MATMUL_PRECISION[arithmetic.precision])
    q, labels, r, ref_labels = map(on_gpu, (case.q, case.labels, case.r, case.ref_labels))
    loss, params = case.loss
    forward = torch.ops.dml_cuda.pair_loss
    value, *saved = forward(
        q, labels, r, ref_labels, loss, params, case.epsilon, case.normalize, case.reduction, True
    )
    upstream = torch.as_tensor(case.upstream, dtype=value.dtype).cuda().expand(value.shape)
    grads = torch.ops.dml_cuda.pair_loss_backward(
        upstream, q, labels, r, ref_labels, *saved, loss, params, case.normalize, case.reduction,
        need_q, need_r and r is not None,
    )  # fmt: skip
    shapes = [case.q.shape, case.r.shape if r is not None else (0,)]
    grads = [g.cpu() if g.shape == s and s != (0,) else None for g, s in zip(grads, shapes, strict=True)]
    return value.cpu(), grads


@pytest.mark.parametrize("loss", [MS, CIRCLE], ids=["ms", "circle"])
@pytest.mark.parametrize("epsilon", [0.1, None], ids=["mined", "all"])
@pytest.mark.parametrize(
    ("n", "m"), [(70, None), (90, 200), (300, None), (1500, None), (1300, 700), (200, 1100)]
)
@pytest.mark.parametrize("arithmetic", ON_GPU, ids=lambda a: a.name)
def test_every_kernel(arithmetic, n, m, epsilon, loss):
    case = make(n, 33, arithmetic, m=m, epsilon=epsilon if n * (m or n) < 200_000 else None, loss=loss)
    check(case, arithmetic, *run(case, arithmetic))


@pytest.mark.parametrize("n", [1000, 4200, 5000])
@pytest.mark.parametrize("arithmetic", [F32, F64, BF16], ids=lambda a: a.name)
def test_mining_at_size(arithmetic, n):
    """Similarities that are multiples of 1/32, so that no pair is near its threshold, and every pass must
    agree with every other on which pairs were kept; 4200 rows are cached, 5000 are not."""
    g = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (n, 64), generator=g) * 2.0 - 1
    labels = torch.randint(n // 4, (n,), generator=g)
    case = Case(signs.to(arithmetic.dtype), labels, epsilon=0.11)
    check(case, arithmetic, *run(case, arithmetic))


@pytest.mark.parametrize(
    ("n", "d"), [(1, 3), (2, 1), (31, 64), (33, 65), (127, 7), (129, 66), (1025, 3), (1153, 129)]
)
@pytest.mark.parametrize("arithmetic", ON_GPU, ids=lambda a: a.name)
def test_awkward_sizes(arithmetic, n, d):
    case = make(n, d, arithmetic, classes=3, loss=CIRCLE)
    check(case, arithmetic, *run(case, arithmetic))


@pytest.mark.parametrize(("offset", "gap"), [(0, 7), (1, 0), (2, 6), (3, 1), (4, 12), (8, 8)])
@pytest.mark.parametrize("n", [70, 1100])
@pytest.mark.parametrize("arithmetic", [F32, F16, F64], ids=lambda a: a.name)
def test_strides(arithmetic, n, offset, gap):
    case = make(n, 41, arithmetic, m=40, offset=offset, gap=gap)
    check(case, arithmetic, *run(case, arithmetic))


@pytest.mark.parametrize("n", [200, 1200])
@pytest.mark.parametrize("arithmetic", ON_GPU, ids=lambda a: a.name)
def test_the_same_bits_every_time(arithmetic, n):
    case = make(n, 65, arithmetic, reduction="none", upstream=torch.rand(n))
    loss, (grad, _) = run(case, arithmetic)
    for _ in range(5):
        again, (grad_again, _) = run(case, arithmetic)
        assert torch.equal(loss, again)
        assert torch.equal(grad, grad_again)


@pytest.mark.parametrize("arithmetic", ON_GPU, ids=lambda a: a.name)
def test_strips_see_one_similarity_from_both_sides(arithmetic):
    """To the bit: that a product of tensor cores does not care which operand is which is no promise of the
    hardware's, but mining in strips relies on it."""
    case = couples(1000, arithmetic)
    loss, _ = run(case, arithmetic)
    assert loss.unique().numel() > 400
    assert torch.equal(loss, loss[partners(case.labels)])


@pytest.mark.parametrize("n", [200, 1200])
def test_not_finite_and_zero_rows(n):
    case = make(n, 20, F32, epsilon=None)
    case.q[7] = 0
    loss, grads = run(case, F32)
    check(case, F32, loss, grads)
    assert not grads[0][7].any()
    case.q[3, 3] = torch.inf
    loss, grads = run(case, F32)
    assert loss.isnan()
    assert grads[0].isnan().all()


@pytest.mark.parametrize("n", [200, 1200])
def test_under_a_cuda_graph(n):
    """Nothing synchronises the host, and a replay reads the inputs anew."""
    q, labels = torch.randn(n, 48, device="cuda"), torch.randint(9, (n,), device="cuda")
    loss_name, params = MS

    def step():
        loss, *saved = torch.ops.dml_cuda.pair_loss(
            q, labels, None, None, loss_name, params, 0.1, True, "mean", True
        )
        grad, _ = torch.ops.dml_cuda.pair_loss_backward(
            torch.ones_like(loss), q, labels, None, None, *saved, loss_name, params, True, "mean", True, False
        )
        return loss, grad

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    q.copy_(torch.randn(n, 48))
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("n", "d"), [(4096, 128), (30_000, 64), (100_000, 32)])
def test_memory(n, d):
    q, labels = torch.randn(n, d, device="cuda"), torch.randint(n // 4, (n,), device="cuda")
    q.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    dml_cuda.multi_similarity_loss(q, labels, epsilon=0.1).backward()
    gradient = q.numel() * 4
    assert torch.cuda.max_memory_allocated() - before <= gradient + 64 * n + (64 << 20)
