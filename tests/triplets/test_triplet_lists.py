"""The op on triplets given as long lists, against every triplet in float64; and when it is used."""

import math

import pytest
import torch
from oracle.triplet_ops import SIMILARITIES, TERMS, similarities

from dml_cuda._ops import listed_triplets
from dml_cuda._ops.autograd import call
from dml_cuda.functional import margin_loss, triplet_margin_loss

OPS = torch.ops.dml_cuda


class Case:
    """Points, and triplets with repetitions and with anchors that have none."""

    def __init__(self, n=20, m=None, count=400, dim=6, dtype=torch.float64, similarity="euclidean"):
        random = torch.Generator().manual_seed(0)
        self.x = torch.randn(n, dim, generator=random, dtype=torch.float64).to(dtype)
        self.y = None if m is None else torch.randn(m, dim, generator=random, dtype=torch.float64).to(dtype)
        columns = n if m is None else m
        self.anchors = torch.randint(max(n - 3, 1), (count,), generator=random)
        self.positives = torch.randint(max(columns, 1), (count,), generator=random)
        self.negatives = torch.randint(max(columns, 1), (count,), generator=random)
        self.there = None
        self.row_margins = False
        self.row_params = (torch.rand(n, generator=random, dtype=torch.float64) + 0.7).to(dtype)
        self.similarity = similarity

    def of_rows(self, term):
        return self.row_params if term == "margin" or self.row_margins else None

    def arguments(self, term, margin=0.1, save=True, save_ref=True):
        lists = self.anchors, self.positives, self.negatives, self.there
        return self.x, self.y, *lists, self.of_rows(term), term, margin, self.similarity, save, save_ref

    def truth(self, term, margin=0.1):
        x = self.x.double().requires_grad_()
        y = x if self.y is None else self.y.double().requires_grad_()
        of_rows = self.row_params.double().requires_grad_()
        d = -similarities(x, y, self.similarity)
        lists = self.anchors, self.positives, self.negatives
        if self.there is not None:
            lists = [each[self.there] for each in lists]
        a, p, n = lists
        sums, counts = torch.zeros(len(x), dtype=torch.float64), torch.zeros(len(x), 2, dtype=torch.int64)
        if term == "margin":
            terms = torch.stack([d[a, p] - of_rows[a] + margin, of_rows[a] - d[a, n] + margin], 1).relu()
        else:
            violation = d[a, p] - d[a, n] + (of_rows[a] if self.row_margins else margin)
            smooth = torch.logaddexp(violation, 0 * violation)  # F.softplus is linear from 20 on
            terms = (violation.relu() if term == "hinge" else smooth)[:, None]
        sums = sums.index_add(0, a, terms.sum(1))
        counts[:, 0].index_add_(0, a, (terms > 0).sum(1))
        counts[:, 1].index_add_(0, a, torch.ones_like(a))
        leaves = [x, *([] if self.y is None else [y]), *([of_rows] if self.of_rows(term) is not None else [])]
        return sums.detach(), counts, *torch.autograd.grad(sums.sum(), leaves)

    def check(self, term, tolerance=1e-10, exact_counts=True):
        found = OPS.triplet_list_loss(*self.arguments(term))
        wanted = [True, True, True, self.y is not None, self.of_rows(term) is not None]
        found = [x for x, is_wanted in zip(found, wanted, strict=True) if is_wanted]
        expected = self.truth(term)
        for k, (a, b) in enumerate(zip(found, expected, strict=True)):
            if k == 1:
                assert a.equal(b) or not exact_counts
                continue
            assert a.dtype == (torch.float64 if self.x.dtype == torch.float64 else torch.float32)
            scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
            torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("term", TERMS)
def test_every_term(term, similarity):
    for m in (None, 31):
        case = Case(m=m, similarity=similarity)
        for case.row_margins in (False, True):
            case.check(term)


@pytest.mark.parametrize("term", TERMS)
def test_some_do_not_count(term):
    case = Case(m=31)
    case.there = torch.rand(len(case.anchors)) < 0.6
    case.positives[~case.there] = -1  # as a draw without a positive leaves it
    case.check(term)


@pytest.mark.parametrize("term", TERMS)
def test_distance_zero(term):
    """An anchor as its own positive, and a copy of it: the distance's derivative is 0 there."""
    for similarity in ("euclidean", "euclidean_raw"):
        case = Case(similarity=similarity)
        case.positives[::3] = case.anchors[::3]
        case.x[5] = case.x[2]
        case.positives[case.anchors == 2] = 5
        case.check(term)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("term", TERMS)
def test_other_dtypes(term, similarity, dtype):
    Case(m=31, dtype=dtype, similarity=similarity).check(term, tolerance=2e-5, exact_counts=False)


def test_the_order_within_an_anchor_alone_matters():
    """Sums are those of the list, anchor by anchor: another order of anchors changes no bit."""
    case = Case(n=700, count=100_000, dtype=torch.float32)
    before = OPS.triplet_list_loss(*case.arguments("softplus"))
    order = case.anchors.argsort(stable=True)
    case.anchors, case.positives, case.negatives = (
        each[order] for each in (case.anchors, case.positives, case.negatives)
    )
    after = OPS.triplet_list_loss(*case.arguments("softplus"))
    assert all(a.equal(b) for a, b in zip(before, after, strict=True))


def test_no_triplets():
    for n, m in ((5, None), (5, 4), (0, None), (0, 3), (3, 0)):
        Case(n=n, m=m, count=0).check("hinge")


def test_hinges_that_are_just_closed():
    """A violation of exactly 0 is no term, and has no derivative."""
    case = Case(similarity="dot", dim=2)
    case.x = torch.randint(-2, 3, case.x.shape).double()
    for term in ("hinge", "margin"):
        case.row_params = torch.randint(-1, 2, case.row_params.shape).double()
        arguments = list(case.arguments(term, margin=1.0))
        _, counts, gradient, *_ = OPS.triplet_list_loss(*arguments)
        _, true_counts, true_gradient, *_ = case.truth(term, margin=1.0)
        assert counts.equal(true_counts)
        torch.testing.assert_close(gradient, true_gradient)


def test_many_columns():
    """So many that the rows go in several blocks."""
    case = Case(n=40, m=300_000, count=5000, dim=3)
    case.check("hinge", tolerance=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("term", TERMS)
def test_threads_do_not_change_a_bit(term, dtype):
    for case in (Case(n=700, count=200_000, dtype=dtype), Case(n=90, m=9000, count=50_000, dtype=dtype)):
        case.anchors[: len(case.anchors) // 2] = 0  # one anchor has half of all
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(OPS.triplet_list_loss(*case.arguments(term)))
        for other in results[1:]:
            assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("m", [None, 14])
def test_derivatives(term, m):
    case = Case(n=10, m=m, count=60, dtype=torch.float64)
    case.row_margins = True
    leaves = [x.requires_grad_() for x in (case.x, case.y, case.row_params) if x is not None]
    assert torch.autograd.gradcheck(
        lambda *_: call("triplet_list_loss", *case.arguments(term))[0].sum(), leaves
    )
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(OPS.triplet_list_loss.default, case.arguments(term), test_utils=checks)
    sums, counts, gradient, *_ = OPS.triplet_list_loss(*case.arguments(term))
    assert sums.requires_grad
    assert not counts.requires_grad
    assert not gradient.requires_grad
    with pytest.raises(RuntimeError, match="weighted apart"):
        (sums * torch.arange(10)).sum().backward()


def test_not_finite():
    case = Case()
    case.x[3, 2] = math.inf
    sums, _, gradient, *_ = OPS.triplet_list_loss(*case.arguments("hinge"))
    assert sums.isnan().all()
    assert gradient.isnan().all()


def test_bad_input():
    case = Case(n=6, m=9, count=20)
    names = "x y anchors positives negatives there row_params term margin similarity save save_ref"

    def run(**changed):
        good = dict(zip(names.split(), case.arguments("hinge"), strict=True))
        return OPS.triplet_list_loss(*(good | changed).values())

    for changed, message in (
        ({"anchors": case.anchors.int()}, "anchors: expected Long"),
        ({"positives": case.positives[1:]}, "positives: expected one for each"),
        ({"there": case.anchors}, "there: expected Bool"),
        ({"term": "huber"}, "term: expected"),
        ({"term": "margin"}, "row_params: expected"),
        ({"similarity": "manhattan"}, "similarity"),
        ({"y": case.y[:, 1:]}, "ref_emb: expected 6 columns"),
        ({"y": case.y.float()}, "ref_emb: expected Double"),
        ({"x": case.x[0]}, "embeddings: expected a 2-D"),
    ):
        with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
            run(**changed)
    for name, wrong in (("anchors", 6), ("positives", 9), ("negatives", -1)):
        index = getattr(case, name).clone()
        index[-1 if wrong > 0 else 0] = wrong
        with pytest.raises(IndexError, match=name):
            run(**{name: index})


# ---- when it is used --------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["ascending", "any"])
@pytest.mark.parametrize("references", [False, True])
def test_long_lists_of_the_losses(order, references, monkeypatch):
    """They take it, and differ from the composition of the ops on pairs by rounding alone."""
    case = Case(n=24, m=30 if references else None, count=2000)
    shuffled = torch.arange(2000) if order == "any" else case.anchors.argsort(stable=True)
    indices = tuple(each[shuffled] for each in (case.anchors, case.positives, case.negatives))
    for loss, options in (
        (triplet_margin_loss, {"margin": 0.2}),
        (triplet_margin_loss, {"smooth_loss": True, "reduction": "mean"}),
        (margin_loss, {"beta": torch.tensor([1.1], dtype=torch.float64, requires_grad=True)}),
    ):
        results = []
        for long in (True, False):
            monkeypatch.setattr(listed_triplets, "_PAIRS_PER_TRIPLET", 16 if long else 0)
            leaves = [x.clone().requires_grad_() for x in (case.x, case.y) if x is not None]
            leaves += [x for x in options.values() if torch.is_tensor(x)]
            refs = leaves[1] if references else None
            value = loss(leaves[0], indices_tuple=indices, ref_emb=refs, **options)
            results.append((value.detach(), *torch.autograd.grad(value, leaves)))
        torch.testing.assert_close(*results)


def test_what_it_lacks_is_left_to_the_ops_on_pairs(monkeypatch):
    case = Case(count=2000)
    indices = case.anchors, case.positives, case.negatives
    monkeypatch.setattr(listed_triplets, "_long_sums", lambda *_: pytest.fail("used"))
    for options in ({"swap": True}, {"reduction": "none"}, {"backend": "reference"}):
        triplet_margin_loss(case.x, indices_tuple=indices, **options)
    few = tuple(each[:20] for each in indices)
    triplet_margin_loss(case.x, indices_tuple=few)
    with pytest.raises(pytest.fail.Exception):
        triplet_margin_loss(case.x, indices_tuple=indices)


def test_compiled():
    case = Case(n=24, count=2000, dtype=torch.float32)

    def loss(x, a, p, n):
        return triplet_margin_loss(x, indices_tuple=(a, p, n))

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (2000, 1700):
        results = []
        for function in (loss, compiled):
            x = case.x.clone().requires_grad_()
            value = function(x, case.anchors[:count], case.positives[:count], case.negatives[:count])
            results.append((value.detach(), *torch.autograd.grad(value, x)))
        torch.testing.assert_close(*results)
