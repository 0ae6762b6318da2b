"""The torch side of the CUDA ops on triplets, on CPU tensors and emulated kernels, against the CPU's ops."""

import itertools
import math

import pytest
import torch
from cases.triplets import Case
from emulator import torch_side
from oracle.triplet_ops import INF, NEGATIVES, SIMILARITIES, TERMS, params

pytestmark = pytest.mark.long

CPU = torch.ops.dml_cuda


@pytest.fixture(scope="module")
def on_host():
    torch_side.load("triplets")
    return torch.ops.dml_cuda_on_host


def check(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        scale = max(1.0, float(b.double().abs().max())) if b.numel() and b.isfinite().all() else 1.0
        assert torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def loss_arguments(case, term="hinge", negatives="all", save_ref=True):
    numbers = params(gap=(-INF, 0.2))
    return (
        *case.points(),
        case.of_rows(term),
        case.seed,
        term,
        "all",
        negatives,
        numbers,
        case.similarity,
        True,
        save_ref,
    )


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_loss(on_host, negatives, similarity):
    for term, m in itertools.product(TERMS, (None, 40)):
        case = Case(n=20, m=m, similarity=similarity)
        arguments = loss_arguments(case, term, negatives)
        check(on_host.triplet_loss(*arguments), CPU.triplet_loss(*arguments), 1e-10)


def test_references_that_do_not_take_part(on_host):
    for similarity in SIMILARITIES:
        case = Case(n=20, m=40, similarity=similarity)
        case.num_valid_refs, case.self_index = torch.tensor(31), torch.randint(-1, 40, (20,))
        case.y[31:] = math.nan
        for save_ref in (True, False):
            arguments = loss_arguments(case, save_ref=save_ref)
            check(on_host.triplet_loss(*arguments), CPU.triplet_loss(*arguments), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes(on_host, dtype):
    for similarity in SIMILARITIES:
        arguments = loss_arguments(Case(n=12, dtype=dtype, similarity=similarity), "softplus")
        check(on_host.triplet_loss(*arguments), CPU.triplet_loss(*arguments), 1e-4)


def test_odd_batches(on_host):
    for (n, m), similarity in itertools.product(((0, None), (0, 5), (5, 0), (1, None)), SIMILARITIES):
        arguments = loss_arguments(Case(n=n, m=m, similarity=similarity))
        check(on_host.triplet_loss(*arguments), CPU.triplet_loss(*arguments), 1e-10)


def test_not_finite(on_host):
    case = Case(n=12)
    case.x[3, 1] = INF
    arguments = loss_arguments(case)
    check(on_host.triplet_loss(*arguments)[::2], CPU.triplet_loss(*arguments)[::2], 1e-10)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_select(on_host, similarity):
    case = Case(n=30, similarity=similarity)
    pairs = (case.labels[:, None] == case.labels).nonzero().T.contiguous()
    for rule in ("hardest_positive", "easiest_negative", "semihard_negative", "drawn_negative"):
        arguments = *case.points(), case.seed, rule, params(), *pairs, similarity
        check(on_host.select(*arguments), CPU.select(*arguments), 1e-10)
    arguments = *case.points(), None, "hardest_negative", params(), None, None, similarity
    check(on_host.select(*arguments), CPU.select(*arguments), 1e-10)


@pytest.mark.parametrize(
    "rule", ["hardest_positive", "easiest_negative", "semihard_negative", "drawn_negative"]
)
def test_select_for_no_pair(on_host, rule):
    """The pointer of an empty list is null, which must not stand for "one for each row"."""
    case = Case(n=30)
    nothing = torch.empty(0, dtype=torch.long)
    assert nothing.data_ptr() == 0
    arguments = *case.points(), case.seed, rule, params(), nothing, nothing, "euclidean"
    for ops in (on_host, CPU):
        columns, similarities = ops.select(*arguments)
        assert columns.shape == similarities.shape == (0,)
