"""The ops on blocks of columns on a GPU, against those of the CPU; a ring of one process there."""

import pytest
import torch
from cases.losses import ON_CUDA, SIMILARITIES
from cuda.test_cuda import pytestmark as needs_gpu
from cuda.test_ring_torch_side import Batch, check

from dml_cuda.distributed import DistributedLoss

pytestmark = needs_gpu
OPS = torch.ops.dml_cuda
SIZES = {"n": 300, "others": (700, 0, 1), "d": 33}


@pytest.mark.parametrize("epsilon", [None, 0.1], ids=["all", "mined"])
@pytest.mark.parametrize("loss", ON_CUDA.values(), ids=ON_CUDA)
def test_as_the_ops_of_the_cpu(loss, epsilon):
    for similarity in SIMILARITIES:
        how = loss.name, loss.params(similarity, **loss.smooth), epsilon, similarity
        expected = Batch(**SIZES).around(OPS, "cpu", *how)
        found = Batch(**SIZES, device="cuda").around(OPS, "cuda", *how)
        check([x.cpu() for x in found], expected, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_under_a_cuda_graph(dtype):
    how = "multi_similarity", [2.0, 50.0, 0.5], 0.1
    batch = Batch(**SIZES, dtype=dtype, device="cuda")
    first = batch.around(OPS, "cuda", *how)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = batch.around(OPS, "cuda", *how)
    for _ in range(2):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, first, strict=True))


@pytest.mark.parametrize("epsilon", [None, 0.1], ids=["all", "mined"])
@pytest.mark.parametrize("loss", ON_CUDA.values(), ids=ON_CUDA)
def test_a_ring_of_one_process(loss, epsilon):
    """As the loss itself."""
    batch = Batch(**SIZES, device="cuda")
    one = loss.module(epsilon=epsilon)
    results = []
    for module in (one, DistributedLoss(one, mode="ring")):
        x = batch.x.clone().requires_grad_()
        value = module(x, batch.labels)
        value.backward()
        results.append([value.detach().cpu(), x.grad.cpu()])
    check(*results, 1e-10)
