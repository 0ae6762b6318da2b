"""Memory: no N x N matrix, whatever the batch, and what exceeds the tile cache is recomputed exactly."""

import json
import subprocess
import sys

import pytest
import torch
from cases.accuracy import FUNCTIONS, assert_as_accurate, evaluate, reference
from cases.data import make_batch

from dml_cuda import functional
from dml_cuda._ops.arguments import OpOptions

pytestmark = pytest.mark.slow(45)

# Peak resident memory is a number of the whole process and never falls: each measurement gets its own.
MEASURE = """
import json, resource, sys
import torch
from dml_cuda import functional

n, dim = 32_768, 64
torch.set_num_threads(int(sys.argv[2]))
torch.manual_seed(0)
labels = torch.arange(n) // 4
embeddings = torch.randn(n // 4, dim).repeat_interleave(4, 0) + torch.randn(n, dim)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def step(rows):
    leaf = embeddings[:rows].clone().requires_grad_()
    loss = getattr(functional, sys.argv[1])(leaf, labels[:rows], epsilon=0.1)
    loss.backward()
    return loss.item(), leaf.grad.abs().max().item()

step(256)  # the libraries' own buffers and threads
before = peak()
loss, gradient = step(n)
print(json.dumps({"added": peak() - before, "loss": loss, "gradient": gradient}))
"""


def measured(name, threads):
    command = [sys.executable, "-c", MEASURE, name, str(threads)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts other units elsewhere")
@pytest.mark.parametrize(
    ("name", "threads"), [("multi_similarity_loss", 1), ("multi_similarity_loss", 16), ("circle_loss", 2)]
)
def test_a_batch_whose_matrix_would_take_4_gigabytes(name, threads):
    """Beyond the 64 MiB of similarities that are kept for backward, and what grows with the rows and not
    their square (leaf, gradient, both as the tiles have them, and 100 bytes a row), 32 MiB at most."""
    rows, dim = 32_768, 64
    of_rows = rows * (5 * dim * 4 + 100)
    step = measured(name, threads)
    assert step["added"] < of_rows + (64 + 32) * 2**20 < 256 * 2**20
    assert step["loss"] > 0
    assert step["gradient"] > 0


@pytest.mark.parametrize(("loss", "epsilon"), [("multi_similarity", 0.1), ("circle", None)])
def test_more_tiles_than_the_cache_holds(loss, epsilon):
    """4600 rows of float64 need 83 MB for half their similarities; the cache has 64 MiB."""
    embeddings, labels = make_batch(4600, 8, dtype=torch.float64, spread=0.5)
    name = FUNCTIONS[loss]
    batch = embeddings, labels, None, None, None, None, None
    arguments = OpOptions(loss, [2.0, 50.0, 0.5], epsilon, save_for_backward=True)
    saved = torch.ops.dml_cuda.pair_loss(*batch, *arguments)[1]
    assert saved.numel() < 65 * 2**20
    assert 4600 * 4600 / 2 * 8 > 65 * 2**20
    del saved
    options = {"epsilon": epsilon, "reduction": "mean"}
    fused = evaluate(getattr(functional, name), embeddings, labels, **options)
    truth = evaluate(reference(name), embeddings, labels, **options)
    assert_as_accurate("loss", fused[0], truth[0], truth[0])
    assert_as_accurate("gradient", fused[1], truth[1], truth[1])


@pytest.mark.parametrize("loss", FUNCTIONS)
def test_rectangular_beyond_the_cache(loss):
    embeddings, labels = make_batch(700, 5, dtype=torch.float64)
    ref_emb, ref_labels = make_batch(13_000, 5, dtype=torch.float64)
    assert 700 * 13_000 * 8 > 65 * 2**20
    name, options = FUNCTIONS[loss], {"ref_emb": ref_emb, "ref_labels": ref_labels}
    fused = evaluate(getattr(functional, name), embeddings, labels, **options)
    truth = evaluate(reference(name), embeddings, labels, **options)
    for what, a, t in zip(("loss", "gradient", "gradient to ref_emb"), fused, truth, strict=True):
        assert_as_accurate(what, a, t, t)
