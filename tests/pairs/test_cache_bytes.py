"""The option ``cache_bytes``: more or fewer similarities kept for backward, with the same bits."""

import pytest
import torch
from cases.data import make_batch
from torch._subclasses.fake_tensor import FakeTensorMode

import dml_cuda
from dml_cuda._ops.arguments import OpOptions

CACHES = [0, 70_000, None, 1 << 30]


def saved_bytes(points, labels, cache, refs=None, save=True):
    cache = -1 if cache is None else cache
    options = OpOptions("circle", [0.4, 80.0, 1.0], 0.1, save_for_backward=save, cache_bytes=cache)
    batch = points, labels, refs, labels[: len(refs)] if refs is not None else None, None, None, None
    return torch.ops.dml_cuda.pair_loss(*batch, *options)[1].numel()


@pytest.mark.check
@pytest.mark.parametrize("rectangular", [False, True])
def test_gradients_do_not_depend_on_it(rectangular):
    embeddings, labels = make_batch(300, 20)
    more = {"ref_emb": embeddings[:170].clone(), "ref_labels": labels[:170]} if rectangular else {}
    results = []
    for cache in CACHES:
        leaf = embeddings.clone().requires_grad_()
        loss = dml_cuda.CircleLoss(epsilon=0.1, cache_bytes=cache)(leaf, labels, **more)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_so_much_is_saved():
    embeddings, labels = make_batch(300, 20)
    tile = 64 * 64 * 4
    none, some, most, all_of_them = (saved_bytes(embeddings, labels, cache) for cache in CACHES)
    assert some == none + 70_000 // tile * tile
    assert most == all_of_them == none + 15 * tile  # 5 tiles a side, with i <= j
    assert saved_bytes(embeddings, labels, 1 << 30, save=False) == none
    assert saved_bytes(embeddings, labels, 70_000, embeddings[:170]) == (
        saved_bytes(embeddings, labels, 0, embeddings[:170]) + 70_000 // tile * tile
    )


@pytest.mark.parametrize("cache", CACHES)
def test_fake_sizes(cache):
    embeddings, labels = make_batch(300, 20)
    real = saved_bytes(embeddings, labels, cache)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(embeddings), mode.from_tensor(labels)
        assert saved_bytes(*fake, cache) == real


def test_it_may_be_set_later():
    embeddings, labels = make_batch(300, 20)
    leaf = embeddings.clone().requires_grad_()
    loss_fn = dml_cuda.MultiSimilarityLoss()
    before = torch.autograd.grad(loss_fn(leaf, labels), leaf)
    loss_fn.cache_bytes = 0
    assert "cache_bytes=0" in repr(loss_fn)
    assert torch.equal(before[0], torch.autograd.grad(loss_fn(leaf, labels), leaf)[0])
    with pytest.raises(ValueError, match="cache_bytes"):
        loss_fn.cache_bytes = -5
