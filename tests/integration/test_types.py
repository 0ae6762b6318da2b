"""What a checker of types sees: calls give tensors, options have types, and errors are found."""

import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

pytest.importorskip("mypy")

ROOT = Path(__file__).parents[2]

LOSSES = """
import torch
from typing_extensions import assert_type

import dml_cuda
from dml_cuda import functional

embeddings, labels = torch.randn(8, 4), torch.arange(8) // 2
loss_fn = dml_cuda.MultiSimilarityLoss(beta=40, epsilon=0.1, similarity="euclidean")
assert_type(loss_fn(embeddings, labels), torch.Tensor)
assert_type(functional.circle_loss(embeddings, labels, gamma=64, reduction="sum"), torch.Tensor)
assert_type(dml_cuda.CircleClassifierLoss(4, 4)(embeddings, labels), torch.Tensor)
loss_fn.alpha, loss_fn.epsilon = 3, None
loss_fn.beta = "large"  # type: ignore[assignment]
dml_cuda.CircleLoss(epsilom=0.1)  # type: ignore[call-arg]
functional.circle_loss(embeddings, labels, similarity="cosin")  # type: ignore[arg-type]
"""

MINERS = """
import torch
from typing_extensions import assert_type

import dml_cuda

embeddings, labels = torch.randn(8, 4), torch.arange(8) // 2
miner, loss_fn = dml_cuda.MultiSimilarityMiner(0.1), dml_cuda.CircleLoss()
pairs = miner(embeddings, labels)
assert_type(pairs, dml_cuda.MinedPairs)
assert_type(pairs.pos_anchors, torch.Tensor)
assert_type(pairs[2:], list[torch.Tensor])
anchors, positives, *_ = pairs
assert_type(anchors, torch.Tensor)
_, counts = dml_cuda.MultiSimilarityMiner(pair_counts=True)(embeddings, labels)
assert_type(counts.positives, torch.Tensor)
memory = dml_cuda.CrossBatchMemory(loss_fn, 4, 100, miner)
assert_type(memory(embeddings, labels), torch.Tensor)
assert_type(dml_cuda.functional.pair_weights(loss_fn, embeddings, labels).pos_weights, torch.Tensor)
memory.memory_size, memory.miner, miner.epsilon = 64, None, 0.2


def count(miner: dml_cuda.MultiSimilarityMiner) -> int:
    return miner.num_pos_pairs


miner.epsilon = "large"  # type: ignore[assignment]
"""


TRIPLETS = """
import torch
from typing_extensions import assert_type

import dml_cuda
from dml_cuda import functional

embeddings, labels = torch.randn(8, 4), torch.arange(8) // 2
loss_fn = dml_cuda.TripletMarginLoss(0.1, triplets_per_anchor=5, similarity="cosine")
assert_type(loss_fn(embeddings, labels), torch.Tensor)
margin = dml_cuda.MarginLoss(learn_beta=True, num_classes=4, reduction="mean")
assert_type(margin(embeddings, labels, dml_cuda.DistanceWeightedMiner()(embeddings, labels)), torch.Tensor)
assert_type(functional.margin_loss(embeddings, labels, beta=torch.ones(4)), torch.Tensor)
miner = dml_cuda.TripletMarginMiner(0.2, "semihard")
assert_type(miner(embeddings, labels), dml_cuda.MinedTriplets)
assert_type(dml_cuda.BatchEasyHardMiner()(embeddings, labels).positives, torch.Tensor)
assert_type(miner.num_triplets, int)
loss_fn.margin, margin.nu, miner.margin = 0.3, 0.1, 0.1
loss_fn.margin = "large"  # type: ignore[assignment]
dml_cuda.TripletMarginLoss(epsilon=0.1)  # type: ignore[call-arg]
"""


@pytest.mark.long
@pytest.mark.parametrize("script", [LOSSES, MINERS, TRIPLETS], ids=["losses", "miners", "triplets"])
def test_types(script, tmp_path):
    assert resources.files("dml_cuda").joinpath("py.typed").is_file()
    typed = tmp_path / "typed.py"
    typed.write_text(script)
    flags = ["--strict", "--follow-imports=silent", "--cache-dir", ROOT / "build/mypy"]
    check = [sys.executable, "-m", "mypy", *flags, typed]
    run = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
