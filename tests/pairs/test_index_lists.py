"""What may be passed as indices_tuple besides a tuple of tensors."""

import numpy as np
import pytest
import torch

import dml_cuda

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
Y = torch.arange(4).repeat(2)
LOSSES = {
    "pair loss": dml_cuda.MultiSimilarityLoss,
    "triplet loss": dml_cuda.TripletMarginLoss,
    "margin loss": dml_cuda.MarginLoss,
    "head": lambda: dml_cuda.ArcFaceLoss(4, 16),
    "ProxyNCA": lambda: dml_cuda.ProxyNCALoss(4, 16),
    "ProxyAnchor": lambda: dml_cuda.ProxyAnchorLoss(4, 16),
    "SoftTriple": lambda: dml_cuda.SoftTripleLoss(4, 16),
    "memory": lambda: dml_cuda.CrossBatchMemory(dml_cuda.ContrastiveLoss(), 16, 8),
}
EVERY = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)


@EVERY
@pytest.mark.parametrize("as_array", [False, True])
@pytest.mark.parametrize("columns", [3, 4])
@pytest.mark.parametrize("rows", [3, 4, 5])
def test_a_matrix_is_refused(make, as_array, rows, columns):
    """[B, 3] would be taken for a tuple of its rows."""
    matrix = torch.zeros(rows, columns, dtype=torch.long)
    with pytest.raises(
        TypeError, match=rf"indices_tuple: expected a tuple .* shape \[{rows}, {columns}\].*x\.T"
    ):
        make()(X, Y, matrix.numpy() if as_array else matrix)


@EVERY
@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_arrays_are_taken(make, dtype):
    lists = tuple(dml_cuda.BatchHardMiner()(X, Y))
    values = []
    for pairs in (lists, tuple(index.numpy().astype(dtype) for index in lists)):
        torch.manual_seed(0)
        values.append(make()(X, Y, pairs))
    torch.testing.assert_close(values[1], values[0])


@EVERY
def test_wrong_lists_are_named(make):
    for wrong, message in (
        (([0], [1], [2]), "anchors: expected an integer tensor, got list"),
        ((torch.zeros(2),) * 3, "anchors: expected int64 or int32 indices, got torch.float32"),
        (
            (torch.zeros(2, 1, dtype=torch.long),) * 4,
            r"pos_anchors: expected one dimension, got shape \[2, 1\]",
        ),
        ((torch.zeros(2, dtype=torch.long),) * 2, "got 2"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            make()(X, Y, wrong)
