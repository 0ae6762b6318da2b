"""The eager fast path: which batches take it, and that it gives the same as the other ways."""

import copy
import threading

import pytest
import torch
from cases.data import make_batch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dml_cuda import _C, MultiSimilarityLoss, MultiSimilarityMiner
from dml_cuda._ops.arguments import OpOptions

OPTIONS = OpOptions("multi_similarity", [2.0, 50.0, 0.5])
N, M, D = 12, 7, 5


@pytest.fixture
def rows():
    return make_batch(N, D)


@pytest.fixture
def references():
    return make_batch(M, D)


def fast_path(embeddings, labels, ref_emb=None, ref_labels=None, self_index=None):
    return _C.fast_pair_loss(*OPTIONS, embeddings, labels, ref_emb, ref_labels, self_index, None, None)


class Subclass(torch.Tensor):
    pass


def made_in_inference_mode(x):
    with torch.inference_mode():
        return x.clone()


UNUSUAL = {
    "labels of 32 bits": lambda x, y, r, t: (x, y.int()),
    "labels elsewhere": lambda x, y, r, t: (x, y.to("meta")),
    "too few labels": lambda x, y, r, t: (x, y[1:]),
    "labels in two dimensions": lambda x, y, r, t: (x, y[:, None]),
    "no labels": lambda x, y, r, t: (x, None),
    "no tensor": lambda x, y, r, t: (x.tolist(), y),
    "integers": lambda x, y, r, t: (x.long(), y),
    "one dimension": lambda x, y, r, t: (x[0], y),
    "sparse": lambda x, y, r, t: (x.to_sparse(), y),
    "elsewhere": lambda x, y, r, t: (x.to("meta"), y.to("meta")),
    "a subclass": lambda x, y, r, t: (x.as_subclass(Subclass), y),
    "of inference mode": lambda x, y, r, t: (made_in_inference_mode(x), y),
    "labels of inference mode": lambda x, y, r, t: (x, made_in_inference_mode(y)),
    "references without labels": lambda x, y, r, t: (x, y, r),
    "labels without references": lambda x, y, r, t: (x, y, None, t),
    "references of another type": lambda x, y, r, t: (x, y, r.half(), t),
    "references of other dimensions": lambda x, y, r, t: (x, y, r[:, 1:], t),
    "references elsewhere": lambda x, y, r, t: (x, y, r.to("meta"), t.to("meta")),
    "too few labels of references": lambda x, y, r, t: (x, y, r, t[1:]),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_inputs_are_left_alone(rows, references, kind):
    assert fast_path(*UNUSUAL[kind](*rows, *references)) is None


def test_usual_inputs_are_taken(rows, references):
    (x, y), (r, t) = rows, references
    self_index = torch.full((N,), -1)
    for batch in ((x, y), (x, y, r, t), (x, y, r, t, self_index), (x[:0], y[:0]), (x.T.contiguous().T, y)):
        assert isinstance(fast_path(*batch), torch.Tensor)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert fast_path(torch.nn.Parameter(x.to(dtype)), y).dtype == dtype


def test_transforms_and_watchers(rows):
    x, y = rows

    def value(x):
        assert fast_path(x, y) is None
        return MultiSimilarityLoss()(x, y)

    torch.func.grad(value)(x)
    with forward_ad.dual_level():
        assert fast_path(forward_ad.make_dual(x, x), y) is None

    class Watcher(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    class Dispatcher(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    for mode in (Watcher, Dispatcher):
        seen = []
        with mode():
            MultiSimilarityLoss()(x, y)
        assert any("dml_cuda.pair_loss" in name for name in seen), mode


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("way", ["labels", "references", "mined", "epsilon"])
def test_both_ways_are_the_same(monkeypatch, rows, references, way, dtype, autocast):
    (x, y), (r, t) = rows, references
    loss = MultiSimilarityLoss(epsilon=0.1 if way == "epsilon" else None, reduction="none")

    def run():
        points = [z.to(dtype).clone().requires_grad_() for z in (x, r)]
        batch = {"references": (points[0], y, None, points[1], t)}.get(way, (points[0], y))
        if way == "mined":
            batch += (MultiSimilarityMiner()(points[0], y),)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(*batch)
        wanted = points if way == "references" else points[:1]
        return [value, *torch.autograd.grad(value.sum(), wanted)]

    found = run()
    monkeypatch.setattr(_C, "fast_pair_loss", lambda *_: None)
    for a, b in zip(found, run(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


# ---- the node of the graph --------------------------------------------------------------------------------


def test_only_what_is_asked_for(rows, references):
    (x, y), (r, t) = rows, references
    x.requires_grad_()
    r.requires_grad_()
    value = MultiSimilarityLoss()(x, y, None, r, t)
    both = torch.autograd.grad(value, (x, r), retain_graph=True)
    for k, points in enumerate((x, r)):
        (alone,) = torch.autograd.grad(value, points, retain_graph=True)
        assert torch.equal(alone, both[k])
    value.backward()
    assert torch.equal(x.grad, both[0])
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


def test_hooks_on_what_is_saved(rows):
    x, y = rows
    packed, unpacked = [], []

    def pack(tensor):
        packed.append(tensor)
        return len(packed) - 1

    def unpack(k):
        unpacked.append(k)
        return packed[k].clone()

    x.requires_grad_()
    (expected,) = torch.autograd.grad(MultiSimilarityLoss()(x, y), x)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        value = MultiSimilarityLoss()(x, y)
    assert torch.equal(torch.autograd.grad(value, x)[0], expected)
    assert len(packed) == 3  # rows, labels and the bytes for backward
    assert sorted(unpacked) == [0, 1, 2]


def test_checkpoint_anomaly_and_hooks(rows):
    x, y = rows
    x.requires_grad_()
    loss = copy.deepcopy(MultiSimilarityLoss())
    (expected,) = torch.autograd.grad(loss(x, y), x)
    value = torch.utils.checkpoint.checkpoint(loss, x, y, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(value, x)[0], expected)
    with torch.autograd.detect_anomaly(check_nan=True):
        value = loss(x, y)
        value.register_hook(lambda grad: 2 * grad)
        assert torch.equal(torch.autograd.grad(value, x)[0], 2 * expected)
    assert value.grad_fn.name() == "PairLossBackward"


def test_one_graph_from_several_threads(rows):
    x, y = rows
    x.requires_grad_()
    value = MultiSimilarityLoss()(x, y)
    (expected,) = torch.autograd.grad(value, x, retain_graph=True)
    found = []

    def go_backward():
        for _ in range(20):
            found.extend(torch.autograd.grad(value, x, retain_graph=True))

    threads = [threading.Thread(target=go_backward) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    assert all(torch.equal(grad, expected) for grad in found)
