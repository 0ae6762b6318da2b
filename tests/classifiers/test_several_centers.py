"""The kernels of classes with several centres, on every instruction set, against the reference in float64."""

import pytest
import torch

import dml_cuda

HEADS = {
    "SoftTripleLoss": {"centers_per_class": 3, "tau": 0.2},
    "SubCenterArcFaceLoss": {"sub_centers": 3},
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("n", "classes", "dim"), [(1, 1, 3), (17, 7, 5), (64, 333, 40)])
@pytest.mark.parametrize("name", HEADS)
def test_as_the_reference(name, n, classes, dim, dtype, tolerance, instruction_set):
    """333 classes are no multiple of the chunk that a row's loop takes; some rows have no class."""
    head = getattr(dml_cuda, name)(classes, dim, **HEADS[name]).to(dtype)
    truth = getattr(dml_cuda, name)(classes, dim, backend="reference", **HEADS[name]).double()
    truth.load_state_dict({key: value.double() for key, value in head.state_dict().items()})
    embeddings = torch.randn(n, dim, dtype=dtype)
    labels = torch.randint(-1, classes, (n,))
    found = []
    for loss_fn in (head, truth):
        points = embeddings.to(next(loss_fn.parameters()).dtype, copy=True).requires_grad_()
        loss = loss_fn(points, labels)
        loss.backward()
        found.append([loss.detach(), points.grad, next(loss_fn.parameters()).grad])
    for ours, exact in zip(*found, strict=True):
        bound = tolerance * max(1.0, exact.abs().max().item())
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=bound)
