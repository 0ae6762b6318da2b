"""Parameters that learn and weights of rows on the emulator, against the CPU's kernels in float64."""

import pytest
import torch
from cases.cuda import BY_NAME, FORMULAS, MS, NT_XENT, make, make_from_refs, of_similarity
from emulator import library

from dml_cuda import _C
from dml_cuda._ops.arguments import OpBatch, OpOptions

pytestmark = [pytest.mark.slow(200), pytest.mark.long]

F32, F64, BF16, F16, TF32 = (BY_NAME[name] for name in ("f32", "f64", "bf16", "f16", "f32_tf32"))
PATHS = {
    "matrix": {},
    "large_matrix": {"small_tile_pairs": 0, "long_row": 0, "whole_line": 0, "gradient_blocks": 6},
    "large": {"matrix_bytes": 0, "tile_group": 2, "cache_bytes": 0, "wide_blocks": 0, "line_blocks": 0},
    "cached": {"matrix_bytes": 0, "tile_group": 2, "cache_bytes": 1 << 30, "split_slots": 1},
}
by_path = pytest.mark.parametrize("path", PATHS)
by_formula = pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula[0])
# Of gradients by parameters, as norms: sums of float32 over thousands of pairs.
TOLERANCES = {"f64": 1e-11, "f32": 2e-5, "f32_tf32": 4e-3, "f16": 2e-3, "bf16": 2e-3}


def upstream_of(case):
    if case.reduction == "none":
        return torch.linspace(-1.0, 2.0, len(case.q))
    return torch.tensor([0.7, -0.3, 0.0, 0.0]) if case.return_sums else torch.tensor([-2.5])


def run(case, arithmetic, path, row_weights=None, learns=True, **options):
    """Loss, gradients by points, gradient by parameters."""
    loss, params = case.loss
    acc = torch.float64 if arithmetic is F64 else torch.float32
    engine = library.Engine(
        case.q, case.labels, case.r, case.ref_labels, case.self_index, case.num_valid_refs,
        loss=loss, params=params, epsilon=case.epsilon, similarity=case.similarity, reduction=case.reduction,
        return_sums=case.return_sums, mine_self_pair=case.mine_self_pair, precision=arithmetic.precision,
        tuning=PATHS[path], learns=learns,
        row_weights=None if row_weights is None else row_weights.to(acc), **options,
    )  # fmt: skip
    value = engine.forward()
    grads = engine.backward(upstream_of(case))
    return value, grads, engine.by_params.clone() if learns else None


def truth(case, row_weights=None):
    """The same by the CPU's kernels in float64."""
    loss, params = case.loss
    double = lambda x: None if x is None else x.double()  # noqa: E731
    values = torch.tensor([*params, case.epsilon or 0.0], dtype=torch.float64)
    batch = OpBatch(
        double(case.q), case.labels, double(case.r), case.ref_labels, case.self_index, case.num_valid_refs,
        double(row_weights),
    )  # fmt: skip
    options = OpOptions(
        loss, [], case.epsilon, case.similarity, case.reduction, case.mine_self_pair, case.return_sums,
        save_for_backward=True, dynamic_params=values,
    )  # fmt: skip
    value, saved = torch.ops.dml_cuda.pair_loss(*batch, *options)
    up = upstream_of(case).double().reshape(value.shape)
    grads = torch.ops.dml_cuda.pair_loss_backward(*batch, *options, up, saved, True, case.r is not None, True)
    return value, grads[:2], grads[2]


def verify(case, arithmetic, path, row_weights=None, **options):
    value, grads, by_params = run(case, arithmetic, path, row_weights, **options)
    expected, expected_grads, expected_by_params = truth(case, row_weights)
    if case.return_sums and not _C.formula_facts(case.loss[0])[1]["two_parts"]:
        value, expected = value[::2], expected[::2]  # without the part that there is not
    scale = max(expected.norm().item(), 1.0)
    assert (value.double() - expected).norm() <= arithmetic.loss_tolerance * scale
    for got, want in zip(grads, expected_grads, strict=True):
        if got is not None:
            assert (got.double() - want).norm() <= arithmetic.grad_tolerance * 2 * want.norm() + 1e-9
    assert by_params[-1] == 0
    error, size = (by_params - expected_by_params).abs(), expected_by_params.abs()
    assert (error <= TOLERANCES[arithmetic.name] * (size + 0.02 * scale)).all(), (
        by_params,
        expected_by_params,
    )
    return expected_by_params


@pytest.mark.check
@by_formula
def test_one_case_of_every_formula(formula):
    for path in ("matrix", "large"):
        verify(of_similarity(formula, "cosine", 40, 16, F64, m=50, epsilon=0.1), F64, path)


@pytest.mark.parametrize("epsilon", [0.1, None], ids=["mined", "all"])
@pytest.mark.parametrize("m", [None, 90], ids=["square", "rect"])
@by_path
@by_formula
def test_every_formula(formula, path, m, epsilon):
    n = 60 if path == "matrix" else 140
    by_params = verify(of_similarity(formula, "cosine", n, 16, F64, m=m, epsilon=epsilon), F64, path)
    assert by_params.abs().max() > 1e-8
    if m is None:
        verify(of_similarity(formula, "euclidean", n, 16, F64, epsilon=epsilon), F64, path)


@pytest.mark.parametrize("arithmetic", [F32, BF16, F16], ids=lambda a: a.name)
@pytest.mark.parametrize("path", ["matrix", "large_matrix", "large"])
@by_formula
def test_every_arithmetic(formula, path, arithmetic):
    n = 70 if path == "matrix" else 260  # several tiles
    verify(of_similarity(formula, "cosine", n, 24, arithmetic), arithmetic, path)
    verify(of_similarity(formula, "cosine", n, 24, arithmetic, m=150), arithmetic, path)


@pytest.mark.parametrize("reduction", ["mean", "mean_nonzero", "mean_valid", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("path", ["matrix", "large_matrix", "large"])
@by_formula
def test_reductions_and_weights_of_rows(formula, path, weighted, reduction):
    """Many classes: some rows have no positive. A tenth of the rows weighs nothing."""
    case = make(140, 12, F64, classes=60, epsilon=0.1, loss=formula)
    case.reduction = reduction
    weights = torch.linspace(0.0, 2.0, 140).where(torch.arange(140) % 10 > 0, 0.0) if weighted else None
    verify(case, F64, path, weights)


@pytest.mark.parametrize("path", ["matrix", "large_matrix", "large"])
@by_formula
def test_parts_before_they_are_divided(formula, path):
    case = make(140, 12, F64, m=60, classes=40, loss=formula)
    case.return_sums = True
    verify(case, F64, path, torch.linspace(0.5, 2.0, 140))


@by_path
def test_weights_of_rows_without_parameters(path):
    """A weight of 1 changes no bit."""
    case = make(140, 33, F32, m=150, epsilon=0.1, loss=MS)
    plain, ones = (run(case, F32, path, weights, False) for weights in (None, torch.ones(140)))
    for a, b in zip((plain[0], *plain[1]), (ones[0], *ones[1]), strict=True):
        assert torch.equal(a, b)


@by_path
@by_formula
def test_as_with_parameters_of_the_host(formula, path):
    """Loss and gradient are those of the same numbers as arguments, to the bit."""
    case = of_similarity(formula, "cosine", 140, 16, F32, epsilon=0.1)
    learned, fixed = (run(case, F32, path, learns=learns) for learns in (True, False))
    assert torch.equal(learned[0], fixed[0])
    assert torch.equal(learned[1][0], fixed[1][0])


@by_path
def test_repeatable(path):
    """Any schedule of the blocks and the threads, to the bit; and twice backward."""
    case = make(260, 20, F32, loss=NT_XENT)
    found = [
        run(case, F32, path, torch.linspace(0.5, 1.0, 260), schedule=schedule)[2]
        for schedule in (("round_robin", 0), ("warp_first", 3))
    ]
    assert torch.equal(*found)


@by_path
@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_rows(path, n):
    for loss in (MS, NT_XENT):
        for classes in (1, 3):
            verify(make(n, 5, F64, m=3, classes=classes, loss=loss), F64, path)
            verify(make(n, 5, F64, classes=classes, loss=loss), F64, path)


@by_path
def test_no_rows(path):
    case = make(3, 5, F64, loss=MS)
    case.q, case.labels = case.q[:0], case.labels[:0]
    assert (run(case, F64, path)[2] == 0).all()


@by_path
def test_rows_that_are_not_finite(path):
    case = make(140, 12, F32, loss=NT_XENT)
    case.q[33, 3] = torch.nan
    value, _, by_params = run(case, F32, path)
    assert value.isnan()
    assert by_params[0].isnan()


@by_path
def test_references(path):
    """Some are rows of the batch, some are not in use yet."""
    case = make_from_refs(130, 20, F64, m=140, loss=MS, epsilon=0.1, mine_self_pair=False)
    verify(case, F64, path, torch.linspace(0.5, 1.0, 130))
    case = make(130, 20, F64, m=140, loss=NT_XENT)
    case.num_valid_refs = torch.tensor([100])
    verify(case, F64, path)


@by_path
def test_far_apart_values(path):
    """Log-sum-exps so far apart that a tile takes an exponential for each line."""
    case = make(140, 12, F64, loss=("multi_similarity", (40.0, 900.0, 0.5)))
    case.q[70:] *= 0.01
    case.similarity = "dot"
    verify(case, F64, path)


@pytest.mark.parametrize(("path", "in_backward"), [("matrix", 1), ("large", 2), ("cached", 1)])
def test_launches(path, in_backward):
    """One more forward and one more backward; where similarities are not cached they are multiplied again."""
    case = make(140, 12, F32, loss=MS)
    counts = {}
    for learns in (False, True):
        engine = library.Engine(case.q, case.labels, tuning=PATHS[path], learns=learns)
        counts[learns] = [len(engine.launches(with_backward=backward)) for backward in (False, True)]
    more = [learned - fixed for learned, fixed in zip(counts[True], counts[False], strict=True)]
    assert more == [1, 1 + in_backward]
