"""Triplet margin loss with a margin for each class, or one that learns: against loops over every triplet in
float64."""

import copy
import io
import pickle

import pytest
import torch
import torch._dynamo.testing
from cases.data import make_batch
from cases.losses import SIMILARITIES, by_name
from oracle import triplets as truth
from torch import nn

import dml_cuda
from dml_cuda import (
    BatchEasyHardMiner,
    BatchHardMiner,
    DistanceWeightedMiner,
    TripletMarginLoss,
    TripletMarginMiner,
)
from dml_cuda.distributed import DistributedLoss
from dml_cuda.functional import triplet_margin_loss

N, CLASSES = 26, 7
BACKENDS = pytest.mark.parametrize("backend", ["auto", "reference"])
TERMS = pytest.mark.parametrize("term", ["hinge", "softplus"])
EVERY_SIMILARITY = pytest.mark.parametrize("similarity", SIMILARITIES)
MINERS = {
    "all": None,
    "semihard": TripletMarginMiner(0.3, "semihard"),
    "hardest": BatchHardMiner(),
    "semihard positives": BatchEasyHardMiner("semihard", "hard"),
    "drawn": DistanceWeightedMiner(),
}


def batch(dtype=torch.float64, n=N):
    torch.manual_seed(0)
    x, y = make_batch(n, 5, "few", dtype)
    return x, y % CLASSES


def margins(dtype=torch.float64):
    return nn.Parameter(torch.linspace(-0.1, 0.4, CLASSES, dtype=dtype))


def every(y, ref_labels=None):
    return torch.tensor(list(truth.every_triplet(y.numpy(), ref_labels))).T


def listed(mined):
    """The triplets that a miner found, or that its pairs make."""
    if len(mined) == 3:
        return torch.stack(tuple(mined))
    a, p, b, n = (index.tolist() for index in mined)
    pos, neg = zip(a, p, strict=True), list(zip(b, n, strict=True))
    return torch.tensor([(i, j, k) for i, j in pos for other, k in neg if i == other]).T


def expected(x, y, margin, triplets, term, similarity, reduction, refs=None, swap=False):
    """The loss, from all triplets as a list."""
    z = x if refs is None else refs
    d, between = distances(x, z, similarity), distances(z, z, similarity)
    a, p, n = triplets
    d_n = torch.minimum(d[a, n], between[p, n]) if swap else d[a, n]
    violation = d[a, p] - d_n + margin[y[a]]
    terms = violation.relu() if term == "hinge" else torch.logaddexp(violation, violation * 0)
    count = {"mean_nonzero": int((terms > 0).sum()), "mean": len(terms), "sum": 1}[reduction]
    return terms.sum() / max(count, 1)


def distances(x, y, similarity):
    if similarity in ("cosine", "euclidean"):
        x, y = (nn.functional.normalize(each, dim=1) for each in (x, y))
    if not similarity.startswith("euclidean"):
        return -(x @ y.T)
    square = (x[:, None] - y).square().sum(2)
    return torch.where(square > 0, square, 1.0).sqrt() * (square > 0)


def assert_same(value, wanted, *leaves):
    torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-12)
    found = torch.autograd.grad(value, leaves, retain_graph=True)
    for got, want in zip(found, torch.autograd.grad(wanted, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.check
@BACKENDS
@TERMS
@EVERY_SIMILARITY
@pytest.mark.parametrize("miner", MINERS)
def test_against_every_triplet(miner, similarity, term, backend):
    x, y = batch()
    x.requires_grad_()
    find = copy.deepcopy(MINERS[miner])
    if find is not None and miner != "drawn":  # that is by distances of unit rows
        for name, value in by_name(similarity).items():
            setattr(find, name, value)
    for reduction in ("mean_nonzero", "mean", "sum"):
        margin = margins()
        torch.manual_seed(1)
        mined = None if find is None else find(x, y)
        options = by_name(similarity) | {"reduction": reduction, "backend": backend}
        value = triplet_margin_loss(
            x, y, margin=margin, smooth_loss=term == "softplus", indices_tuple=mined, **options
        )
        triplets = every(y) if mined is None else listed(mined)
        wanted = expected(x, y, margin, triplets, term, similarity, reduction)
        assert_same(value, wanted, x, margin)
        if mined is not None:  # the same triplets as lists
            lists = tuple(index.clone() for index in mined)
            value = triplet_margin_loss(
                x, y, margin=margin, smooth_loss=term == "softplus", indices_tuple=lists, **options
            )
            wanted = expected(x, y, margin, triplets, term, similarity, reduction)
            assert_same(value, wanted, x, margin)


@BACKENDS
@TERMS
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("mined", [False, True])
def test_references_and_swap(mined, swap, term, backend):
    x, y = batch()
    refs, ref_labels = batch(n=33)
    refs = (refs * 1.1).requires_grad_()
    x.requires_grad_()
    margin = margins()
    found = BatchHardMiner()(x, y, refs, ref_labels) if mined else None
    triplets = listed(found) if mined else every(y, ref_labels.numpy())
    value = triplet_margin_loss(
        x, y, margin=margin, swap=swap, smooth_loss=term == "softplus", indices_tuple=found,
        ref_emb=refs, ref_labels=ref_labels, backend=backend,
    )  # fmt: skip
    wanted = expected(x, y, margin, triplets, term, "euclidean", "mean_nonzero", refs, swap)
    assert_same(value, wanted, x, refs, margin)


@BACKENDS
def test_pairs_and_rows(backend):
    """Pairs that are combined, random triplets, and the loss of each row."""
    x, y = batch()
    x.requires_grad_()
    margin = margins()
    pairs = dml_cuda.PairMarginMiner(0.3, 0.5)(x, y)
    lists = tuple(index.clone() for index in pairs)
    value = triplet_margin_loss(x, y, margin=margin, indices_tuple=lists, backend=backend)
    wanted = expected(x, y, margin, listed(lists), "hinge", "euclidean", "mean_nonzero")
    assert_same(value, wanted, x, margin)
    torch.manual_seed(3)
    assert triplet_margin_loss(x, y, margin=margin, triplets_per_anchor=2, backend=backend) > 0
    rows = triplet_margin_loss(x, y, margin=margin, reduction="none", backend=backend)
    up = torch.linspace(0.5, 2.0, N, dtype=torch.float64)
    triplets = every(y)
    of_rows = [
        expected(x, y, margin, triplets[:, triplets[0] == i], "hinge", "euclidean", "sum") for i in range(N)
    ]
    of_rows = torch.stack(of_rows)
    assert_same((rows * up).sum(), (of_rows * up).sum(), x, margin)


@pytest.mark.check
@TERMS
@pytest.mark.parametrize("shape", [(), (1,), (CLASSES,)], ids=str)
def test_gradcheck(shape, term):
    x, y = batch()
    margin = nn.Parameter(torch.full(shape, 0.23, dtype=torch.float64))
    for swap in (False, True):
        loss_fn = TripletMarginLoss(margin, smooth_loss=term == "softplus", reduction="sum", swap=swap)
        assert torch.autograd.gradcheck(lambda *_, f=loss_fn: f(x, y), [margin, x.requires_grad_()])


@TERMS
def test_equal_margins_are_one_margin(term):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x, y = batch(dtype)
        leaf = x.requires_grad_()
        number = TripletMarginLoss(0.25, smooth_loss=term == "softplus")
        many = TripletMarginLoss(torch.full((CLASSES,), 0.25), smooth_loss=term == "softplus")
        for got, want in zip(*(torch.autograd.grad(f(leaf, y), leaf) for f in (many, number)), strict=True):
            assert torch.equal(got, want)
        assert torch.equal(many(x, y), number(x, y))


def test_many_positives():
    """Classes so large that runs of sorted positives are searched."""
    x, y = batch(n=200)
    y = y % 2
    x.requires_grad_()
    for smooth in (False, True):
        found = []
        for backend in ("auto", "reference"):
            margin = nn.Parameter(torch.tensor([0.05, 0.6], dtype=torch.float64))
            value = triplet_margin_loss(x, y, margin=margin, smooth_loss=smooth, backend=backend)
            found.append([value.detach(), *torch.autograd.grad(value, (x, margin))])
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


# --- As a parameter of the module


def test_a_parameter_of_the_module():
    x, y = batch(torch.float32)
    loss_fn = TripletMarginLoss(margins(torch.float32), smooth_loss=True)
    assert [*dict(loss_fn.named_parameters())] == ["margin"]
    assert loss_fn.state_dict().keys() == {"margin"}
    loss_fn(x, y).backward()
    absent = torch.bincount(y, minlength=CLASSES) == 0
    assert ((loss_fn.margin.grad > 0) == ~absent).all()
    assert "margin=tensor of 7" in repr(loss_fn)
    for other in (copy.deepcopy(loss_fn), pickle.loads(pickle.dumps(loss_fn))):
        assert torch.equal(other(x, y), loss_fn(x, y))
        assert other.margin is not loss_fn.margin
    file = io.BytesIO()
    torch.save(loss_fn.state_dict(), file)
    file.seek(0)
    other = TripletMarginLoss(nn.Parameter(torch.zeros(CLASSES)), smooth_loss=True)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x, y), loss_fn(x, y))
    assert loss_fn.double().margin.dtype == torch.float64
    assert loss_fn(x, y).dtype == torch.float32


def test_set_later():
    x, y = batch()
    loss_fn = TripletMarginLoss(0.1)
    assert not list(loss_fn.parameters())
    loss_fn.margin = margins()
    assert [*dict(loss_fn.named_parameters())] == ["margin"]
    assert torch.equal(loss_fn(x, y), triplet_margin_loss(x, y, margin=margins()))
    loss_fn.reduction = "sum"
    assert torch.equal(loss_fn(x, y), triplet_margin_loss(x, y, margin=margins(), reduction="sum"))
    loss_fn.margin = margins().detach()
    assert not list(loss_fn.parameters())
    loss_fn.margin = 0.1
    assert torch.equal(loss_fn(x, y), triplet_margin_loss(x, y, margin=0.1, reduction="sum"))


def test_it_learns():
    x, y = batch(torch.float32)
    loss_fn = TripletMarginLoss(nn.Parameter(torch.full((CLASSES,), 0.5)))
    optimizer = torch.optim.SGD(loss_fn.parameters(), 0.1)
    for _ in range(5):
        optimizer.zero_grad()
        loss_fn(x, y).backward()
        optimizer.step()
    assert (loss_fn.margin < 0.5).all()
    assert len(loss_fn.margin.detach().unique()) > 1


@pytest.mark.parametrize("mined", [False, True])
def test_compiled_once(mined):
    x, y = batch(torch.float32)
    loss_fn = TripletMarginLoss(margins(torch.float32))
    miner = BatchHardMiner() if mined else lambda x, y: None
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(x, y):
        return loss_fn(x, y, miner(x, y))

    compiled, frames = torch.compile(loss, fullgraph=True, backend=counter, dynamic=True), None
    for n in (26, 19, 22):
        with torch.no_grad():
            loss_fn.margin += 0.01
        leaf, labels = x[:n].clone().requires_grad_(), y[:n].clone()
        found = [torch.autograd.grad(f(leaf, labels), (leaf, loss_fn.margin)) for f in (compiled, loss)]
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want)
        frames = frames or counter.frame_count
    assert counter.frame_count == frames


def test_several_processes_of_one():
    x, y = batch()
    margin = margins()
    loss_fn = TripletMarginLoss(margin)
    x.requires_grad_()
    assert_same(DistributedLoss(loss_fn)(x, y), loss_fn(x, y), x, margin)


def test_memory():
    """A queue of embeddings, and the margins of its classes."""
    x, y = batch(torch.float32)
    loss_fn = TripletMarginLoss(margins(torch.float32))
    memory = dml_cuda.CrossBatchMemory(loss_fn, 5, 64)
    memory(x, y)
    value = memory(x + 0.1, y)
    value.backward()
    assert value > 0
    assert loss_fn.margin.grad.isfinite().all()


# --- What cannot be


def test_wrong_margins():
    x, y = batch(torch.float32)
    for margin, error, words in (
        (
            torch.ones(2, 2),
            ValueError,
            r"margin: expected one number, a tensor of .*\[C\], got \[2, 2\]",
        ),
        (torch.ones(7).long(), TypeError, "margin: expected a floating-point tensor, got torch.int64"),
        (torch.tensor([0.1, torch.nan]), ValueError, "margin: expected a finite number"),
        ("0.1", TypeError, "margin: expected a number"),
    ):
        with pytest.raises(error, match=words):
            triplet_margin_loss(x, y, margin=margin)
        with pytest.raises(error, match=words):
            TripletMarginLoss(margin)
        loss_fn = TripletMarginLoss()
        with pytest.raises(error, match=words):
            loss_fn.margin = margin
        assert loss_fn.margin == 0.05
    for labels in (y + 1, y - 1):
        with pytest.raises(ValueError, match=r"labels: expected classes in \[0, 7\), one for each margin"):
            triplet_margin_loss(x, labels, margin=margins())
    lists = tuple(index.clone() for index in BatchHardMiner()(x, y))
    with pytest.raises(ValueError, match="labels: expected the labels of the rows, as margin has"):
        triplet_margin_loss(x, indices_tuple=lists, margin=margins())
    assert triplet_margin_loss(x, indices_tuple=lists, margin=torch.tensor(0.1)) > 0


@BACKENDS
def test_not_a_number(backend):
    """Where the value is not looked at: compiled code."""
    x, y = batch(torch.float32)

    def loss(margin, labels):
        return triplet_margin_loss(x, labels, margin=margin, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    margin = margins(torch.float32).detach()
    assert compiled(margin, y) > 0
    assert compiled(torch.where(torch.arange(CLASSES) == int(y[0]), torch.nan, margin), y).isnan()
    assert compiled(margin, y + 1).isnan()


@pytest.mark.parametrize("n", [0, 1])
def test_no_triplets(n):
    x, y = batch(torch.float32)
    loss_fn = TripletMarginLoss(margins(torch.float32))
    leaf = x[:n].requires_grad_()
    value = loss_fn(leaf, y[:n])
    value.backward()
    assert value == 0
    assert (loss_fn.margin.grad == 0).all()
    assert (leaf.grad == 0).all()
