"""The CUDA kernels on a GPU, through the ops, against the same brute force as the emulated ones."""

from dataclasses import replace

import pytest
import torch
from cases.cuda import (
    ARITHMETICS,
    BY_NAME,
    CIRCLE,
    FORMULAS,
    MS,
    Case,
    check,
    make,
    make_from_refs,
    of_similarity,
    relative_error,
)
from cases.losses import LOSSES

import dml_cuda
from dml_cuda._ops.arguments import OpOptions
from dml_cuda.functional import multi_similarity_loss

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not dml_cuda._C.cuda_archs,
    reason="needs a GPU, and dml_cuda built with its CUDA kernels",
)

MATMUL_PRECISION = {"full": "highest", "tf32": "high"}
F32, F64, BF16, F16 = BY_NAME["f32"], BY_NAME["f64"], BY_NAME["bf16"], BY_NAME["f16"]

# nvcc compiles these, the emulator all.
COMPILED = [f for f in FORMULAS if f[0] not in LOSSES or LOSSES[f[0]].module.formula.on_cuda]


@pytest.fixture(autouse=True)
def same_precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def on_gpu(x):
    """A copy on the GPU, with what lies around it in memory: as far from aligned and amid NaN."""
    if x is None:
        return None
    everything = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return everything.cuda().as_strided(x.shape, x.stride(), x.storage_offset())


def run(case, arithmetic, need_q=True, need_r=True):
    torch.set_float32_matmul_precision(MATMUL_PRECISION[arithmetic.precision])
    sides = case.q, case.labels, case.r, case.ref_labels, case.self_index, case.num_valid_refs, None
    options = OpOptions(
        *case.loss, case.epsilon, case.similarity, case.reduction, case.mine_self_pair, case.return_sums,
        False, dml_cuda._C.cuda_precision(), save_for_backward=True,
    )  # fmt: skip
    arguments = *map(on_gpu, sides), *options
    value, saved = torch.ops.dml_cuda.pair_loss(*arguments)
    upstream = torch.as_tensor(case.upstream, dtype=value.dtype).cuda().expand(value.shape)
    wanted = [need_q, need_r and case.r is not None]
    # What backward multiplies is what forward saw, whatever has been asked for since.
    torch.set_float32_matmul_precision("highest")
    grads = torch.ops.dml_cuda.pair_loss_backward(*arguments, upstream, saved, *wanted, False)[:2]
    return value.cpu(), [g.cpu() if needed else None for g, needed in zip(grads, wanted, strict=True)]


@pytest.mark.parametrize("loss", [MS, CIRCLE], ids=["ms", "circle"])
@pytest.mark.parametrize("epsilon", [0.1, None], ids=["mined", "all"])
@pytest.mark.parametrize(
    ("n", "m"), [(70, None), (90, 200), (300, None), (1500, None), (1300, 700), (200, 1100)]
)
@pytest.mark.parametrize("arithmetic", ARITHMETICS, ids=lambda a: a.name)
def test_every_kernel(arithmetic, n, m, epsilon, loss):
    case = make(n, 33, arithmetic, m=m, epsilon=epsilon if n * (m or n) < 200_000 else None, loss=loss)
    check(case, arithmetic, *run(case, arithmetic))


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "euclidean_raw"])
@pytest.mark.parametrize("epsilon", [0.1, None], ids=["mined", "all"])
@pytest.mark.parametrize(("n", "m"), [(70, None), (90, 200), (1100, None)])
@pytest.mark.parametrize("arithmetic", [F64, F32, BF16], ids=lambda a: a.name)
@pytest.mark.parametrize("formula", COMPILED, ids=lambda formula: formula[0])
def test_every_formula(formula, arithmetic, n, m, epsilon, similarity):
    case = of_similarity(formula, similarity, n, 24, arithmetic, m=m, epsilon=epsilon if n < 1000 else None)
    check(case, arithmetic, *run(case, arithmetic))


@pytest.mark.parametrize("reduction", ["mean", "mean_nonzero", "mean_valid", "sum"])
@pytest.mark.parametrize("n", [140, 1100])
@pytest.mark.parametrize("formula", COMPILED, ids=lambda formula: formula[0])
def test_sums_and_counts_before_they_are_divided(formula, n, reduction):
    case = make(n, 12, F64, m=60, classes=40, loss=formula, reduction=reduction)
    case.return_sums, case.upstream = True, torch.tensor([0.7, -0.3, 5.0, 5.0], dtype=torch.float64)
    check(case, F64, *run(case, F64))


def test_what_backward_is_given_is_checked():
    case = make(70, 8, F32)
    q, labels = case.q.cuda(), case.labels.cuda()
    arguments = q, labels, None, None, None, None, None, *OpOptions(*MS, save_for_backward=True)
    loss, saved = torch.ops.dml_cuda.pair_loss(*arguments)

    def backward(grad_loss, saved):
        torch.ops.dml_cuda.pair_loss_backward(*arguments, grad_loss, saved, True, False, False)

    backward(torch.ones_like(loss), saved)
    for grad_loss in (torch.ones(()), torch.ones(2, device="cuda")):
        with pytest.raises(ValueError, match="grad_loss"):
            backward(grad_loss, saved)
    for wrong in (saved.cpu(), saved[:-16], saved.char(), saved.repeat_interleave(2)[::2], saved[None]):
        with pytest.raises(ValueError, match="saved"):
            backward(torch.ones_like(loss), wrong)


@pytest.mark.parametrize("n", [1000, 2900, 4100])
@pytest.mark.parametrize("arithmetic", [F32, F64, BF16], ids=lambda a: a.name)
def test_mining_at_size(arithmetic, n):
    """Similarities that are multiples of 1/32, so that no pair is near its threshold, and every pass must
    agree with every other on which pairs were kept; of 2900 rows all tiles are cached, of 4100 none."""
    g = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (n, 64), generator=g) * 2.0 - 1
    labels = torch.randint(n // 4, (n,), generator=g)
    case = Case(signs.to(arithmetic.dtype), labels, epsilon=0.11)
    check(case, arithmetic, *run(case, arithmetic))


@pytest.mark.parametrize(
    ("n", "d"), [(1, 3), (2, 1), (31, 64), (33, 65), (127, 7), (129, 66), (1025, 3), (1153, 129)]
)
@pytest.mark.parametrize("arithmetic", ARITHMETICS, ids=lambda a: a.name)
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
@pytest.mark.parametrize("arithmetic", ARITHMETICS, ids=lambda a: a.name)
def test_the_same_bits_every_time(arithmetic, n):
    case = make(n, 65, arithmetic, reduction="none", upstream=torch.rand(n))
    loss, (grad, _) = run(case, arithmetic)
    for _ in range(5):
        again, (grad_again, _) = run(case, arithmetic)
        assert torch.equal(loss, again)
        assert torch.equal(grad, grad_again)


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
    arguments = q, labels, None, None, None, None, None, *OpOptions(*MS, 0.1, save_for_backward=True)

    def step():
        loss, saved = torch.ops.dml_cuda.pair_loss(*arguments)
        given = torch.ones_like(loss), saved, True, False, False
        grad, *_ = torch.ops.dml_cuda.pair_loss_backward(*arguments, *given)
        return loss, grad

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    q.copy_(torch.randn(n, 48))
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "d"), [(4096, 128), (4096, 1024), (30_000, 512), (100_000, 32)])
def test_memory(n, d, dtype):
    q, labels = torch.randn(n, d, device="cuda", dtype=dtype), torch.randint(n // 4, (n,), device="cuda")
    q.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    multi_similarity_loss(q, labels, epsilon=0.1).backward()
    gradient = q.numel() * q.element_size()
    assert torch.cuda.max_memory_allocated() - before <= gradient + 64 * n + (64 << 20)


@pytest.mark.parametrize("m", [None, 15_000], ids=["square", "rect"])
@pytest.mark.parametrize("arithmetic", [F16, BF16], ids=lambda a: a.name)
def test_sums_in_several_groups(arithmetic, m):
    """More rows than are summed at once, against float32, which sums in place."""
    q = torch.randn(20_000, 1024).to(arithmetic.dtype)
    case = Case(q, torch.arange(20_000) // 4, reduction="sum")  # a mean's gradients are too small for float16
    if m is not None:
        case.r, case.ref_labels = torch.randn(m, 1024).to(arithmetic.dtype), torch.arange(m) // 3
    wide = replace(case, q=case.q.float(), r=None if m is None else case.r.float())
    (loss, grads), (truth, true_grads) = run(case, arithmetic), run(wide, F32)
    assert relative_error(loss, truth.double()) <= 1e-4
    for grad, true_grad in zip(grads, true_grads, strict=True):
        if grad is not None:
            assert relative_error(grad, true_grad.double()) <= arithmetic.grad_tolerance


@pytest.mark.parametrize("loss", [MS, CIRCLE], ids=["ms", "circle"])
@pytest.mark.parametrize("epsilon", [0.1, None], ids=["mined", "all"])
@pytest.mark.parametrize("some", [False, True], ids=["every_row", "some_rows"])
@pytest.mark.parametrize(("n", "m"), [(50, 70), (40, 1100)])
@pytest.mark.parametrize("arithmetic", [F32, F64, BF16], ids=lambda a: a.name)
def test_a_row_that_is_itself_among_the_references(arithmetic, n, m, some, epsilon, loss):
    case = make_from_refs(n, 20, arithmetic, m=m, some=some, epsilon=epsilon, loss=loss)
    case.reduction = "mean_valid"
    check(case, arithmetic, *run(case, arithmetic))


@pytest.mark.parametrize("count", [0, 37, 1030, 5000])
@pytest.mark.parametrize(("n", "m"), [(50, 70), (40, 1100), (1100, 1100)])
@pytest.mark.parametrize("arithmetic", [F32, F64, BF16], ids=lambda a: a.name)
def test_the_first_references_only(arithmetic, n, m, count):
    case = make_from_refs(n, 20, arithmetic, m=m, some=True, loss=CIRCLE)
    case.num_valid_refs = torch.tensor(count)
    case.r[count:] = torch.nan
    check(case, arithmetic, *run(case, arithmetic))


# ---- pairs given as lists -------------------------------------------------------------------------------

by_float = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@by_float
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("d", [1, 4, 31, 128, 513])
def test_listed_pairs(d, offset, dtype):
    n, m, pairs = 3000, 2000, 100_000
    x, y = (torch.randn(count * d + offset, dtype=dtype)[offset:].view(count, d) for count in (n, m))
    rows, cols = torch.randint(n, (pairs,)).sort().values, torch.randint(m, (pairs,))
    offsets = torch.searchsorted(rows, torch.arange(n + 1))
    there = [on_gpu(t) for t in (x, y, rows, cols, offsets)]
    products = torch.ops.dml_cuda.pair_products(*there)
    truth = (x.double()[rows] * y.double()[cols]).sum(1)
    eps = torch.finfo(dtype).eps
    assert relative_error(products.cpu(), truth) <= 8 * eps
    sums = torch.ops.dml_cuda.pair_sums(products, there[1], there[3], there[4])
    truth = torch.zeros(n, d, dtype=torch.float64)
    truth.index_add_(0, rows, products.cpu().double()[:, None] * y.double()[cols])
    assert relative_error(sums.cpu(), truth) <= 8 * eps
    for plus_one in (False, True):
        logs = torch.ops.dml_cuda.segment_logsumexp(products, there[4], plus_one)
        segments = products.cpu().double().split(offsets.diff().tolist())
        one = torch.zeros(int(plus_one), dtype=torch.float64)
        truth = torch.stack([torch.logsumexp(torch.cat([s, one]), 0) for s in segments])
        assert torch.allclose(logs.cpu().double(), truth, 8 * eps, 8 * eps)
        weights = torch.ops.dml_cuda.segment_softmax(torch.ones_like(logs), products, logs, there[4])
        truth = torch.cat([torch.exp(s - x) for s, x in zip(segments, truth, strict=True)])
        assert torch.allclose(weights.cpu().double(), truth, 256 * eps, eps)
    assert torch.equal(products, torch.ops.dml_cuda.pair_products(*there))
    assert torch.equal(sums, torch.ops.dml_cuda.pair_sums(products, there[1], there[3], there[4]))


@by_float
def test_listed_indices_out_of_range(dtype):
    x = torch.ones(3, 8, device="cuda", dtype=dtype)
    rows, cols = torch.tensor([[0, 0, 1, 2], [0, 3, -1, 2**62]], device="cuda")
    offsets = torch.tensor([0, 2, 3, 4], device="cuda")
    products = torch.ops.dml_cuda.pair_products(x, x, rows, cols, offsets)
    assert products.isnan().tolist() == [False, True, True, True]
    sums = torch.ops.dml_cuda.pair_sums(torch.zeros_like(products), x, cols, offsets)
    assert sums.isnan().all()
