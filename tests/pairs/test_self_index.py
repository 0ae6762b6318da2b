"""A row that is itself among the references, and references of which only the first take part."""

import pytest
import torch
from cases.accuracy import FUNCTIONS, assert_as_accurate
from cases.data import make_labels, make_points

from dml_cuda import MinedPairs, functional
from dml_cuda._ops.arguments import OpOptions

EVERY = pytest.mark.parametrize("loss", FUNCTIONS)
EPSILON = pytest.mark.parametrize("epsilon", [None, 0.1])


def make_queue(n, m, dim, kind="few", dtype=torch.float64, spread=1.0):
    """A batch, references that hold copies of most of its rows, and where: -1 for those without."""
    labels, ref_labels = make_labels(n, kind), make_labels(m, kind)
    points = make_points(torch.cat([labels, ref_labels]), dim, dtype, spread)
    embeddings, ref_emb = points[:n], points[n:].clone()
    own = torch.full((n,), -1)
    rows, places = torch.randperm(n)[: min(n, m) * 3 // 4], torch.randperm(m)[: min(n, m) * 3 // 4]
    own[rows] = places
    ref_emb[places], ref_labels[places] = embeddings[rows], labels[rows]
    return embeddings, labels, ref_emb, ref_labels, own


def evaluate(loss, batch, epsilon, own=None, count=None, *, reduction="mean", backend="fused", upstream=None):
    """Loss and the gradients to both sides."""
    embeddings, labels, ref_emb, ref_labels = batch
    leaves = [x.detach().clone().requires_grad_() for x in (embeddings, ref_emb)]
    count = None if count is None else torch.tensor(count)
    rule = {"epsilon": epsilon, "self_index": own, "num_valid_refs": count}
    pairs = MinedPairs(leaves[0], labels, leaves[1], ref_labels, **rule)
    function = getattr(functional, FUNCTIONS[loss])
    options = {"indices_tuple": pairs, "ref_emb": leaves[1], "reduction": reduction, "backend": backend}
    value = function(leaves[0], labels, **options)
    upstream = torch.ones_like(value) if upstream is None else upstream.to(value)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


def check(loss, batch, epsilon, *own, **options):
    fused = evaluate(loss, batch, epsilon, *own, **options)
    plain = evaluate(loss, batch, epsilon, *own, **options, backend="reference")
    doubles = [x.double() if x.is_floating_point() else x for x in batch]
    truth = evaluate(loss, doubles, epsilon, *own, **options, backend="reference")
    names = ("loss", "gradient", "gradient to ref_emb")
    for what, a, r, t in zip(names, fused, plain, truth, strict=True):
        assert_as_accurate(what, a, r, t)
    return fused


@EVERY
@EPSILON
@pytest.mark.parametrize("kind", ["few", "one", "distinct", "unequal"])
def test_own_rows(loss, epsilon, kind, instruction_set):
    for n, m, dim in ((1, 1, 4), (5, 5, 3), (40, 130, 9), (150, 33, 16), (140, 300, 31)):
        *batch, own = make_queue(n, m, dim, kind)
        check(loss, batch, epsilon, own)


@EVERY
@EPSILON
@pytest.mark.parametrize("reduction", ["mean", "mean_nonzero", "mean_valid", "sum", "none"])
def test_reductions(loss, epsilon, reduction):
    # Near each other: PyTorch takes the loss of a row whose similarities are far below the base for 0.
    embeddings, labels, ref_emb, ref_labels, own = make_queue(60, 140, 9)
    batch = embeddings + 1, labels, ref_emb + 1, ref_labels
    upstream = torch.randn(60, dtype=torch.float64) if reduction == "none" else None
    fused = check(loss, batch, epsilon, own, 120, reduction=reduction, upstream=upstream)
    assert all(x.abs().max() > 0 for x in fused)


@EVERY
@EPSILON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(loss, epsilon, dtype):
    """Coordinates of which no product is rounded: every dtype mines the same pairs."""
    *batch, own = make_queue(60, 140, 6)
    batch = [torch.round(x).clamp(-2, 2).to(dtype) if x.is_floating_point() else x for x in batch]
    epsilon = None if epsilon is None else 0.1003  # no two cosines of such points are that far apart
    check(loss, batch, epsilon, own, 100)


@EVERY
@EPSILON
@pytest.mark.parametrize("count", [0, 1, 77, 128, 129, 300])
def test_first_references_only(loss, epsilon, count):
    """As if the others were not there: their numbers do not matter, and their gradient is 0."""
    embeddings, labels, ref_emb, ref_labels, own = make_queue(50, 300, 9)
    ref_emb[count:] = float("nan")
    found = evaluate(loss, (embeddings, labels, ref_emb, ref_labels), epsilon, own, count)
    cut = embeddings, labels, ref_emb[:count], ref_labels[:count]
    expected = evaluate(loss, cut, epsilon, torch.where(own < count, own, -1))
    torch.testing.assert_close(found[:2], expected[:2], rtol=0, atol=0)
    torch.testing.assert_close(found[2][:count], expected[2], rtol=0, atol=0)
    assert (found[2][count:] == 0).all()


@EVERY
def test_what_the_own_row_changes(loss):
    """Mining sees the own row, which is its hardest rival's bound; the loss does not."""
    embeddings = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    angles = torch.tensor([0.0, 0.2, 0.7, 1.2], dtype=torch.float64)
    refs = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels, ref_labels = torch.tensor([0]), torch.tensor([0, 0, 1, 1])
    batch, own = (embeddings, labels, refs, ref_labels), torch.tensor([0])
    function = getattr(functional, FUNCTIONS[loss])

    def listed(positives, negatives):
        lists = [torch.zeros(len(positives)), positives, torch.zeros(len(negatives)), negatives]
        return function(embeddings, indices_tuple=[torch.as_tensor(x).long() for x in lists], ref_emb=refs)

    torch.testing.assert_close(evaluate(loss, batch, None, own)[0], listed([1], [2, 3]))
    torch.testing.assert_close(evaluate(loss, batch, None)[0], listed([0, 1], [2, 3]))
    # cos: 1, 0.98, 0.76, 0.36. With epsilon 0.23 the positive at 0.98 is kept, the own row would not be.
    torch.testing.assert_close(evaluate(loss, batch, 0.23, own)[0], listed([1], [2]))
    # With 0.65 all are, but for the own row.
    torch.testing.assert_close(evaluate(loss, batch, 0.65, own)[0], listed([1], [2, 3]))


@EVERY
@EPSILON
def test_rows_whose_only_positive_is_themselves(loss, epsilon):
    """Its positive bounds the mining still: kept are the negatives within epsilon of 1, here a neighbour."""
    labels = torch.arange(40)
    embeddings = make_points(labels, 9, torch.float64)
    near = embeddings[:3] + 0.1 * torch.randn(3, 9, dtype=torch.float64)
    refs, ref_labels = torch.cat([embeddings, near]), torch.cat([labels, labels[:3] + 100])
    fused = check(loss, (embeddings, labels, refs, ref_labels), epsilon, labels, reduction="none")
    losses, gradient, grad_ref = fused
    if loss == "circle":
        assert (losses == 0).all()
        assert (gradient == 0).all()
    elif epsilon is None:
        assert (losses > 0).all()
    else:
        assert (losses[:3] > 0).all()
        assert (grad_ref[3:40] == 0).all()


@EVERY
@EPSILON
def test_the_square_batch_is_a_case(loss, epsilon):
    """A batch against its own copy, each row's pair with its copy taken out, is the batch by itself.

    Not when mined: there the copy counts as the row's nearest positive. Its bound is the farthest, though,
    so with two others of its class nothing changes either.
    """
    labels = make_labels(60)
    embeddings = make_points(labels, 9, torch.float64)
    function = getattr(functional, FUNCTIONS[loss])
    own = torch.arange(60)
    value, gradient, grad_ref = evaluate(loss, (embeddings, labels, embeddings, labels), epsilon, own)
    leaf = embeddings.clone().requires_grad_()
    expected = function(leaf, labels, epsilon=epsilon)
    (grad_expected,) = torch.autograd.grad(expected, leaf)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient + grad_ref, grad_expected)


@EVERY
def test_listing_says_the_same(loss):
    """The pairs, looked at, are those that the kernel counts."""
    for epsilon in (None, 0.1):
        for count in (0, 1, 77, 130):
            embeddings, labels, ref_emb, ref_labels, own = make_queue(40, 130, 9)
            rule = {"epsilon": epsilon, "self_index": own, "num_valid_refs": torch.tensor(count)}
            pairs = MinedPairs(embeddings, labels, ref_emb, ref_labels, **rule)
            function = getattr(functional, FUNCTIONS[loss])
            fused = function(embeddings, ref_emb=ref_emb, indices_tuple=pairs, reduction="none")
            lists = tuple(pairs)
            listed = function(embeddings, ref_emb=ref_emb, indices_tuple=lists, reduction="none")
            torch.testing.assert_close(listed, fused)
            assert not (own[lists[0]] == lists[1]).any()
            counts = pairs.pair_counts()
            assert torch.equal(counts.positives, lists[0].bincount(minlength=40))
            assert torch.equal(counts.negatives, lists[2].bincount(minlength=40))
            assert (counts.negatives.sum() > 0) == (count > 0) or (count == 1 and epsilon is not None)


@EVERY
def test_repeatable_to_the_bit(loss):
    *batch, own = make_queue(300, 900, 24, dtype=torch.float32)
    torch.set_num_threads(2)
    first, second = (evaluate(loss, batch, 0.1, own, 700) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


OP_ERRORS = {
    "self_index short": ({"self_index": torch.zeros(3, dtype=torch.long)}, "self_index"),
    "self_index int32": ({"self_index": torch.zeros(6, dtype=torch.int32)}, "self_index"),
    "num_valid_refs vector": ({"num_valid_refs": torch.zeros(2, dtype=torch.long)}, "num_valid_refs"),
    "num_valid_refs float": ({"num_valid_refs": torch.tensor(3.0)}, "num_valid_refs"),
}


@pytest.mark.parametrize("name", OP_ERRORS)
def test_op_errors(name):
    changed, says = OP_ERRORS[name]
    points, labels = torch.randn(6, 4), torch.arange(6)
    own = {"self_index": None, "num_valid_refs": None} | changed
    options = OpOptions("circle", [0.4, 80.0, 1.0], 0.1)
    with pytest.raises((TypeError, ValueError), match=says):
        torch.ops.dml_cuda.pair_loss(points, labels, points, labels, *own.values(), None, *options)
