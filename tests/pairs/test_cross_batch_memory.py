"""Cross-batch memory: pytorch-metric-learning's results, fused, with all state in buffers."""

import copy
import io
import json
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from cases.data import make_batch, make_labels, make_points

import dml_cuda
from dml_cuda import CrossBatchMemory, MinedPairs, MultiSimilarityMiner

pml = pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")
from pytorch_metric_learning import losses, miners  # noqa: E402

import dml_cuda.pml  # noqa: E402

DIM, SIZE = 8, 100
OURS = {"multi_similarity": dml_cuda.MultiSimilarityLoss, "circle": dml_cuda.CircleLoss}
THEIRS = {"multi_similarity": losses.MultiSimilarityLoss, "circle": losses.CircleLoss}
ADAPTERS = {"multi_similarity": dml_cuda.pml.MultiSimilarityLoss, "circle": dml_cuda.pml.CircleLoss}
EVERY = pytest.mark.parametrize("loss", OURS)

# Sizes of batches that fill the queue of 100 exactly, past its end, or with the whole queue at once.
FILLS = {
    "exactly": [20] * 12,
    "past the end": [30, 45, 20, 36, 30, 45, 17, 60],
    "at once": [100, 100, 40, 100],
}


def batches(sizes, seed=0):
    """Batches of classes that come again."""
    torch.manual_seed(seed)
    centres = torch.randn(12, DIM, dtype=torch.float64)
    for n in sizes:
        labels = torch.randint(0, 12, (n,))
        yield 0.5 * centres[labels] + torch.randn(n, DIM, dtype=torch.float64), labels


def step(memory, embeddings, labels, *arguments, **options):
    leaf = embeddings.clone().requires_grad_()
    value = memory(leaf, labels, *arguments, **options)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=1e-11)
    # PML's circle loss goes through torch's softplus, which takes exp(-20) = 2e-9 for 0.
    close = 4e-9 * expected[1].abs().max().item() + 1e-15
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=close)


def compare(ours, theirs, sizes, seed=0):
    """Every step of two memories on the same batches."""
    for embeddings, labels in batches(sizes, seed):
        found, expected = (step(memory, embeddings, labels) for memory in (ours, theirs))
        assert_same(found, expected)
        assert found[1].abs().max() > 0
    assert ours.queue_idx == theirs.queue_idx
    assert ours.has_been_filled == theirs.has_been_filled
    assert torch.equal(ours.embedding_memory, theirs.embedding_memory)
    assert torch.equal(ours.label_memory, theirs.label_memory)


@EVERY
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("epsilon", [None, 0.1])
def test_as_pml(loss, fill, epsilon):
    for seed in range(4):
        miner = None if epsilon is None else MultiSimilarityMiner(epsilon)
        their_miner = None if epsilon is None else miners.MultiSimilarityMiner(epsilon)
        theirs = losses.CrossBatchMemory(THEIRS[loss](), DIM, SIZE, their_miner)
        compare(CrossBatchMemory(OURS[loss](), DIM, SIZE, miner), theirs, FILLS[fill], seed)


@EVERY
def test_mining_inside_the_loss(loss):
    theirs = losses.CrossBatchMemory(THEIRS[loss](), DIM, SIZE, miners.MultiSimilarityMiner(0.1))
    compare(CrossBatchMemory(OURS[loss](epsilon=0.1), DIM, SIZE), theirs, FILLS["past the end"])


@EVERY
@pytest.mark.parametrize(
    "miner",
    [
        lambda: miners.MultiSimilarityMiner(0.1),
        lambda: miners.TripletMarginMiner(0.1),
        lambda: miners.TripletMarginMiner(0.3, type_of_triplets="semihard"),
        lambda: miners.PairMarginMiner(0.2, 1.2),
    ],
    ids=["multi-similarity", "triplets", "semihard triplets", "pair margin"],
)
def test_miners_of_pml(loss, miner):
    theirs = losses.CrossBatchMemory(THEIRS[loss](), DIM, SIZE, miner())
    compare(CrossBatchMemory(OURS[loss](), DIM, SIZE, miner()), theirs, FILLS["past the end"])


@pytest.mark.parametrize(
    "loss",
    [
        losses.MultiSimilarityLoss,
        losses.CircleLoss,
        losses.ContrastiveLoss,
        losses.NTXentLoss,
        losses.TripletMarginLoss,
        dml_cuda.pml.MultiSimilarityLoss,
        dml_cuda.pml.CircleLoss,
    ],
)
@pytest.mark.parametrize("mined", [False, True])
def test_losses_of_pml(loss, mined):
    """They take the pairs as lists; the adapters stay fused."""
    plain = getattr(losses, loss.__name__)
    theirs = losses.CrossBatchMemory(plain(), DIM, SIZE, miners.MultiSimilarityMiner(0.1) if mined else None)
    ours = CrossBatchMemory(loss(), DIM, SIZE, MultiSimilarityMiner(0.1) if mined else None)
    compare(ours, theirs, FILLS["past the end"][:6])


@EVERY
def test_a_triplet_with_oneself_goes_whole(loss):
    """Its negative does not stay either, as a pair without a positive."""

    class First(miners.BaseMiner):
        def mine(self, embeddings, labels, ref_emb, ref_labels):
            rows = torch.arange(len(labels))
            return rows, (rows // 2) * 2, torch.full_like(rows, len(labels) - 1)

    theirs = losses.CrossBatchMemory(THEIRS[loss](), DIM, SIZE, First())
    ours = CrossBatchMemory(OURS[loss](), DIM, SIZE, First())
    for embeddings, labels in batches([21]):
        assert_same(step(ours, embeddings, labels), step(theirs, embeddings, labels))


@EVERY
@pytest.mark.parametrize("epsilon", [None, 0.1])
def test_enqueue_mask(loss, epsilon):
    """Queries and keys of two encoders: the keys enter the queue, the queries have a loss."""
    miner = None if epsilon is None else MultiSimilarityMiner(epsilon)
    their_miner = None if epsilon is None else miners.MultiSimilarityMiner(epsilon)
    ours = CrossBatchMemory(OURS[loss](), DIM, SIZE, miner)
    theirs = losses.CrossBatchMemory(THEIRS[loss](), DIM, SIZE, their_miner)
    for k, (embeddings, labels) in enumerate(batches([40] * 9)):
        mask = torch.arange(40) >= 20 if k % 2 else torch.rand(40) < 0.7
        found, expected = (step(m, embeddings, labels, enqueue_mask=mask) for m in (ours, theirs))
        assert_same(found, expected)
        assert (found[1][mask] == 0).all()
        assert found[1][~mask].abs().max() > 0
    assert ours.has_been_filled
    assert torch.equal(ours.embedding_memory, theirs.embedding_memory)


@EVERY
@pytest.mark.parametrize("form", ["pairs", "triplets", "int32 pairs"])
@pytest.mark.parametrize("epsilon", [None, 0.1])
def test_indices_tuple(loss, form, epsilon):
    """Pairs that count besides: anchors of the batch, the others places in the queue."""
    miner = None if epsilon is None else MultiSimilarityMiner(epsilon)
    their_miner = None if epsilon is None else miners.MultiSimilarityMiner(epsilon)
    ours = CrossBatchMemory(OURS[loss](), DIM, SIZE, miner)
    theirs = losses.CrossBatchMemory(THEIRS[loss](), DIM, SIZE, their_miner)
    for embeddings, labels in batches([30] * 5):
        queue_labels = ours.label_memory.clone()
        size = SIZE if ours.has_been_filled else ours.queue_idx
        same = labels[:, None] == queue_labels[None, :size]
        a, p = same.nonzero()[:, 0][:20], same.nonzero()[:, 1][:20]
        if form == "triplets":
            n = torch.stack([(~same[i]).nonzero()[0, 0] for i in a]) if len(a) else a
            given = (a, p, n)
        else:
            given = (a, p, *(~same).nonzero()[:25].T)
        if form == "int32 pairs":
            given = tuple(x.int() for x in given)
        # Labels at those places change when the batch enters the queue; PML refuses a pair of both kinds.
        places = ours.queue_idx + torch.arange(30)
        if form == "triplets":
            keep = ~torch.isin(given[1], places % SIZE) & ~torch.isin(given[2], places % SIZE)
            given = tuple(x[keep] for x in given)
        else:
            kept = [~torch.isin(given[k], places % SIZE) for k in (1, 3)]
            given = tuple(x[kept[k // 2]] for k, x in enumerate(given))
        found, expected = (step(m, embeddings, labels, given) for m in (ours, theirs))
        assert_same(found, expected)


@EVERY
def test_nothing_is_listed(loss, monkeypatch):
    def refuse(self):
        raise AssertionError("pairs were listed")

    monkeypatch.setattr(MinedPairs, "_read", refuse)
    monkeypatch.setattr(MinedPairs, "blocks", refuse)
    for module in (OURS[loss](), ADAPTERS[loss]()):
        for miner in (None, MultiSimilarityMiner(), dml_cuda.pml.MultiSimilarityMiner()):
            memory = CrossBatchMemory(module, DIM, SIZE, miner)
            for embeddings, labels in batches([60, 60]):
                value, gradient = step(memory, embeddings, labels)
            assert value > 0
            assert gradient.abs().max() > 0


@EVERY
def test_two_losses_before_one_backward(loss):
    """The queue moves on, and the first loss is still the one of its own moment."""
    memory = CrossBatchMemory(OURS[loss](), DIM, SIZE, MultiSimilarityMiner(0.1))
    for embeddings, labels in batches([60]):
        memory(embeddings, labels)
    twin = copy.deepcopy(memory)
    leaves, values, expected = [], [], []
    for embeddings, labels in batches([60, 60], seed=1):
        leaves.append(embeddings.clone().requires_grad_())
        values.append(memory(leaves[-1], labels))
        expected.append(step(twin, embeddings, labels))
    sum(values).backward()
    for leaf, value, (e, gradient) in zip(leaves, values, expected, strict=True):
        assert torch.equal(value.detach(), e)
        assert torch.equal(leaf.grad, gradient)


def test_state():
    """state_dict, deepcopy and torch.save hold the queue; a restored memory goes on where it was."""
    memory = CrossBatchMemory(dml_cuda.CircleLoss(), DIM, SIZE, MultiSimilarityMiner(0.1)).double()
    for embeddings, labels in batches([70, 50]):
        memory(embeddings, labels)
    assert memory.state_dict().keys() == {"embedding_memory", "label_memory", "position", "count"}
    file = io.BytesIO()
    torch.save(memory, file)
    file.seek(0)
    restored = CrossBatchMemory(dml_cuda.CircleLoss(), DIM, SIZE, MultiSimilarityMiner(0.1)).double()
    restored.load_state_dict(memory.state_dict())
    others = [restored, copy.deepcopy(memory), torch.load(file, weights_only=False)]
    for embeddings, labels in batches([30, 40], seed=1):
        expected = step(memory, embeddings, labels)
        for other in others:
            assert all(
                torch.equal(a, b) for a, b in zip(step(other, embeddings, labels), expected, strict=True)
            )
            assert other.queue_idx == memory.queue_idx
    memory.reset_queue()
    assert memory.queue_idx == 0
    assert not memory.has_been_filled
    assert all((x == 0).all() for x in memory.state_dict().values())
    fresh = CrossBatchMemory(dml_cuda.CircleLoss(), DIM, SIZE, MultiSimilarityMiner(0.1))
    for embeddings, labels in batches([30]):
        assert torch.equal(memory(embeddings, labels), fresh(embeddings, labels))
    assert repr(fresh).startswith("CrossBatchMemory(\n  embedding_size=8, memory_size=100\n")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtype_of_the_queue(dtype):
    """The queue takes the dtype of the embeddings, as PML's does."""
    embeddings, labels = make_batch(40, DIM, dtype=dtype)
    memory = CrossBatchMemory(dml_cuda.MultiSimilarityLoss(), DIM, SIZE, MultiSimilarityMiner(0.1))
    theirs = losses.CrossBatchMemory(losses.MultiSimilarityLoss(), DIM, SIZE)
    assert memory(embeddings, labels).dtype == dtype
    theirs(embeddings, labels)
    assert memory.embedding_memory.dtype == theirs.embedding_memory.dtype == dtype
    assert memory(embeddings, labels.to(torch.int32)).isfinite()


@EVERY
def test_compiled(loss):
    """One graph for the filling and the full queue; one more for any number of rows."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    plain = CrossBatchMemory(OURS[loss](), DIM, SIZE, MultiSimilarityMiner(0.1)).double()
    compiled = copy.deepcopy(plain)
    run = torch.compile(compiled, fullgraph=True, backend=counter)

    def both(sizes, seed):
        for embeddings, labels in batches(sizes, seed):
            assert_same(step(run, embeddings, labels), step(plain, embeddings, labels))

    both([30] * 8, seed=0)
    assert counter.frame_count == 1
    both([45, 20, 61, 100], seed=1)
    assert counter.frame_count == 2
    assert compiled.queue_idx == plain.queue_idx
    assert torch.equal(compiled.embedding_memory, plain.embedding_memory)


def test_errors():
    memory = CrossBatchMemory(dml_cuda.CircleLoss(), DIM, 10)
    embeddings, labels = make_points(make_labels(8), DIM), make_labels(8)
    mask = torch.ones(8, dtype=torch.bool)
    lists = (labels,) * 4
    for arguments, says in (
        ((embeddings[:, :5], labels), r"^embeddings: expected embedding_size=8 columns, got 5"),
        ((embeddings.repeat(2, 1), labels.repeat(2)), r"^embeddings: expected at most memory_size=10 rows"),
        ((embeddings, labels[:3]), r"^labels: expected 8"),
        ((embeddings, labels, lists, mask), r"^indices_tuple and enqueue_mask"),
        ((embeddings, labels, None, mask[:3]), r"^enqueue_mask: expected bool of shape \[8\].*\[3\]"),
        ((embeddings, labels, None, mask.long()), r"^enqueue_mask: expected bool of shape \[8\].*int64"),
    ):
        with pytest.raises(ValueError, match=says):
            memory(*arguments)
    assert memory.queue_idx == 0
    for sizes, error in (((0, 10), ValueError), ((8, -1), ValueError), ((8.0, 10), TypeError)):
        with pytest.raises(error, match=r"^(embedding|memory)_size: expected"):
            CrossBatchMemory(dml_cuda.CircleLoss(), *sizes)


# Peak resident memory is a number of the whole process: this one gets its own.
MEASURE = """
import json, resource
import torch
from dml_cuda import CrossBatchMemory, MinedPairs, MultiSimilarityLoss, MultiSimilarityMiner

def refuse(self):
    raise AssertionError("pairs were listed")

MinedPairs._read = MinedPairs.blocks = refuse
torch.manual_seed(0)

def measure(rows, size):
    memory = CrossBatchMemory(MultiSimilarityLoss(), 128, size, MultiSimilarityMiner(0.1))
    memory.embedding_memory.normal_()
    memory.label_memory.random_(size // 4)
    memory.count.fill_(size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    leaf = torch.randn(rows, 128, requires_grad=True)
    memory(leaf, torch.arange(rows) // 4).backward()
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return added, leaf.grad.abs().max().item()

measure(64, 256)  # the libraries' own buffers and threads
added, gradient = measure(512, 65_536)
print(json.dumps({"added": added, "gradient": gradient}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts other units elsewhere")
def test_a_large_queue():
    """A copy of the queue (32 MiB), the cache of tiles (64 MiB) and work space: the lists of its pairs alone
    would take 512 MiB, and the matrix with its masks and its gradient 320 MiB."""
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    measured = json.loads(run.stdout)
    assert measured["gradient"] > 0
    assert measured["added"] < 192 * 2**20, measured
