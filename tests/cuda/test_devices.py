"""The public functions on every device that there is: what a loss, a miner or a memory makes of a batch on a
GPU is what plain PyTorch makes of it in float64 on the CPU, and nothing waits for the device.

The CPU runs the same tests, which shows that they are right where there is no GPU.
"""

import copy
from contextlib import contextmanager

import pytest
import torch
from cases.accuracy import assert_as_accurate
from cases.data import make_batch
from cases.heads import EVERY_HEAD, make_rows
from cases.losses import EVERY_LOSS, by_name
from cases.ranking import EVERY_RANKING
from torch import nn

import dml_cuda
from dml_cuda import functional
from dml_cuda.distributed import DistributedLoss
from examples import custom_losses

on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or not dml_cuda._C.cuda_archs,
    reason="needs a GPU, and dml_cuda built with its CUDA kernels",
)
GPU = pytest.param("cuda", marks=on_gpu)
EVERY_DEVICE = pytest.mark.parametrize("device", ["cpu", GPU])
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)


def moved(found, device, dtype):
    """Tensors, or a tuple of them as miners return it, on a device; floats in a dtype."""
    if isinstance(found, torch.Tensor):
        return found.to(device, dtype if found.is_floating_point() else found.dtype)
    return found if found is None else tuple(moved(x, device, dtype) for x in found)


def evaluate(loss, device, dtype, points, *rest, ref_emb=None, ref_labels=None):
    """The value, and its gradients by points, references and parameters, on the CPU."""
    loss = copy.deepcopy(loss).to(device, dtype)
    points, ref_emb = (
        x if x is None else moved(x, device, dtype).requires_grad_() for x in (points, ref_emb)
    )
    rest = [moved(x, device, dtype) for x in rest]
    value = loss(points, *rest, **references(ref_emb, moved(ref_labels, device, dtype)))
    leaves = [points, *([] if ref_emb is None else [ref_emb]), *loss.parameters()]
    return [x.detach().cpu() for x in (value, *torch.autograd.grad(value, leaves))]


def references(ref_emb, ref_labels):
    return {} if ref_emb is None else {"ref_emb": ref_emb, "ref_labels": ref_labels}


def compare(loss, device, dtype, points, *rest, **refs):
    """With plain PyTorch on the CPU, in this dtype and in float64."""
    plain = copy.deepcopy(loss)
    plain.backend = "reference"
    points = points.to(dtype).double()  # what the others see
    refs = {k: x.to(dtype).double() if x.is_floating_point() else x for k, x in refs.items()}
    found = evaluate(loss, device, dtype, points, *rest, **refs)
    same = evaluate(plain, "cpu", dtype, points, *rest, **refs)
    truth = evaluate(plain, "cpu", torch.float64, points, *rest, **refs)
    for k, (a, b, c) in enumerate(zip(found, same, truth, strict=True)):
        assert_as_accurate(f"{type(loss).__name__}, result {k}", a, b, c)


@EVERY_DEVICE
@FLOATS
@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
@EVERY_LOSS
def test_losses_of_pairs(loss, similarity, dtype, device):
    points, labels = make_batch(90, 24)
    refs = dict(zip(("ref_emb", "ref_labels"), make_batch(150, 24), strict=True))
    module = loss.module(**by_name(similarity))
    compare(module, device, dtype, points, labels)
    compare(module, device, dtype, points, labels, **refs)
    lists = tuple(dml_cuda.MultiSimilarityMiner(0.2)(points.double(), labels))
    compare(module, device, dtype, points, None, lists)


@EVERY_DEVICE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@EVERY_HEAD
def test_class_level_losses(head, dtype, device):
    module = head.make(70, 24).double()
    points, labels = make_rows(module, 50)
    labels[3] = -1
    compare(module, device, dtype, points, labels)
    logits = copy.deepcopy(module).to(device, dtype).get_logits(moved(points, device, dtype))
    torch.testing.assert_close(logits.cpu().double(), module.get_logits(points), rtol=1e-4, atol=1e-4)


@EVERY_DEVICE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [90, 3000], ids=["few", "many"])
@EVERY_LOSS
def test_parameters_that_learn_and_weights_of_rows(loss, n, dtype, device):
    """Few rows have a matrix of similarities on a GPU, many have tiles."""
    points, labels = make_batch(n, 24)
    points, weights = points.to(dtype).double(), torch.linspace(0.5, 2.0, n, dtype=torch.float64)
    values = {**loss.defaults, **loss.smooth, **loss.on_cosines}
    found = []
    for where, kind in (("cpu", torch.float64), (device, dtype)):
        learned = {name: nn.Parameter(torch.tensor(float(values[name]))) for name in loss.learnable}
        module = loss.module(**{**values, **learned}).to(where, kind)
        leaf = moved(points, where, kind).requires_grad_()
        value = module(leaf, labels.to(where), row_weights=weights.to(where, kind))
        leaves = [leaf, *module.parameters()]
        found.append([value, *torch.autograd.grad(value, leaves, torch.ones_like(value))])
    for b, a in zip(*found, strict=True):
        assert a.device.type == device
        scale = b.abs().max().item() * (1e-9 if dtype == torch.float64 else 1e-3)
        torch.testing.assert_close(a.cpu().double(), b, rtol=0, atol=scale + 1e-12)


@EVERY_DEVICE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [dml_cuda.CLIPLoss, dml_cuda.SigLIPLoss, dml_cuda.InfoNCELoss])
def test_losses_of_two_towers(kind, dtype, device):
    towers = torch.randn(2, 90, 24, dtype=torch.float64).to(dtype).double()
    weights = torch.linspace(0.5, 2.0, 90, dtype=torch.float64)
    names = ("scale", "bias") if kind is dml_cuda.SigLIPLoss else ("temperature",)
    found = []
    for where, to in (("cpu", torch.float64), (device, dtype)):
        loss = kind(**{name: nn.Parameter(torch.tensor(0.5)) for name in names}).to(where, to)
        a, b = (x.to(where, to).requires_grad_() for x in towers)
        value = loss(a, b, row_weights=weights.to(where, to))
        found.append([value, *torch.autograd.grad(value, [a, b, *loss.parameters()])])
    for b, a in zip(*found, strict=True):
        scale = b.abs().max().item() * (1e-9 if dtype == torch.float64 else 1e-4)
        torch.testing.assert_close(a.cpu().double(), b, rtol=0, atol=scale)


MINERS = {
    "none": None,
    "batch hard": dml_cuda.BatchHardMiner(),
    "easy positives": dml_cuda.BatchEasyHardMiner("easy", "hard"),
    "semi-hard": dml_cuda.TripletMarginMiner(0.1, "semihard"),
    "hard": dml_cuda.TripletMarginMiner(0.1, "hard"),
}
TRIPLETS = {
    "hinge": dml_cuda.TripletMarginLoss(0.2),
    "softplus": dml_cuda.TripletMarginLoss(0.2, smooth_loss=True),
    "margin": dml_cuda.MarginLoss(learn_beta=True, num_classes=30),
}


@EVERY_DEVICE
@FLOATS
@pytest.mark.parametrize("refs", [None, 90], ids=["square", "references"])
def test_mined_pairs_are_counted(refs, dtype, device):
    """As many as the miner lists; in short types a pair may lie on the other side of a bound."""
    points, labels = make_batch(70, 9)
    columns = () if refs is None else make_batch(refs, 9)
    batch = [moved(x, device, dtype) for x in (points, labels, *columns)]
    counts = dml_cuda.MultiSimilarityMiner(0.1, pair_counts=True)(*batch)[1]
    anchors = dml_cuda.MultiSimilarityMiner(0.1)(*(moved(x, "cpu", torch.float64) for x in batch))[::2]
    for found, rows in zip(counts, anchors, strict=True):
        more = (found.cpu() - rows.bincount(minlength=70)).abs()
        assert more.max() <= (0 if dtype == torch.float64 else 1)


@EVERY_DEVICE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("miner", MINERS)
@pytest.mark.parametrize("loss", TRIPLETS)
def test_losses_of_triplets(loss, miner, dtype, device):
    """What a lazy miner selects on the device is what it lists in float64."""
    points, labels = make_batch(90, 24)
    points = points.to(dtype).double()
    loss, miner = TRIPLETS[loss], MINERS[miner]
    truth = evaluate(loss, "cpu", torch.float64, points, labels, miner and tuple(miner(points, labels)))
    leaf = moved(points, device, dtype).requires_grad_()
    module, where = copy.deepcopy(loss).to(device, dtype), labels.to(device)
    value = module(leaf, where, miner and miner(leaf, where))
    found = value, *torch.autograd.grad(value, [leaf, *module.parameters()])
    for a, b in zip(found, truth, strict=True):
        scale = b.abs().max().item() * (1e-9 if dtype == torch.float64 else 1e-4)
        torch.testing.assert_close(a.cpu().double(), b, rtol=0, atol=scale)


@EVERY_DEVICE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["mean_valid", "none"])
@EVERY_RANKING
def test_losses_of_ranks(loss, reduction, dtype, device):
    points, labels = make_batch(90, 24)
    module = loss.module(**loss.changed, reduction=reduction)
    weights = torch.linspace(0.5, 2, 90, dtype=torch.float64)
    found = []
    for where, kind in (("cpu", torch.float64), (device, dtype)):
        leaf = moved(points.to(dtype), where, kind).requires_grad_()
        value = module(leaf, labels.to(where), row_weights=weights.to(where, kind))
        found.append((value, *torch.autograd.grad(value, leaf, torch.ones_like(value))))
    for b, a in zip(*found, strict=True):
        scale = b.abs().max().item() * (1e-9 if dtype == torch.float64 else 1e-3)
        torch.testing.assert_close(a.cpu().double(), b, rtol=0, atol=scale)


@EVERY_DEVICE
def test_draws_by_distance(device):
    """Repeat for a seed, differ from call to call, and are negatives of their anchors."""
    points, labels = (x.to(device) for x in make_batch(64, 16))
    miner = dml_cuda.DistanceWeightedMiner()
    torch.manual_seed(3)
    first, second = ([x.cpu() for x in miner(points, labels)] for _ in range(2))
    torch.manual_seed(3)
    again = [x.cpu() for x in miner(points, labels)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(a.shape != b.shape or not a.equal(b) for a, b in zip(first, second, strict=True))
    anchors, positives, negatives = first
    labels = labels.cpu()
    assert len(anchors) > 0
    assert (labels[anchors] == labels[positives]).all()
    assert (labels[anchors] != labels[negatives]).all()
    leaf = points.clone().requires_grad_()
    loss = dml_cuda.MarginLoss()(leaf, labels.to(device), miner(leaf, labels.to(device)))
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


@EVERY_DEVICE
@pytest.mark.parametrize("loss", ["pairs", "triplets", "ranks"])
def test_memory(loss, device):
    """A queue that fills, is full, and wraps."""
    loss = {
        "pairs": dml_cuda.MultiSimilarityLoss(epsilon=0.1),
        "triplets": dml_cuda.TripletMarginLoss(0.2),
        "ranks": dml_cuda.SmoothAPLoss(0.1),
    }[loss]
    memories = [
        dml_cuda.CrossBatchMemory(copy.deepcopy(loss), 16, 50).to(where, torch.float64)
        for where in ("cpu", device)
    ]
    for _ in range(5):
        points, labels = make_batch(20, 16, dtype=torch.float64)
        expected, found = (
            evaluate_in_place(memory, points.to(where), labels.to(where))
            for memory, where in zip(memories, ("cpu", device), strict=True)
        )
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-10)


def evaluate_in_place(memory, points, labels):
    leaf = points.requires_grad_()
    value = memory(leaf, labels)
    return value.detach(), *torch.autograd.grad(value, leaf)


@EVERY_DEVICE
def test_weights_of_pairs(device):
    points, labels = make_batch(40, 16, dtype=torch.float64)
    loss = dml_cuda.MultiSimilarityLoss(epsilon=0.2)
    expected = functional.pair_weights(loss, points, labels)
    found = functional.pair_weights(loss, points.to(device), labels.to(device))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b)


COMPILED = {
    "multi-similarity": dml_cuda.MultiSimilarityLoss(epsilon=0.1),
    "contrastive": dml_cuda.ContrastiveLoss(),
    "arcface": dml_cuda.ArcFaceLoss(30, 16),
    "triplets": dml_cuda.TripletMarginLoss(0.2),
    "ranks": dml_cuda.RecallAtKLoss(temperature=0.1),
}


@EVERY_DEVICE
@pytest.mark.parametrize("loss", COMPILED)
def test_compiled(loss, device):
    module = copy.deepcopy(COMPILED[loss]).to(device)
    points, labels = make_batch(40, 16)
    leaves = [points.to(device).requires_grad_() for _ in range(2)]
    eager = module(leaves[0], labels.to(device))
    compiled = torch.compile(module, fullgraph=True)(leaves[1], labels.to(device))
    torch.testing.assert_close(compiled, eager)
    gradients = [torch.autograd.grad(v, x)[0] for v, x in zip((eager, compiled), leaves, strict=True)]
    torch.testing.assert_close(*gradients)


@EVERY_DEVICE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast(dtype, device):
    points, labels = (x.to(device) for x in make_batch(60, 32))
    layer = torch.nn.Linear(32, 16).to(device)
    loss = dml_cuda.MultiSimilarityLoss(epsilon=0.1)
    with torch.autocast(device, dtype):
        embeddings = layer(points)
        value = loss(embeddings, labels)
    assert embeddings.dtype == dtype
    assert value.dtype == torch.float32
    value.backward()
    assert layer.weight.grad.isfinite().all()
    plain = loss(embeddings.detach().float(), labels)
    torch.testing.assert_close(value.detach(), plain, rtol=2e-2, atol=1e-3)


@pytest.mark.long
@EVERY_DEVICE
def test_a_formula_of_ones_own(device, tmp_path, monkeypatch):
    monkeypatch.setenv("DML_CUDA_CACHE", str(tmp_path))
    formula = dml_cuda.compile_loss(custom_losses.HERE / "unified.h")
    points, labels = make_batch(60, 16)
    compare(formula(), device, torch.float64, points, labels)
    compare(formula(), device, torch.float32, points, labels)


@EVERY_DEVICE
def test_one_process_alone(device):
    points, labels = make_batch(50, 16, dtype=torch.float64)
    loss = dml_cuda.MultiSimilarityLoss(epsilon=0.1)
    expected = evaluate(loss, "cpu", torch.float64, points, labels)
    for found, truth in zip(
        evaluate(DistributedLoss(loss), device, torch.float64, points, labels), expected, strict=True
    ):
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-11)


WAITLESS = {
    "multi-similarity": (dml_cuda.MultiSimilarityLoss(epsilon=0.1), None),
    "its miner": (dml_cuda.CircleLoss(), dml_cuda.MultiSimilarityMiner(0.1)),
    "contrastive": (dml_cuda.ContrastiveLoss(), None),
    "nt-xent": (dml_cuda.NTXentLoss(), None),
    "softmax": (dml_cuda.NormalizedSoftmaxLoss(30, 16), None),
    "proxy anchor": (dml_cuda.ProxyAnchorLoss(30, 16), None),
    "all triplets": (dml_cuda.TripletMarginLoss(), None),
    "batch hard": (dml_cuda.TripletMarginLoss(), dml_cuda.BatchHardMiner()),
    "semi-hard": (dml_cuda.TripletMarginLoss(), dml_cuda.TripletMarginMiner(0.1, "semihard")),
    "drawn": (dml_cuda.MarginLoss(), dml_cuda.DistanceWeightedMiner()),
}


@contextmanager
def no_waiting(device):
    """Where a GPU's host waits for it, an error."""
    if device != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@EVERY_DEVICE
@pytest.mark.parametrize("case", WAITLESS)
def test_nothing_waits_for_the_device(case, device):
    """Forward and backward; on a GPU also replayed as a CUDA graph, which reads its inputs anew."""
    loss, miner = WAITLESS[case]
    loss = copy.deepcopy(loss).to(device)
    points, labels = (x.to(device) for x in make_batch(100, 16))

    def step():
        leaf = points.detach().requires_grad_()
        value = loss(leaf, labels, miner(leaf, labels)) if miner else loss(leaf, labels)
        return value.detach(), *torch.autograd.grad(value, leaf)

    step()
    with no_waiting(device):
        found = step()
    assert all(x.isfinite().all() for x in found)
    if device == "cuda" and case != "drawn":  # a draw's seed is fresh at every replay
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        points.copy_(torch.randn_like(points))
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            assert torch.equal(a, b)
