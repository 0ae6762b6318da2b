"""Parity with pytorch-metric-learning: the same loss and gradient, with and without its miner."""

import pytest
import torch
from cases.data import LABELS, make_batch, make_labels, make_points
from cases.losses import LOSSES

pml = pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")
from pytorch_metric_learning import distances, losses, miners, reducers  # noqa: E402

DISTANCES = {
    "cosine": (distances.CosineSimilarity, {"similarity": "cosine"}),
    "dot": (
        lambda: distances.DotProductSimilarity(normalize_embeddings=False),
        {"similarity": "dot"},
    ),
    "euclidean": (distances.LpDistance, {"similarity": "euclidean"}),
    "euclidean, rows as they come": (
        lambda: distances.LpDistance(normalize_embeddings=False),
        {"similarity": "euclidean", "normalize_embeddings": False},
    ),
}
# Its circle loss takes cosines alone; its NT-Xent loss of the others ends at -log(the smallest number).
OF_COSINES = ("circle", "nt_xent", "tuplet_margin")
# It crosses positive pairs with negative pairs.
CROSSED = ("nt_xent", "tuplet_margin")
PAIRS = {
    f"{loss.name}, {options}": (loss, options)
    for loss in LOSSES.values()
    if loss.pml is not None
    for options in loss.cases
}
EVERY = pytest.mark.parametrize("name", PAIRS)


def with_epsilon(*values):
    """Every loss with each of these; without mining alone where a miner's pairs only weigh the rows."""
    cases = [(name, e) for name, (loss, _) in PAIRS.items() for e in values if e is None or loss.pml_mines]
    return pytest.mark.parametrize(("name", "epsilon"), cases)


def their_distance(loss, distance=None):
    """``{"distance": ...}`` by name; by default that of their class."""
    if distance is None:
        return {}
    if loss.pml_squares and distance.startswith("euclidean"):
        return {"distance": distances.LpDistance(power=2, normalize_embeddings=distance == "euclidean")}
    return {"distance": DISTANCES[distance][0]()}


def value_and_gradients(loss_fn, embeddings, labels, miner=None, ref_emb=None, ref_labels=None):
    leaves = [embeddings.clone().requires_grad_()]
    if ref_emb is not None:
        leaves.append(ref_emb.clone().requires_grad_())
    columns = {"ref_emb": leaves[1], "ref_labels": ref_labels} if ref_emb is not None else {}
    indices = None if miner is None else miner(leaves[0], labels, **columns)
    value = loss_fn(leaves[0], labels, indices, **columns)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def compare(name, embeddings, labels, epsilon, *, reducer=None, reduction=None, distance=None, **columns):
    loss, options = PAIRS[name]
    theirs, shared, measured = getattr(losses, loss.pml), {}, {}
    if reduction is not None:
        shared["reduction"] = reduction
    if distance is not None:
        shared, measured = shared | DISTANCES[distance][1], their_distance(loss, distance)
    miner = None
    if epsilon is not None:
        # PML's miner has a distance of its own, the cosine by default; a loss that mines uses its own.
        kind = distance or ("euclidean" if loss.similarity == "euclidean" else "cosine")
        miner = miners.MultiSimilarityMiner(epsilon=epsilon, distance=DISTANCES[kind][0]())
    mine = loss.module(**options, epsilon=epsilon, backend="fused", **shared)
    actual = value_and_gradients(mine, embeddings, labels, **columns)
    their = theirs(**options, reducer=reducer, **measured)
    expected = value_and_gradients(their, embeddings, labels, miner, **columns)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-9, atol=1e-11)
    for a, e in zip(actual[1:], expected[1:], strict=True):
        # PML's circle loss goes through torch's softplus, which takes exp(-20) = 2e-9 for 0.
        relative = 4e-9 if theirs is losses.CircleLoss else 1e-11
        torch.testing.assert_close(a, e, rtol=0, atol=relative * e.abs().max().item() + 1e-15)
    return actual


@pytest.mark.check
@with_epsilon(None, 0.1, 0.0)
def test_many_batches(name, epsilon):
    for seed in range(25):
        torch.manual_seed(seed)
        loss, kind = PAIRS[name][0].name, LABELS[seed % 4]
        # PML's SupCon is 0 where no row at all has a negative, its NCA NaN where none has a positive.
        n = int(torch.randint(2, 60 if loss in CROSSED else 170, ()))
        if (loss, kind) in (("sup_con", "one"), ("nca", "distinct")):
            continue
        spread = (0.3, 1.0)[seed % 2]
        value, *_ = compare(name, *make_batch(n, 12, kind, torch.float64, spread), epsilon)
        assert torch.isfinite(value)


@with_epsilon(None, 0.1)
def test_ref_emb(name, epsilon):
    # Of one row, or without any positive, PML's NCA has no gradient.
    for n, m in ((1 if PAIRS[name][0].name != "nca" else 2, 9), (40, 150), (150, 40)):
        labels, ref_labels = make_labels(n), make_labels(m)
        ref_labels[0] = labels[0]
        points = make_points(torch.cat([labels, ref_labels]), 10, torch.float64)
        compare(name, points[:n], labels, epsilon, ref_emb=points[n:], ref_labels=ref_labels)


@EVERY
@pytest.mark.parametrize("reduction", ["mean", "mean_nonzero", "sum"])
def test_reducers(name, reduction):
    reducer = {
        "mean": reducers.MeanReducer(),
        "mean_nonzero": reducers.AvgNonZeroReducer(),
        "sum": reducers.SumReducer(),
    }[reduction]
    labels = torch.cat([make_labels(60), torch.arange(100, 110)])
    embeddings = make_points(labels, 10, torch.float64)
    epsilon = 0.1 if PAIRS[name][0].pml_mines else None
    compare(name, embeddings, labels, epsilon, reducer=reducer, reduction=reduction)


@pytest.mark.parametrize("distance", DISTANCES)
@with_epsilon(None, 0.1)
def test_distances(name, distance, epsilon):
    if PAIRS[name][0].name in OF_COSINES and distance != "cosine":
        pytest.skip("not in pytorch-metric-learning, or not beyond a limit")
    labels, ref_labels = make_labels(40), make_labels(50)
    points = 0.5 * make_points(torch.cat([labels, ref_labels]), 10, torch.float64)
    compare(name, points[:40], labels, epsilon, distance=distance)
    refs = {"ref_emb": points[40:], "ref_labels": ref_labels}
    compare(name, points[:40], labels, epsilon, distance=distance, **refs)


@pytest.mark.parametrize("name", [name for name in PAIRS if PAIRS[name][0].name not in CROSSED])
def test_float32(name):
    """In PML users' own dtype, on PML's own benchmark shape."""
    embeddings, labels = make_batch(512, 128)
    loss, options = PAIRS[name]
    actual = value_and_gradients(loss.module(**options), embeddings, labels)
    expected = value_and_gradients(getattr(losses, loss.pml)(**options), embeddings, labels)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=0)
    largest = expected[1].abs().max().item()
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=1e-4 * largest)
