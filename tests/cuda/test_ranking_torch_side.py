"""The torch side of the CUDA op on ranks, on CPU tensors and emulated kernels, against the CPU's op."""

import itertools
import math

import pytest
import torch
from cases.ranking import EVERY_RANKING
from cases.triplets import Case
from emulator import torch_side

pytestmark = pytest.mark.long

CPU = torch.ops.dml_cuda


@pytest.fixture(scope="module")
def on_host():
    torch_side.load("triplets")
    return torch.ops.dml_cuda_on_host


def check(on_host, arguments, tolerance=1e-10):
    results = on_host.ranking_loss(*arguments), CPU.ranking_loss(*arguments)
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        scale = max(1.0, float(b.double().abs().max())) if b.numel() and b.isfinite().all() else 1.0
        assert torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def arguments_of(case, loss, weighted=True, dynamic=True, save=True, save_ref=True, **values):
    weights = torch.linspace(0.5, 2, len(case.x)) if weighted else None
    params = loss.module.formula.params({**loss.defaults, **loss.smooth, **values}, "cosine")
    numbers = torch.tensor(params, dtype=torch.float64) if dynamic else None
    how = loss.name, [] if dynamic else params, case.similarity, save, save_ref, dynamic
    return *case.points(), weights, numbers, *how


@EVERY_RANKING
def test_loss(on_host, loss):
    for similarity, m, plain in itertools.product(loss.similarities, (None, 40), (False, True)):
        case = Case(n=20, m=m, similarity=similarity)
        check(on_host, arguments_of(case, loss, not plain, not plain))


@EVERY_RANKING
def test_references_that_do_not_take_part(on_host, loss):
    case = Case(n=20, m=40, similarity="cosine")
    case.num_valid_refs, case.self_index = torch.tensor(31), torch.randint(-1, 40, (20,))
    case.y[31:] = math.nan
    for save_ref in (True, False):
        check(on_host, arguments_of(case, loss, save_ref=save_ref))


@EVERY_RANKING
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes(on_host, loss, dtype):
    check(on_host, arguments_of(Case(n=12, dtype=dtype, similarity="cosine"), loss), 1e-4)


@EVERY_RANKING
def test_odd_batches(on_host, loss):
    for n, m in ((0, None), (0, 5), (5, 0), (1, None)):
        for save in (True, False):
            check(on_host, arguments_of(Case(n=n, m=m, similarity="cosine"), loss, dynamic=save, save=save))


@EVERY_RANKING
def test_not_finite(on_host, loss):
    case = Case(n=12, similarity="cosine")
    case.x[3, 1] = math.inf
    losses, _, by_emb, _, by_params = on_host.ranking_loss(*arguments_of(case, loss))
    assert losses.isnan().all()
    assert by_emb.isnan().all()
    assert by_params.isnan().any() or loss.name == "fast_ap"


def test_a_temperature_that_went_wrong(on_host):
    from cases.ranking import RANKINGS

    case = Case(n=12, similarity="cosine")
    for value in (0.0, math.nan):
        arguments = arguments_of(case, RANKINGS["smooth_ap"], temperature=value)
        assert on_host.ranking_loss(*arguments)[0][CPU.ranking_loss(*arguments)[1][:, 1] > 0].isnan().all()
