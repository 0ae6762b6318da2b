"""What a tile decides in the CPU engine: what it leaves for mining, and whether backward visits it."""

import pytest
import torch
from cases.accuracy import evaluate
from cases.data import make_batch
from cases.losses import EVERY_LOSS, LOSSES

from dml_cuda._ops.arguments import OpBatch, OpOptions

OPS = torch.ops.dml_cuda


def test_mining_sees_negatives_whose_hinge_is_satisfied():
    """Negatives below the margin add no term and count nothing, but positives are mined against them."""
    embeddings, labels = make_batch(200, 16)
    options = {"pos_margin": 1.5, "neg_margin": 1.5, "similarity": "cosine", "epsilon": 2.5}
    options |= {"reduction": "mean_nonzero"}
    function = LOSSES["contrastive"].function
    value, gradient, _ = evaluate(function, embeddings, labels, **options, backend="fused")
    expected = evaluate(function, embeddings, labels, **options, backend="reference")
    assert value > 0.1
    torch.testing.assert_close(value, expected[0])
    torch.testing.assert_close(gradient, expected[1])


def test_terms_of_zero_with_a_derivative():
    """Positives with similarity 0 add the term 0 to SupCon's sum, but have a gradient."""
    rows = torch.arange(64)
    orthogonal = torch.eye(64, 80, dtype=torch.float64)
    others = torch.zeros(64, 80, dtype=torch.float64)
    others[rows, rows] = 0.5
    others[rows, 64 + rows % 16] = 1.0
    embeddings, labels = torch.cat([orthogonal, others]), torch.zeros(128, dtype=torch.long)
    function = LOSSES["sup_con"].function
    value, gradient, _ = evaluate(function, embeddings, labels, backend="fused")
    expected = evaluate(function, embeddings, labels, backend="reference")
    assert (expected[1][:64, :64] != 0).sum() == 64 * 63  # the gradient that such pairs give
    torch.testing.assert_close(value, expected[0])
    torch.testing.assert_close(gradient, expected[1])


@pytest.mark.parametrize(
    ("levels", "visited"), [((-2.0, 2.0), False), ((2.0, 2.0), True), ((-2.0, -2.0), True)]
)
def test_backward_skips_tiles_of_satisfied_hinges(levels, visited):
    """levels: below which a positive, above which a negative has a hinge other than 0. All pairs are kept."""
    embeddings, labels = make_batch(100, 8)
    same = (labels[:, None] == labels).sum(1)
    pairs, options = (
        torch.stack([same, 100 - same]),
        OpOptions("contrastive", list(levels), mine_self_pair=False),
    )
    state = OPS.pair_block_turn(*options, None, pairs, "start", False)
    batch = OpBatch(embeddings, labels, embeddings, labels, None, None)
    _, found = OPS.pair_block(*batch, *options, state, "both")
    assert found.bool().any() == visited


@EVERY_LOSS
@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("epsilon", [None, 0.1])
def test_a_row_without_pairs_ignores_nan(loss, backend, epsilon):
    """Every batch without pairs has the loss 0."""
    embeddings, labels = torch.full((1, 4), float("nan")), torch.zeros(1, dtype=torch.long)
    assert loss.function(embeddings, labels, epsilon=epsilon, backend=backend) == 0
