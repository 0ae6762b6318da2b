"""Mined pairs, made when looked at; and losses of listed pairs, at the cost of the pairs listed."""

import copy
import json
import pickle
import re
import subprocess
import sys

import pytest
import torch
from cases.accuracy import FUNCTIONS, assert_as_accurate
from cases.data import make_batch, make_labels, make_points
from oracle.pairs import brute_force, mining_margin

import dml_cuda
from dml_cuda import MinedPairs, MultiSimilarityMiner, functional

META = torch.device("meta")
EVERY = pytest.mark.parametrize("loss", FUNCTIONS)


def function_of(loss):
    return getattr(functional, FUNCTIONS[loss])


def never_look(monkeypatch):
    """From here on no pair may be listed, nor any block of similarities made."""

    def refuse(self):
        raise AssertionError("pairs were listed")

    monkeypatch.setattr(MinedPairs, "_read", refuse)
    monkeypatch.setattr(MinedPairs, "blocks", refuse)


def value_and_gradients(function, points, *arguments, **options):
    """On fresh leaves of embeddings and, unless None, ref_emb; ``arguments`` follow the embeddings."""
    leaves = [x.detach().clone().requires_grad_() for x in points if x is not None]
    ref_emb = leaves[1] if len(leaves) > 1 else None
    value = function(leaves[0], *arguments, ref_emb=ref_emb, **options)
    return [value.detach(), *torch.autograd.grad(value, leaves, torch.ones_like(value))]


# --- What the miner returns


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("m", [None, 150, 1])
def test_mined_pairs_are_those_of_brute_force(similarity, m, monkeypatch):
    monkeypatch.setattr(dml_cuda.miners.mined, "_CPU_BLOCK", 1000)  # several blocks
    for kind in ("few", "one", "distinct", "unequal"):
        labels = make_labels(70, kind)
        ref_labels = None if m is None else make_labels(m, kind)
        every = labels if m is None else torch.cat([labels, ref_labels])
        points = make_points(every, 6, torch.float64)
        embeddings, ref_emb = points[:70], None if m is None else points[70:]
        for epsilon in (0.1, 0.0, -0.2):
            batch = embeddings, labels, ref_emb, ref_labels
            assert mining_margin(*batch, epsilon, similarity=similarity) > 1e-12  # rounding decides no pair
            rule = {"epsilon": epsilon, "similarity": similarity}
            truth = brute_force("circle", embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels, **rule)
            same = labels[:, None] == (labels if m is None else ref_labels)
            kept = [torch.from_numpy(truth.kept) & mask for mask in (same, ~same)]
            pairs = MultiSimilarityMiner(epsilon, similarity=similarity)(*batch)
            for lists, mask in zip((pairs[:2], pairs[2:]), kept, strict=True):
                assert torch.equal(torch.stack(lists, 1), mask.nonzero())  # in the order of their rows
            counts = pairs.pair_counts()
            for count, mask in zip(counts, kept, strict=True):
                assert count.dtype == torch.int64
                assert count.tolist() == mask.sum(1).tolist()


def test_behaves_as_a_tuple_of_four(monkeypatch):
    looks = []
    look = MinedPairs._read
    monkeypatch.setattr(MinedPairs, "_read", lambda self: (looks.append(1), look(self)))
    batch = make_batch(40, 6)
    pairs = MultiSimilarityMiner()(*batch)
    assert isinstance(pairs, MinedPairs)
    assert len(pairs) == 4
    assert repr(pairs) == "MinedPairs(epsilon=0.1, rows=40, columns=40)"
    assert not looks
    a1, p, a2, n = pairs
    assert looks
    assert pairs[0] is a1
    assert pairs[-1] is n
    assert pairs[2:] == [a2, n]
    assert [x is y for x, y in zip(pairs, (a1, p, a2, n), strict=True)] == [True] * 4
    fields = pairs.pos_anchors, pairs.positives, pairs.neg_anchors, pairs.negatives
    assert all(x is y for x, y in zip(pairs, fields, strict=True))
    assert a1.shape == p.shape
    assert a2.shape == n.shape
    assert {x.dtype for x in pairs} == {torch.int64}
    assert (torch.cat(pairs) == torch.cat([a1, p, a2, n])).all()
    with pytest.raises(IndexError):
        pairs[4]


@pytest.mark.parametrize(
    "use",
    [
        lambda pairs: tuple(pairs),
        lambda pairs: (lambda *lists: lists)(*pairs),
        lambda pairs: [*pairs],
        lambda pairs: list(reversed(pairs))[::-1],
        lambda pairs: pairs.__add__([]),
        lambda pairs: pairs.__radd__([]),
        lambda pairs: pairs.copy(),
        lambda pairs: copy.copy(pairs),
        lambda pairs: copy.deepcopy(pairs),
        lambda pairs: pickle.loads(pickle.dumps(pairs)),
    ],
)
def test_every_way_to_look_lists_the_pairs(use):
    batch = make_batch(40, 6)
    expected = tuple(MultiSimilarityMiner()(*batch))
    found = use(MultiSimilarityMiner()(*batch))
    assert len(found) == 4
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_counts_of_the_last_batch():
    miner = MultiSimilarityMiner(0.1)
    assert miner.num_pos_pairs == miner.num_neg_pairs == 0
    for n in (40, 60):
        pairs = miner(*make_batch(n, 6))
        assert miner.num_pos_pairs == len(pairs[0]) > 0
        assert miner.num_neg_pairs == len(pairs[3]) > 0
    for other in (copy.deepcopy(miner), pickle.loads(pickle.dumps(miner))):
        assert other.num_pos_pairs == 0  # a batch does not travel along
        assert (
            repr(other)
            == repr(miner)
            == ("MultiSimilarityMiner(epsilon=0.1, similarity='cosine', normalize_embeddings=None)")
        )


def test_pair_counts_option(monkeypatch):
    batch = make_batch(40, 6)
    expected = MultiSimilarityMiner()(*batch)
    look = MinedPairs._read
    monkeypatch.setattr(MinedPairs, "_read", lambda self: pytest.fail("pairs were listed"))
    pairs, counts = MultiSimilarityMiner(pair_counts=True)(*batch)
    assert isinstance(pairs, MinedPairs)
    monkeypatch.setattr(MinedPairs, "_read", look)
    assert torch.equal(counts.positives, expected.pos_anchors.bincount(minlength=40))
    assert torch.equal(counts.negatives, expected.neg_anchors.bincount(minlength=40))
    # Nothing can be read from a tensor on the meta device: whoever waits for the device fails there.
    embeddings, labels = batch
    counts = MultiSimilarityMiner(pair_counts=True)(embeddings.to(META), labels)[1]
    assert counts.negatives.device == META
    assert counts.negatives.shape == (40,)


# --- Mined pairs given to a loss


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [None, 60])
def test_mined_pairs_stay_fused(loss, dtype, m, monkeypatch):
    """They give what epsilon= gives, to the bit, and nothing is listed."""
    embeddings, labels = make_batch(140, 9, dtype=dtype)
    ref_emb, ref_labels = (None, None) if m is None else make_batch(m, 9, dtype=dtype)
    function, points = function_of(loss), (embeddings, ref_emb)
    rectangle = {} if m is None else {"ref_labels": ref_labels}
    expected = value_and_gradients(function, points, labels, epsilon=0.1, **rectangle)
    assert expected[1].abs().max() > 0
    never_look(monkeypatch)
    miner = MultiSimilarityMiner(0.1)

    def mined(x, *given, ref_emb, view=lambda x: x, **options):
        columns = ref_emb, ref_labels
        return function(view(x), *given, indices_tuple=miner(x, labels, *columns), ref_emb=ref_emb, **options)

    for found in (
        value_and_gradients(mined, points),  # labels are not needed
        value_and_gradients(mined, points, labels, **rectangle, check_pairs=True),
        value_and_gradients(mined, points, labels, **rectangle, epsilon=0.1),
        value_and_gradients(mined, points, view=lambda x: x.view_as(x)),
    ):
        assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))


@EVERY
def test_mined_from_a_copy(loss):
    """Pairs mined from other embeddings than the loss sees are their pairs, taken by index."""
    embeddings, labels = make_batch(60, 6, dtype=torch.float64)
    pairs = MultiSimilarityMiner(0.1)(embeddings, labels)
    other = make_points(labels, 6, torch.float64)
    function = function_of(loss)
    found = value_and_gradients(function, (other, None), labels, indices_tuple=pairs)
    expected = value_and_gradients(function, (other, None), indices_tuple=tuple(pairs), backend="reference")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    mined_again = value_and_gradients(function, (other, None), labels, epsilon=0.1)
    assert found[0] != mined_again[0]


@EVERY
def test_another_similarity_takes_the_pairs_by_index(loss):
    embeddings, labels = make_batch(60, 6, dtype=torch.float64)
    pairs = MultiSimilarityMiner(0.1, similarity="dot")(embeddings, labels)
    function = function_of(loss)
    lists = tuple(pairs)
    assert torch.equal(
        function(embeddings, labels, indices_tuple=pairs), function(embeddings, indices_tuple=lists)
    )
    assert function(embeddings, indices_tuple=lists) != function(embeddings, labels, epsilon=0.1)


@EVERY
def test_mined_pairs_in_the_reference(loss):
    embeddings, labels = make_batch(60, 6, dtype=torch.float64)
    pairs, function = MultiSimilarityMiner(0.1)(embeddings, labels), function_of(loss)
    fused = function(embeddings, labels, indices_tuple=pairs)
    torch.testing.assert_close(function(embeddings, labels, indices_tuple=pairs, backend="reference"), fused)


@EVERY
def test_no_graph_is_kept_alive(loss):
    embeddings, labels = make_batch(20, 6)
    leaf = embeddings.requires_grad_()
    pairs = MultiSimilarityMiner()(3 * leaf, labels)
    assert pairs.embeddings.grad_fn is None
    assert not any(x.requires_grad for x in pairs)


def test_mixed_dtypes_under_autocast():
    """The wider of the two is computed in, also where the pairs are looked at after it."""
    embeddings, labels = make_batch(20, 6, dtype=torch.bfloat16)
    ref_emb, ref_labels = make_batch(30, 6, dtype=torch.float64)
    expected = MultiSimilarityMiner()(embeddings.double(), labels, ref_emb, ref_labels)
    with torch.autocast("cpu", torch.bfloat16):
        pairs = MultiSimilarityMiner()(embeddings, labels, ref_emb, ref_labels)
    assert len(pairs[0]) > 0
    assert all(torch.equal(a, b) for a, b in zip(pairs, expected, strict=True))


def test_changed_since_mined():
    embeddings, labels = make_batch(20, 6)
    looked, not_looked = (MultiSimilarityMiner()(embeddings, labels) for _ in range(2))
    tuple(looked)
    embeddings += 1
    with pytest.raises(RuntimeError, match=r"^indices_tuple: .*changed in place"):
        functional.circle_loss(embeddings, labels, indices_tuple=not_looked)
    with pytest.raises(RuntimeError, match=r"^indices_tuple: .*changed in place"):
        tuple(not_looked)
    assert len(looked.pos_anchors) > 0


# --- Listed pairs


def lists(n, m, count, dtype=torch.long):
    """Pairs in no order, a few of them twice, both kinds of some rows and none of others."""
    pairs = [torch.randperm(n * m)[:count] for _ in range(2)]
    pairs[1] = pairs[1][~torch.isin(pairs[1], pairs[0])]
    pairs = [torch.cat([k, k[: count // 4]]) for k in pairs]
    pairs = [k[torch.randperm(len(k))] for k in pairs]
    return tuple(x.to(dtype) for k in pairs for x in (k // m, k % m))


def check_listed(loss, points, indices, **options):
    """Against the reference in float64, forward and backward."""
    function = function_of(loss)
    fused = value_and_gradients(function, points, indices_tuple=indices, backend="fused", **options)
    plain = value_and_gradients(function, points, indices_tuple=indices, backend="reference", **options)
    doubles = [None if x is None else x.double() for x in points]
    truth = value_and_gradients(function, doubles, indices_tuple=indices, backend="reference", **options)
    names = ("loss", "gradient", "gradient to ref_emb")
    for what, a, r, t in zip(names, fused, plain, truth, strict=False):
        assert_as_accurate(what, a, r, t)
    return fused


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [1, 3, 31, 64, 65, 129, 300])
def test_listed_pairs(loss, dtype, dim, instruction_set):
    for n, m, count in ((20, 20, 60), (33, 129, 400), (129, 7, 30), (3, 1000, 1500), (2, 2, 0)):
        points = torch.randn(n, dim).to(dtype), torch.randn(m, dim).to(dtype)
        indices = lists(n, m, count)
        # On a line every cosine is 1 or -1, and its gradient nothing but rounding.
        options = {"similarity": "dot" if dim == 1 else "cosine"}
        check_listed(loss, points, indices, **options)
        if n == m:
            check_listed(loss, (points[0], None), indices, **options)


@EVERY
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("reduction", ["mean", "mean_nonzero", "mean_valid", "sum", "none"])
def test_listed_pairs_with_options(loss, similarity, reduction):
    # All in one corner: PyTorch takes the loss of a row whose similarities are far below the base for 0.
    points = 0.3 + 0.3 * torch.randn(40, 6, dtype=torch.float64), None
    fused = check_listed(loss, points, lists(40, 40, 50), similarity=similarity, reduction=reduction)
    assert fused[1].abs().max() > 0


@EVERY
def test_listed_pairs_by_brute_force(loss):
    """From the papers' formulas."""
    embeddings, indices = torch.randn(12, 5, dtype=torch.float64), lists(12, 12, 30)
    found = function_of(loss)(embeddings, indices_tuple=indices, reduction="none")
    truth = brute_force(loss, embeddings, None, indices=indices)
    assert found.tolist() == pytest.approx(truth.losses.tolist(), rel=1e-12)


@EVERY
def test_forms_of_lists(loss):
    """int32, triplets, a list for a tuple, repetitions, any order, labels or none: the same pairs."""
    embeddings, labels = make_batch(40, 6, dtype=torch.float64)
    function, points = function_of(loss), (embeddings, None)
    a, p, n = (torch.randint(0, 40, (90,)) for _ in range(3))
    expected = value_and_gradients(function, points, indices_tuple=(a, p, a, n), backend="reference")
    order = torch.randperm(90)
    for form in (
        (a, p, n),
        [a, p, n],
        (a.int(), p.int(), n.int()),
        (a, p, a, n),
        (a.int(), p, a.int(), n),
        (a[order], p[order], a, n),
        (a.repeat(3), p.repeat(3), a, n),
        (x for x in (a, p, n)),
        tuple(torch.stack([x, x], 1)[:, 0] for x in (a, p, n)),  # strided
    ):
        found = value_and_gradients(function, points, labels, indices_tuple=form)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


@EVERY
def test_all_pairs_listed_give_the_loss_of_labels(loss):
    embeddings, labels = make_batch(60, 6, dtype=torch.float64)
    same = labels[:, None] == labels
    masks = same & ~torch.eye(60, dtype=torch.bool), ~same
    indices = [index for mask in masks for index in mask.nonzero(as_tuple=True)]
    function = function_of(loss)
    listed = value_and_gradients(function, (embeddings, None), indices_tuple=indices)
    torch.testing.assert_close(listed, value_and_gradients(function, (embeddings, None), labels))


@EVERY
def test_no_pairs_listed(loss):
    embeddings = torch.randn(5, 3)
    none = torch.empty(0, dtype=torch.long)
    for reduction in ("mean", "mean_nonzero", "mean_valid", "sum"):
        value, gradient = value_and_gradients(
            function_of(loss), (embeddings, None), indices_tuple=(none,) * 4, reduction=reduction
        )
        assert value == 0
        assert (gradient == 0).all()


@EVERY
def test_listed_pairs_by_finite_differences(loss):
    options = {"beta": 5.0} if loss == "multi_similarity" else {"gamma": 4.0, "detach_weights": False}
    points = [torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (7, 9)]
    square, rectangle = lists(7, 7, 15), lists(7, 9, 20)
    function = function_of(loss)
    assert torch.autograd.gradcheck(lambda x: function(x, indices_tuple=square, **options), points[:1])
    assert torch.autograd.gradcheck(
        lambda x, y: function(x, indices_tuple=rectangle, ref_emb=y, **options), points
    )


@EVERY
def test_a_zero_row_and_a_spoilt_row(loss):
    """A zero row has similarity and gradient 0; a NaN reaches the rows listed with it only."""
    embeddings = torch.randn(12, 5)
    embeddings[3] = 0
    indices = tuple(torch.tensor(x) for x in ([3, 4, 5], [4, 3, 6], [3, 4, 5], [7, 8, 9]))
    value, gradient = value_and_gradients(
        function_of(loss), (embeddings, None), indices_tuple=indices, reduction="none"
    )
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()
    assert (gradient[3] == 0).all()
    embeddings[8, 2] = float("nan")
    value = function_of(loss)(embeddings, indices_tuple=indices, reduction="none")
    assert value.isnan().tolist() == [i == 4 for i in range(12)]


@EVERY
def test_repeatable_to_the_bit(loss):
    points = torch.randn(300, 24), torch.randn(500, 24)
    indices = lists(300, 500, 20_000)
    runs = []
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        runs.append(value_and_gradients(function_of(loss), points, indices_tuple=indices, reduction="none"))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


# --- Bad pairs

GOOD = torch.tensor([0, 1, 2])
ALL = (GOOD, GOOD, GOOD, GOOD)


def changed(place, index):
    return tuple(index if k == place else x for k, x in enumerate(ALL))


BAD = {
    "number": (7, TypeError, ["4 index tensors", "3", "int"]),
    "two lists": ((GOOD, GOOD), ValueError, ["4 index tensors", "3", "2"]),
    "five lists": ((GOOD,) * 5, ValueError, ["4 index tensors", "3", "5"]),
    "list of numbers": (changed(1, [0, 1, 2]), TypeError, ["positives", "integer tensor", "list"]),
    "floats": (changed(0, GOOD.float()), TypeError, ["pos_anchors", "int64 or int32", "float32"]),
    "mask": (changed(3, GOOD > 0), TypeError, ["negatives", "int64 or int32", "bool"]),
    "int16": (changed(2, GOOD.short()), TypeError, ["neg_anchors", "int64 or int32", "int16"]),
    "two dimensions": (changed(2, GOOD[None]), ValueError, ["neg_anchors", "one dimension", r"\[1, 3\]"]),
    "a scalar": (changed(2, GOOD[0]), ValueError, ["neg_anchors", "one dimension", r"\[\]"]),
    "positives short": (changed(1, GOOD[:2]), ValueError, ["positives", "pos_anchors", "3", "2"]),
    "negatives short": (changed(3, GOOD[:2]), ValueError, ["negatives", "neg_anchors", "3", "2"]),
    "triplets short": ((GOOD, GOOD, GOOD[:1]), ValueError, ["negatives", "anchors", "3", "1"]),
    "anchor beyond": (changed(0, GOOD + 4), ValueError, ["pos_anchors", "6 rows of embeddings", "6"]),
    "positive beyond": (changed(1, GOOD + 4), ValueError, ["positives", "6 rows of embeddings", "6"]),
    "negative index": (changed(3, GOOD - 1), ValueError, ["negatives", "6 rows of embeddings", "-1"]),
    "triplet beyond": ((GOOD, GOOD, GOOD + 4), ValueError, ["negatives", "6 rows of embeddings", "6"]),
}


@EVERY
@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("name", BAD)
def test_bad_lists(loss, backend, name):
    indices, error, says = BAD[name]
    with pytest.raises(error, match=r"^indices_tuple: .*" + ".*".join(says)):
        function_of(loss)(torch.randn(6, 4), None, indices_tuple=indices, backend=backend)


@EVERY
def test_bad_lists_of_references(loss):
    """Positives and negatives are places in ref_emb, anchors in embeddings."""
    function, ref_emb = function_of(loss), torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"^indices_tuple: positives: .*2 rows of ref_emb, got 2"):
        function(torch.randn(6, 4), indices_tuple=ALL, ref_emb=ref_emb)
    function(torch.randn(6, 4), indices_tuple=(GOOD, GOOD % 2, GOOD + 3, GOOD % 2), ref_emb=ref_emb)


@EVERY
@pytest.mark.parametrize("m", [None, 6])
def test_pairs_of_another_batch(loss, m):
    embeddings, labels = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 2])
    refs = () if m is None else (torch.randn(m, 4), labels)
    pairs = MultiSimilarityMiner()(embeddings, labels, *refs)
    function, named = function_of(loss), dict(zip(("ref_emb", "ref_labels"), refs, strict=False))
    with pytest.raises(ValueError, match=r"^indices_tuple: .*mined from this batch.*6 rows of embeddings.*5"):
        function(embeddings[:5], labels[:5], indices_tuple=pairs, **named)
    other = {} if m else {"ref_emb": embeddings, "ref_labels": labels}
    with pytest.raises(ValueError, match=r"^indices_tuple: .*mined from this batch.*rows of ref_emb"):
        function(embeddings, labels, indices_tuple=pairs, **other)
    # Other labels cannot be told without looking at them.
    function(embeddings, labels.flip(0) + 1, indices_tuple=pairs, **named)
    with pytest.raises(ValueError, match=r"^indices_tuple: .*mined from this batch.*other labels"):
        function(embeddings, labels.flip(0) + 1, indices_tuple=pairs, check_pairs=True, **named)


@EVERY
def test_epsilon_beside_pairs(loss):
    embeddings, labels = make_batch(20, 4)
    pairs, function = MultiSimilarityMiner(0.1)(embeddings, labels), function_of(loss)
    for indices in (pairs, ALL):
        with pytest.raises(ValueError, match=r"^epsilon: expected None .*got 0\.2"):
            function(embeddings, labels, indices_tuple=indices, epsilon=0.2)


@EVERY
def test_checks_do_not_wait_for_the_device(loss):
    """On the meta device nothing can be read: the checks by shape and type alone go through there."""
    function, embeddings = function_of(loss), torch.randn(6, 4, device=META)
    indices = tuple(x.to(META) for x in ALL)
    assert function(embeddings, indices_tuple=indices, backend="reference").device == META
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        function(embeddings, indices_tuple=indices, backend="reference", check_pairs=True)
    with pytest.raises(ValueError, match=r"^indices_tuple: "):
        function(embeddings, indices_tuple=(*indices[:3], indices[3][:1]), backend="reference")
    pairs = MultiSimilarityMiner()(embeddings, torch.arange(6))
    assert function(embeddings, indices_tuple=pairs, backend="reference").device == META


@EVERY
def test_labels_are_needed_without_pairs(loss):
    with pytest.raises(ValueError, match=r"^labels: expected labels, or pairs as indices_tuple"):
        function_of(loss)(torch.randn(6, 4))


# --- The ops

OPS = torch.ops.dml_cuda


def op_inputs(n=9, m=11, dim=5, count=40, dtype=torch.float32):
    x, y = torch.randn(n, dim, dtype=dtype), torch.randn(m, dim, dtype=dtype)
    rows = torch.randint(0, n, (count,)).sort().values if n * m else torch.empty(0, dtype=torch.long)
    cols = torch.randint(0, m, rows.shape) if m else rows
    return x, y, rows, cols, offsets_of(rows, n)


def offsets_of(rows, n):
    return torch.cat([torch.zeros(1, dtype=torch.long), rows.bincount(minlength=n)[:n].cumsum(0)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [0, 40])
def test_opcheck(dtype, count):
    x, y, rows, cols, offsets = op_inputs(count=count, dtype=dtype)
    x, y = x.requires_grad_(), y.requires_grad_()
    logits, plain = torch.randn(count, dtype=dtype), ("test_schema", "test_autograd_registration")
    torch.library.opcheck(OPS.pair_products.default, (x, y, rows, cols, offsets))
    for plus_one in (False, True):
        arguments = (logits.clone().requires_grad_(), offsets, plus_one)
        torch.library.opcheck(OPS.segment_logsumexp.default, arguments)
        value = OPS.segment_logsumexp(logits, offsets, plus_one)
        softmax = (torch.ones_like(value), logits, value, offsets)
        torch.library.opcheck(OPS.segment_softmax.default, softmax)
    sums = (logits, y.detach(), cols, offsets)
    torch.library.opcheck(OPS.pair_sums.default, sums, test_utils=(*plain, "test_faketensor"))
    torch.library.opcheck(OPS.pair_sort.default, (rows.flip(0), cols, 9, 11))
    torch.library.opcheck(OPS.column_order.default, (cols, 11))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [0, 1, 2, 7, 8, 15, 16, 17, 33, 64, 100, 129])
def test_products_and_sums(dtype, dim, instruction_set):
    for n, m, count in ((9, 11, 40), (1, 1, 3), (50, 3, 20), (4, 4, 0), (0, 3, 0), (3, 0, 0)):
        x, y, rows, cols, offsets = op_inputs(n, m, dim, count, dtype)
        close = {"rtol": 0, "atol": 200 * torch.finfo(dtype).eps}
        expected = (x.double()[rows] * y.double()[cols]).sum(1).to(dtype)
        torch.testing.assert_close(OPS.pair_products(x, y, rows, cols, offsets), expected, **close)
        weights = torch.randn(len(rows), dtype=dtype)
        expected = torch.zeros(n, dim, dtype=torch.float64)
        expected = expected.index_add(0, rows, weights[:, None].double() * y.double()[cols]).to(dtype)
        torch.testing.assert_close(OPS.pair_sums(weights, y, cols, offsets), expected, **close)


def segments(*parts, dtype):
    offsets = torch.tensor([0, *(len(p) for p in parts)]).cumsum(0)
    return torch.tensor([v for p in parts for v in p], dtype=dtype), offsets


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("plus_one", [False, True])
def test_segment_logsumexp(dtype, plus_one):
    inf, nan = float("inf"), float("nan")
    parts = (
        [], [0.0], [1.0, 2.0, 3.0], [-inf], [-inf, 2.0], [nan, 1.0], [-inf, nan], [800.0, -800.0], [-800.0],
        [-300.0, -301.0], [inf, 0.0], [], [-40.0] * 50, [500.0] * 1000, [],
    )  # fmt: skip
    logits, offsets = segments(*parts, dtype=dtype)
    found = OPS.segment_logsumexp(logits, offsets, plus_one)
    expected = [
        torch.logsumexp(torch.tensor([*p, *([0.0] if plus_one else [])], dtype=torch.float64), 0)
        for p in parts
    ]
    # torch itself drops the 1 of log(1 + x) for a tiny x.
    tiny = {i: sum(torch.tensor(parts[i]).double().exp()) for i in (9, 12)} if plus_one else {}
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        e = torch.log1p(tiny[i]) if i in tiny else e
        assert f.item() == pytest.approx(e.to(dtype).item(), rel=8 * torch.finfo(dtype).eps, nan_ok=True), i


@pytest.mark.parametrize("plus_one", [False, True])
def test_segment_logsumexp_gradient(plus_one):
    inf = float("inf")
    logits, offsets = segments([1.0, -2.0], [], [-inf], [0.5, -inf, 3.0], [700.0, 690.0], dtype=torch.float64)
    leaf, upstream = logits.requires_grad_(), torch.randn(5, dtype=torch.float64)
    (found,) = torch.autograd.grad(OPS.segment_logsumexp(leaf, offsets, plus_one), leaf, upstream)
    for i in range(5):
        part = logits.detach()[offsets[i] : offsets[i + 1]]
        one = torch.zeros(int(plus_one), dtype=torch.float64)
        share = torch.softmax(torch.cat([part, one]), 0)[: len(part)] if len(part) else part
        share = share.nan_to_num(0.0)  # only -inf: nothing to share
        torch.testing.assert_close(found[offsets[i] : offsets[i + 1]], upstream[i] * share)


def test_orders():
    rows, cols = torch.randint(0, 7, (200,)), torch.randint(0, 9, (200,))
    for r, c in ((rows, cols), (rows.sort().values, cols), (rows[:0], cols[:0])):
        sorted_rows, sorted_cols, offsets, fresh = OPS.pair_sort(r, c, 7, 9)
        pairs = list(zip(sorted_rows.tolist(), sorted_cols.tolist(), strict=True))
        assert pairs == sorted(zip(r.tolist(), c.tolist(), strict=True))
        assert offsets.tolist() == offsets_of(r, 7).tolist()
        assert fresh.tolist() == [k == 0 or pairs[k] != pairs[k - 1] for k in range(len(pairs))]
    order, offsets = OPS.column_order(cols, 9)
    assert order.tolist() == sorted(range(200), key=lambda k: cols[k])
    assert offsets.tolist() == offsets_of(cols, 9).tolist()


def test_orders_of_other_devices():
    """What CUDA runs, in PyTorch: the same, but that a bad index becomes a column that there is not."""

    def elsewhere(name, *arguments):
        cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        return torch.library.get_kernel(f"dml_cuda::{name}", "CUDA").call_boxed(cuda, *arguments)

    rows, cols = torch.randint(0, 7, (200,)), torch.randint(0, 9, (200,))
    for a, b in zip(elsewhere("pair_sort", rows, cols, 7, 9), OPS.pair_sort(rows, cols, 7, 9), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(elsewhere("column_order", cols, 9), OPS.column_order(cols, 9), strict=True):
        assert torch.equal(a, b)
    bad = torch.tensor([0, -1, 7, 3, 3]), torch.tensor([1, 1, 1, -1, 9])
    rows, cols, offsets, _ = elsewhere("pair_sort", *bad, 7, 9)
    assert rows.tolist() == [0, 0, 3, 3, 6]
    assert cols.tolist() == [1, 9, 9, 9, 9]
    assert offsets[-1] == 5


def op_errors():
    x, y, rows, cols, offsets = op_inputs()
    logits = torch.randn(40)
    products, sums = (x, y, rows, cols, offsets), (logits, y, cols, offsets)
    value = OPS.segment_logsumexp(logits, offsets, False)
    softmax = (value, logits, value, offsets)

    def but(arguments, **changes):
        return [changes.get(f"a{k}", a) for k, a in enumerate(arguments)]

    return {
        "x 1-D": (OPS.pair_products, but(products, a0=x[0]), ValueError, "x: expected a contiguous matrix"),
        "x strided": (OPS.pair_products, but(products, a0=x.T.contiguous().T), ValueError, "x: .*contiguous"),
        "x half": (OPS.pair_products, but(products, a0=x.half()), TypeError, "x: expected float32"),
        "y double": (OPS.pair_products, but(products, a1=y.double()), TypeError, "y: expected Float"),
        "y other D": (OPS.pair_products, but(products, a1=torch.randn(11, 4)), ValueError, "y: .* 5 .* 4"),
        "rows int32": (OPS.pair_products, but(products, a2=rows.int()), TypeError, "rows: expected Long"),
        "cols short": (OPS.pair_products, but(products, a3=cols[:3]), ValueError, "cols: expected 40 .* 3"),
        "offsets short": (OPS.pair_products, but(products, a4=offsets[:3]), ValueError, "row_offsets: .*10"),
        "rows beyond": (OPS.pair_products, but(products, a2=rows + 5), IndexError, "rows: .*below 9"),
        "cols beyond": (OPS.pair_products, but(products, a3=cols + 5), IndexError, "cols: .*below 11"),
        "cols negative": (OPS.pair_products, but(products, a3=cols - 5), IndexError, "cols: .*got -"),
        "weights double": (OPS.pair_sums, but(sums, a0=logits.double()), TypeError, "weights: .*Float"),
        "weights short": (OPS.pair_sums, but(sums, a0=logits[:3]), ValueError, "index: expected 3 .*40"),
        "index beyond": (OPS.pair_sums, but(sums, a2=cols + 5), IndexError, "index: .*below 11"),
        "index negative": (OPS.pair_sums, but(sums, a2=cols - 5), IndexError, "index: .*got -"),
        "sums offsets none": (OPS.pair_sums, but(sums, a3=offsets[:0]), ValueError, "offsets: .*got none"),
        "sums offsets short": (OPS.pair_sums, but(sums, a3=offsets[:-1] // 2), ValueError, "offsets: .*40"),
        "sums offsets fall": (OPS.pair_sums, but(sums, a3=offsets.flip(0)), ValueError, "offsets: .*40"),
        "logits half": (OPS.segment_logsumexp, [logits.half(), offsets, True], TypeError, "logits: "),
        "logits 2-D": (OPS.segment_logsumexp, [x, offsets, True], ValueError, "logits: .*vector"),
        "segments beyond": (OPS.segment_logsumexp, [logits, offsets + 1, True], ValueError, "offsets: .*40"),
        "grad short": (OPS.segment_softmax, but(softmax, a0=value[:3]), ValueError, "grad, value: .*9.*3"),
        "sort beyond": (OPS.pair_sort, [rows, cols, 3, 11], IndexError, "rows: .*below 3"),
        "sort cols beyond": (OPS.pair_sort, [rows, cols, 9, 2], IndexError, "cols: .*below 2"),
        "sort unequal": (OPS.pair_sort, [rows, cols[:2], 9, 11], ValueError, "cols: expected 40 .*2"),
        "order beyond": (OPS.column_order, [cols, 2], IndexError, "cols: .*below 2"),
        "order int32": (OPS.column_order, [cols.int(), 11], TypeError, "cols: expected Long"),
    }  # fmt: skip


@pytest.mark.parametrize("name", op_errors())
def test_op_errors(name):
    op, arguments, error, says = op_errors()[name]
    with pytest.raises(error, match=re.compile(says, re.DOTALL)):
        op(*arguments)


# --- Memory

# Peak resident memory is a number of the whole process: this one gets its own.
MEASURE = """
import json, resource
import torch
from dml_cuda import MultiSimilarityMiner, functional

n = 16_384
torch.manual_seed(0)
labels = torch.arange(n) // 4
embeddings = torch.randn(n // 4, 24).repeat_interleave(4, 0) + 0.3 * torch.randn(n, 24)
added = []

def step(rows):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pairs = tuple(MultiSimilarityMiner(0.1)(embeddings[:rows], labels[:rows]))
    leaf = embeddings[:rows].clone().requires_grad_()
    functional.circle_loss(leaf, indices_tuple=pairs).backward()
    added.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
    return len(pairs[0]) + len(pairs[2]), leaf.grad.abs().max().item()

step(256)  # the libraries' own buffers and threads
pairs, gradient = step(n)
print(json.dumps({"added": added[1], "pairs": pairs, "gradient": gradient}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts other units elsewhere")
def test_neither_listing_nor_listed_pairs_need_the_matrix():
    """The matrix would take 1 GiB in float32, and a mask of it 256 MiB."""
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    measured = json.loads(run.stdout)
    assert measured["pairs"] > 100
    assert measured["gradient"] > 0
    assert measured["added"] < 96 * 2**20, measured
