"""The losses, the miner and the memory within PyTorch: transforms, compilers, processes, devices."""

import pytest
import torch
import torch._dynamo.testing
from cases.accuracy import FUNCTIONS
from cases.data import make_batch
from distributed.two_ranks import run_two_ranks
from torch.autograd import forward_ad

import dml_cuda
from dml_cuda import (
    CircleClassifierLoss,
    CircleLoss,
    CrossBatchMemory,
    MinedPairs,
    MultiSimilarityLoss,
    MultiSimilarityMiner,
    functional,
)

META = torch.device("meta")
MODULES = {"multi_similarity": MultiSimilarityLoss, "circle": CircleLoss}
EVERY = pytest.mark.parametrize("loss", MODULES)

# How a batch's pairs are told to a loss.
WAYS = ("labels", "epsilon", "mined", "listed")
EVERY_WAY = pytest.mark.parametrize("way", WAYS)


def as_function_of_embeddings(loss, way, labels, mined_from, **options):
    function, miner = getattr(functional, FUNCTIONS[loss]), MultiSimilarityMiner(0.1)
    lists = tuple(miner(mined_from, labels))

    def value(x):
        if way == "labels":
            return function(x, labels, **options)
        if way == "epsilon":
            return function(x, labels, epsilon=0.1, **options)
        pairs = miner(x, labels) if way == "mined" else lists
        return function(x, labels, indices_tuple=pairs, **options)

    return value


@EVERY
@EVERY_WAY
def test_func_grad(loss, way, monkeypatch):
    embeddings, labels = make_batch(40, 6)
    value = as_function_of_embeddings(loss, way, labels, embeddings)
    leaf = embeddings.clone().requires_grad_()
    (expected,) = torch.autograd.grad(value(leaf), leaf)
    monkeypatch.setattr(MinedPairs, "_read", lambda self: pytest.fail("pairs were listed"))
    gradient, found = torch.func.grad_and_value(value)(embeddings)
    assert torch.equal(found, value(embeddings))
    torch.testing.assert_close(gradient, expected)
    assert torch.equal(torch.func.vjp(value, embeddings)[1](torch.ones(()))[0], gradient)


@EVERY
def test_functional_call(loss):
    """The gradient of a network's parameters, and of references."""
    inputs, labels = make_batch(40, 12)
    layer, module = torch.nn.Linear(12, 6), MODULES[loss](epsilon=0.1)

    def value(parameters, refs):
        x = torch.func.functional_call(layer, parameters, inputs)
        return module(x, labels, ref_emb=refs, ref_labels=labels)

    refs = torch.randn(40, 6, requires_grad=True)
    parameters = {name: x.detach() for name, x in layer.named_parameters()}
    gradients, to_refs = torch.func.grad(value, argnums=(0, 1))(parameters, refs.detach())
    value(dict(layer.named_parameters()), refs).backward()
    torch.testing.assert_close(gradients["weight"], layer.weight.grad)
    torch.testing.assert_close(to_refs, refs.grad)


@EVERY
@EVERY_WAY
def test_vmap_and_forward_mode_are_refused(loss, way):
    embeddings, labels = make_batch(20, 6)
    value = as_function_of_embeddings(loss, way, labels, embeddings)
    stack = embeddings.expand(3, 20, 6) + 0
    for function in (value, torch.func.grad(value)):
        with pytest.raises(NotImplementedError, match=r'one batch at a time, not torch\.vmap.*"reference"'):
            torch.func.vmap(function)(stack)
    refused = pytest.raises(NotImplementedError, match=r'no forward-mode derivative.*"reference"')
    with refused:
        torch.func.jvp(value, (embeddings,), (embeddings,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(embeddings, embeddings)
        with refused:
            value(dual)
        assert torch.equal(value(embeddings), value(embeddings.clone()))  # of no dual, it is no matter


@EVERY
def test_the_reference_takes_vmap_and_forward_mode(loss):
    """As the errors say."""
    embeddings, labels = make_batch(20, 6, dtype=torch.float64)
    value = as_function_of_embeddings(loss, "epsilon", labels, embeddings, backend="reference")
    stack = torch.randn(3, 20, 6, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(value)(stack), torch.stack([value(x) for x in stack]))
    _, derivative = torch.func.jvp(value, (embeddings,), (stack[0],))
    torch.testing.assert_close(derivative, (torch.func.grad(value)(embeddings) * stack[0]).sum())


@EVERY
@EVERY_WAY
def test_second_derivatives_are_refused(loss, way):
    embeddings, labels = make_batch(20, 6, dtype=torch.float64)
    value = as_function_of_embeddings(loss, way, labels, embeddings)
    with pytest.raises(RuntimeError, match=r'second derivative.*backend="reference"'):
        torch.func.grad(lambda x: torch.func.grad(value)(x).square().sum())(embeddings)
    leaf = embeddings.requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r'second derivative.*backend="reference"'):
        gradient.square().sum().backward()


@EVERY
@EVERY_WAY
def test_a_whole_training_step_compiled(loss, way):
    """One graph with the layer, the miner and the loss; a second for any number of rows; no third."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    layer, module, miner = torch.nn.Linear(12, 6), MODULES[loss](), MultiSimilarityMiner(0.1)
    inside = MODULES[loss](epsilon=0.1)

    def step(inputs, labels, *lists):
        x = layer(inputs)
        if way == "labels":
            return module(x, labels)
        if way == "epsilon":
            return inside(x, labels)
        return module(x, labels, miner(x, labels) if way == "mined" else lists)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for n in (20, 45, 300, 131):
        inputs, labels = make_batch(n, 12)
        lists = tuple(miner(layer(inputs).detach(), labels)) if way == "listed" else ()
        results = []
        for run in (step, compiled):
            layer.zero_grad()
            value = run(inputs, labels, *lists)
            value.backward()
            results.append((value.detach(), layer.weight.grad))
        torch.testing.assert_close(results[1], results[0])
        assert results[1][1].abs().max() > 0
    assert counter.frame_count == 2


@EVERY
@EVERY_WAY
def test_deterministic_algorithms(loss, way):
    """Accepted, forward and backward; that they fill memory that is not set with NaN changes nothing."""
    embeddings, labels = make_batch(140, 6)
    value = as_function_of_embeddings(loss, way, labels, embeddings)

    def run():
        leaf = embeddings.clone().requires_grad_()
        result = value(leaf)
        return result.detach(), torch.autograd.grad(result, leaf)[0]

    expected = run()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        found = run()
        memory = CrossBatchMemory(MODULES[loss](), 6, 200, MultiSimilarityMiner(0.1))
        assert memory(embeddings.requires_grad_(), labels).isfinite()
        MultiSimilarityMiner(pair_counts=True)(embeddings, labels)[0].pos_anchors.sum()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@EVERY
@EVERY_WAY
@pytest.mark.parametrize("short", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_with_references_in_full_precision(loss, way, short):
    """A layer's short embeddings meet float32 references, or the other way round: float32 is computed."""
    points = [x for x, _ in (make_batch(30, 6, dtype=short), make_batch(40, 6))]
    labels, ref_labels = torch.arange(30) // 4, torch.arange(40) // 4
    function, miner = getattr(functional, FUNCTIONS[loss]), MultiSimilarityMiner(0.1)
    lists = tuple(miner(points[0].float(), labels, points[1], ref_labels))

    def value(x, y):
        refs = {"ref_emb": y, "ref_labels": ref_labels}
        if way in ("labels", "epsilon"):
            return function(x, labels, epsilon=0.1 if way == "epsilon" else None, **refs)
        pairs = miner(x, labels, y, ref_labels) if way == "mined" else lists
        return function(x, labels, indices_tuple=pairs, **refs)

    expected_leaves = [p.float().requires_grad_() for p in points]
    expected = value(*expected_leaves)
    leaves = [p.clone().requires_grad_() for p in points]
    with torch.autocast("cpu", torch.bfloat16):
        found = value(*leaves)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found, leaves)
    for g, e, p in zip(gradients, torch.autograd.grad(expected, expected_leaves), points, strict=True):
        assert g.dtype == p.dtype
        torch.testing.assert_close(g, e.to(p.dtype), rtol=1e-2 if p.dtype == short else 1e-5, atol=1e-6)


@pytest.mark.parametrize("short", [torch.bfloat16, torch.float16], ids=str)
def test_memory_and_weights_under_autocast(short):
    embeddings, labels = make_batch(30, 6, dtype=short)
    memory = CrossBatchMemory(MultiSimilarityLoss(), 6, 100, MultiSimilarityMiner(0.1))
    leaf = embeddings.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            value = memory(leaf, labels)
    assert value.dtype == torch.float32
    value.backward()
    assert leaf.grad.dtype == short
    assert memory.embedding_memory.dtype == short


@EVERY
def test_labels_elsewhere_are_moved(loss):
    """Labels on the CPU beside embeddings on another device, as PML moves them."""
    embeddings, labels = make_batch(20, 6)
    x, refs = embeddings.to(META), {"ref_emb": embeddings.to(META), "ref_labels": labels}
    module, miner = MODULES[loss](backend="reference"), MultiSimilarityMiner()
    pairs = miner(x, labels, **refs)
    assert pairs.labels.device == pairs.ref_labels.device == META
    for value in (module(x, labels), module(x, labels, **refs), module(x, labels, pairs, **refs)):
        assert value.device == META
    lists = (labels, labels, labels, labels)
    assert module(x, labels, lists).device == META
    head = CircleClassifierLoss(5, 6, backend="reference").to(META)
    assert head(x, labels).device == META
    memory = CrossBatchMemory(module, 6, 100, MultiSimilarityMiner())
    assert memory(x, labels).device == META
    assert memory.label_memory.device == memory.count.device == META


# One of two processes.
RANK = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from dml_cuda import CircleClassifierLoss, CrossBatchMemory, MultiSimilarityLoss, MultiSimilarityMiner

torch.set_num_threads(1)
rank = int(sys.argv[1])
inputs, labels = torch.randn(2, 24, 12, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 8


def memory():
    return CrossBatchMemory(MultiSimilarityLoss(), 6, 100, MultiSimilarityMiner(0.1))


def beside():
    # A loss beside the parallel modules: every process comes to the mean of the two gradients.
    torch.manual_seed(0)
    net, head = torch.nn.Linear(12, 6), CircleClassifierLoss(8, 6, gamma=64)

    def value(net, head, x):
        embeddings = net(x)
        return memory()(embeddings, labels) + 0.1 * head(embeddings, labels)

    gradients = [torch.autograd.grad(value(net, head, x), [net.weight, head.W]) for x in inputs]
    parallel = DistributedDataParallel(net), DistributedDataParallel(head)
    value(*parallel, inputs[rank]).backward()
    for found, one, other in zip((net.weight.grad, head.W.grad), *gradients):
        assert found.abs().max() > 0
        torch.testing.assert_close(found, (one + other) / 2)


class Whole(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.loss = torch.nn.Linear(12, 6), memory()

    def forward(self, x):
        return self.loss(self.net(x), labels)


def inside():
    # A loss inside: its queue is in buffers, and rank 0 hands them on before each step.
    whole = Whole()
    parallel = DistributedDataParallel(whole)
    for _ in range(2):
        whole.zero_grad()
        parallel(inputs[rank]).backward()
    assert whole.loss.queue_idx == 48
    first = whole.loss.embedding_memory[:24].clone()
    gathered = [torch.empty_like(first) for _ in range(2)]
    dist.all_gather(gathered, first)
    assert torch.equal(*gathered)


dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
beside()
inside()
dist.destroy_process_group()
"""


def test_distributed_data_parallel(tmp_path):
    run_two_ranks(RANK, tmp_path)


@pytest.mark.check
def test_public_names():
    for name in (
        "MultiSimilarityMiner",
        "MinedPairs",
        "PairCounts",
        "CrossBatchMemory",
        "CircleClassifierLoss",
    ):
        assert name in dml_cuda.__all__
        assert getattr(dml_cuda, name).__doc__
