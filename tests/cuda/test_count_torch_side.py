"""Counting mined pairs on CUDA, on CPU tensors and emulated kernels, against the masks of the miner."""

import pytest
import torch
from emulator import torch_side

from dml_cuda.miners.mined_pairs import MinedPairs

pytestmark = pytest.mark.long

DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(scope="module")
def ops():
    torch_side.load("pairs")
    return torch.ops.dml_cuda_pair_loss_on_host


def batch(n, m=None, d=8, classes=5, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randn(n, d, generator=g).to(dtype), torch.randint(classes, (n,), generator=g)
    if m is None:
        return x, labels, None, None
    return x, labels, torch.randn(m, d, generator=g).to(dtype), torch.randint(classes, (m,), generator=g)


def check(ops, points, epsilon=0.1, similarity="cosine", self_index=None, num_valid_refs=None, near=0):
    options = {"similarity": similarity, "self_index": self_index, "num_valid_refs": num_valid_refs}
    expected = torch.stack(MinedPairs(*points, epsilon=epsilon, **options).pair_counts())
    found = ops.count_pairs(*points, self_index, num_valid_refs, epsilon, similarity)
    assert found.dtype == torch.int64
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= near
    return found


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "euclidean_raw"])
@pytest.mark.parametrize("epsilon", [0.1, 0.0, None])
@pytest.mark.parametrize(("n", "m"), [(70, None), (40, 90), (1, 3), (2, None)])
def test_as_the_masks(ops, n, m, epsilon, similarity):
    counts = check(ops, batch(n, m), epsilon, similarity)
    assert n < 3 or counts.sum(1).min() > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [None, 70])
def test_dtypes_and_strides(ops, dtype, m):
    x, *rest = batch(50, m, 9, dtype=dtype)
    check(ops, (x, *rest), near=1)  # a pair at a bound may fall on either side of it
    check(ops, (x.repeat(1, 2)[:, ::2].contiguous().T.contiguous().T, *rest), near=1)


def test_references_that_are_rows_or_not_in_use(ops):
    x, labels, *_ = batch(60)
    refs = torch.cat([x, 2 * x[:30]]), torch.cat([labels, labels[:30]])
    own = torch.arange(60)
    own[::7] = -1
    check(ops, (x, labels, *refs), self_index=own)
    for valid in (0, 1, 45, 90):
        check(ops, (x, labels, *refs), self_index=own, num_valid_refs=torch.tensor(valid))


def test_rows_longer_than_a_warp_takes(ops):
    check(ops, batch(6, 2100, 4, classes=3, dtype=torch.float32), near=1)


def test_more_rows_than_memory_holds(ops):
    """Similarities of 32 MiB at once: two blocks of rows."""
    x, labels, *_ = batch(2950, d=4, classes=300, dtype=torch.float32)
    check(ops, (x, labels, None, None), near=1)


def test_no_rows_or_columns(ops):
    for n, m in ((0, None), (0, 4), (4, 0)):
        assert torch.equal(ops.count_pairs(*batch(n, m), None, None, 0.1, "cosine"), torch.zeros(2, n).long())


@pytest.mark.parametrize("m", [None, 30])
def test_not_finite(ops, m):
    """Every pair counts then, of rows that have both kinds."""
    x, labels, r, ref_labels = batch(20, m)
    labels[7] = 99
    (x if r is None else r)[3, 2] = torch.nan
    counts = ops.count_pairs(x, labels, r, ref_labels, None, None, 0.1, "cosine")
    columns = labels if r is None else ref_labels
    same = labels[:, None] == columns[None, :]
    positives = same.sum(1) - int(r is None)
    negatives = (~same).sum(1)
    both = (positives > 0) & (negatives > 0)
    assert torch.equal(counts, torch.stack([positives, negatives]) * both)


def test_bad_arguments(ops):
    x, labels, *_ = batch(4)
    with pytest.raises(ValueError, match="similarity: unknown"):
        ops.count_pairs(x, labels, None, None, None, None, 0.1, "manhattan")
    with pytest.raises(TypeError, match="int64"):
        ops.count_pairs(x, labels.int(), None, None, None, None, 0.1, "cosine")
