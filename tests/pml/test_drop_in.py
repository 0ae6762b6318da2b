"""What a code base that comes from pytorch-metric-learning does with these classes besides calling them:
compiling, changing options, batches and buffers in between, resuming, deriving, checking types."""

import copy
import gc
import pickle
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from cases.data import make_batch

import dml_cuda
from dml_cuda import CrossBatchMemory, MinedPairs, MultiSimilarityMiner, functional

pml = pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")
from pytorch_metric_learning import distances, losses, miners, reducers  # noqa: E402

import dml_cuda.pml  # noqa: E402

ROOT = Path(__file__).parents[2]
OURS = {
    "multi_similarity": dml_cuda.MultiSimilarityLoss,
    "circle": dml_cuda.CircleLoss,
    "adapter": dml_cuda.pml.MultiSimilarityLoss,
    "adapter, other reducer": dml_cuda.pml.CircleLoss,
}
EVERY = pytest.mark.parametrize("loss", OURS)
MINERS = {"dml_cuda": MultiSimilarityMiner, "adapter": dml_cuda.pml.MultiSimilarityMiner}
EVERY_MINER = pytest.mark.parametrize("miner", MINERS)


def never_list(monkeypatch):
    def refuse(self):
        raise AssertionError("pairs were listed")

    monkeypatch.setattr(MinedPairs, "_read", refuse)


def compiled(function, **options):
    """And how many graphs it became."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    return torch.compile(function, backend=counter, **options), counter


def batches(*sizes, dim=8):
    for n in sizes:
        embeddings, labels = make_batch(n, dim, dtype=torch.float64)
        yield embeddings.requires_grad_(), labels


def value_and_gradient(function, embeddings):
    value = function(embeddings)
    return value.detach(), torch.autograd.grad(value, embeddings)[0]


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=1e-12)
    # PML's circle loss goes through torch's softplus, which takes exp(-20) = 2e-9 for 0.
    close = 4e-9 * expected[1].abs().max().item() + 1e-15
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=close)


# --- torch.compile


@EVERY
@EVERY_MINER
@pytest.mark.parametrize("refs", [False, True])
def test_an_eager_miner_and_a_compiled_loss(loss, miner, refs, monkeypatch):
    """One graph, one more for any number of rows, and no pair is listed."""
    never_list(monkeypatch)
    loss_fn, mine = OURS[loss](), MINERS[miner](0.1)
    run, counter = compiled(loss_fn, fullgraph=True)
    ref_emb, ref_labels = make_batch(24, 8, dtype=torch.float64)
    others = (ref_emb, ref_labels) if refs else ()
    for embeddings, labels in batches(32, 32, 48, 64, 40):
        pairs = mine(embeddings, labels, *others)
        found, expected = (
            value_and_gradient(lambda x, f=f, p=pairs, y=labels: f(x, y, p, *others), embeddings)
            for f in (run, loss_fn)
        )
        assert_same(found, expected)
        assert found[1].abs().max() > 0
    assert counter.frame_count == 2


def test_our_pairs_in_a_compiled_loss_of_pml():
    loss_fn = losses.ContrastiveLoss()
    run, _ = compiled(loss_fn)
    ((embeddings, labels),) = batches(32)
    pairs = MultiSimilarityMiner(0.1)(embeddings, labels)
    torch.testing.assert_close(run(embeddings, labels, pairs), loss_fn(embeddings, labels, tuple(pairs)))


@EVERY
def test_pairs_looked_at_are_lists_to_a_compiler(loss):
    """It cannot see whether the embeddings were changed since; eager code can, and says the same."""
    loss_fn = OURS[loss]()
    ((embeddings, labels),) = batches(32)
    embeddings = embeddings.detach()
    pairs = MultiSimilarityMiner(0.1)(embeddings, labels)
    lists = tuple(pairs)
    embeddings += torch.randn_like(embeddings)
    expected = loss_fn(embeddings, labels, lists)
    run, _ = compiled(loss_fn, fullgraph="adapter" not in loss)
    torch.testing.assert_close(run(embeddings, labels, pairs), expected)
    torch.testing.assert_close(loss_fn(embeddings, labels, pairs), expected)


@EVERY_MINER
def test_counts_of_a_compiled_step(miner):
    mine, plain, loss_fn = MINERS[miner](0.1), MINERS[miner](0.1), dml_cuda.CircleLoss()
    run, counter = compiled(lambda x, y: loss_fn(x, y, mine(x, y)), fullgraph=True)
    for embeddings, labels in batches(32, 40, 64):
        run(embeddings, labels).backward()
        plain(embeddings, labels)
        assert mine.num_pos_pairs == plain.num_pos_pairs > 0
        assert mine.num_neg_pairs == plain.num_neg_pairs
    assert counter.frame_count == 2


def test_schedules_of_the_miner():
    """A margin that changes at every step: few graphs, and always the right pairs."""
    miner, loss_fn = MultiSimilarityMiner(0.1), dml_cuda.MultiSimilarityLoss()
    run, counter = compiled(lambda x, y: loss_fn(x, y, miner(x, y)), fullgraph=True)
    ((embeddings, labels),) = batches(32)
    values = set()
    for step in range(12):
        miner.epsilon = 0.02 * step
        found = run(embeddings, labels)
        torch.testing.assert_close(
            found, functional.multi_similarity_loss(embeddings, labels, epsilon=miner.epsilon)
        )
        values.add(found.item())
    assert len(values) > 6
    assert counter.frame_count <= 3


@pytest.mark.parametrize("loss", ["multi_similarity", "circle", "adapter"])
def test_memory_with_dynamic_shapes(loss):
    plain = CrossBatchMemory(OURS[loss](), 8, 100, MultiSimilarityMiner(0.1)).double()
    twin = copy.deepcopy(plain)
    run, counter = compiled(twin, fullgraph=True, dynamic=True)
    for embeddings, labels in batches(30, 45, 20, 61, 100):
        found, expected = (
            value_and_gradient(lambda x, m=m, y=labels: m(x, y), embeddings) for m in (run, plain)
        )
        assert_same(found, expected)
    assert counter.frame_count <= (2 if loss == "adapter" else 1)


# --- The batch changes between miner and loss


@EVERY
@pytest.mark.parametrize("what", ["embeddings", "labels", "ref_emb", "ref_labels"])
def test_changed_in_place(loss, what):
    (e, y), (r, z) = ([x.detach() for x in batch] for batch in batches(32, 40))
    batch = {"embeddings": e, "labels": y, "ref_emb": r, "ref_labels": z}
    looked, fresh = (MultiSimilarityMiner(0.1)(*batch.values()) for _ in range(2))
    lists = [*looked]
    batch[what].add_(1)
    given = {name: x for name, x in batch.items() if what != "labels" or name != "labels"}
    loss_fn = OURS[loss]()
    with pytest.raises(RuntimeError, match=rf"^indices_tuple: .* {what} changed in place"):
        loss_fn(**given, indices_tuple=fresh)
    found = loss_fn(**given, indices_tuple=looked)
    torch.testing.assert_close(found, loss_fn(**given, indices_tuple=lists))


def test_a_reused_buffer_of_labels():
    buffer, loss_fn = torch.zeros(32, dtype=torch.long), dml_cuda.CircleLoss()
    for embeddings, labels in batches(32, 32):
        buffer.copy_(labels)
        pairs = MultiSimilarityMiner(0.1)(embeddings, buffer)
        found = loss_fn(embeddings, buffer, pairs)
        torch.testing.assert_close(found, loss_fn(embeddings, labels, tuple(pairs)))


class Mined(torch.utils.data.Dataset):
    """Batches with their pairs, as a collate function may make them."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        torch.manual_seed(index)
        embeddings, labels = make_batch(24, 6)
        return embeddings, labels, MultiSimilarityMiner(0.1)(embeddings, labels)


def test_mined_in_a_worker():
    loader = torch.utils.data.DataLoader(Mined(), batch_size=None, num_workers=1)
    for index, (embeddings, labels, pairs) in enumerate(loader):
        expected = Mined()[index][2]
        assert isinstance(pairs, MinedPairs)
        assert all(torch.equal(a, b) for a, b in zip(pairs, expected, strict=True))
        found = dml_cuda.CircleLoss()(embeddings, labels, pairs)
        torch.testing.assert_close(found, dml_cuda.CircleLoss()(embeddings, labels, tuple(expected)))
        counts = pairs.pair_counts()
        assert torch.equal(counts.positives, expected.pair_counts().positives)


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_are_lists(make):
    """They know nothing of what happens to the batch; nor does a list that somebody has changed."""
    ((embeddings, labels),) = batches(32)
    embeddings = embeddings.detach()
    pairs = MultiSimilarityMiner(0.1)(embeddings, labels)
    other = make(pairs)
    lists = tuple(pairs)
    embeddings *= -1
    found = dml_cuda.CircleLoss()(embeddings, labels, other)
    torch.testing.assert_close(found, dml_cuda.CircleLoss()(embeddings, labels, lists))
    assert torch.equal(other.pair_counts().negatives, lists[2].bincount(minlength=32))
    other[2], other[3] = other[2][:5], other[3][:5]
    assert dml_cuda.CircleLoss()(embeddings, labels, other) == dml_cuda.CircleLoss()(
        embeddings, labels, (*lists[:2], lists[2][:5], lists[3][:5])
    )


@EVERY_MINER
def test_counts_after_the_embeddings_were_updated(miner):
    """As when they are parameters; and a reused buffer of labels."""
    mine, theirs = MINERS[miner](0.1), miners.MultiSimilarityMiner(0.1)
    ((embeddings, labels),) = batches(32)
    optimizer = torch.optim.SGD([embeddings], lr=10.0)
    for _ in range(2):
        dml_cuda.CircleLoss()(embeddings, labels, mine(embeddings, labels)).backward()
        theirs(embeddings, labels)
        optimizer.step()
        labels.copy_(labels.flip(0))
        assert mine.num_pos_pairs == theirs.num_pos_pairs
        assert mine.num_neg_pairs == theirs.num_neg_pairs


# --- Inference mode


@EVERY
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("given", ["labels", "epsilon", "mined", "mined in inference mode", "lists"])
def test_inference_tensors_in_training(loss, similarity, given):
    if "adapter" in loss:
        if similarity == "dot" or given == "epsilon":
            pytest.skip("has no such option")
        loss_fn = OURS[loss]()
    else:
        loss_fn = OURS[loss](similarity=similarity, epsilon=0.1 if given == "epsilon" else None)
    ((embeddings, _),) = batches(32)
    with torch.inference_mode():
        ref_emb, ref_labels = make_batch(40, 8, dtype=torch.float64)
        labels = torch.arange(32) // 4
    batch = embeddings, labels, ref_emb, ref_labels
    normal = embeddings, labels.clone(), ref_emb.clone(), ref_labels.clone()
    miner = MultiSimilarityMiner(0.1, similarity=similarity)

    def pairs_of(batch):
        if given == "mined in inference mode":
            with torch.inference_mode():
                return miner(*batch)
        if given == "lists":
            with torch.inference_mode():
                return tuple(x.clone() for x in miner(*batch))
        return miner(*batch) if given == "mined" else None

    def evaluate(batch):
        pairs = pairs_of(batch)
        return value_and_gradient(lambda x: loss_fn(x, batch[1], pairs, *batch[2:]), embeddings)

    found, expected = evaluate(batch), evaluate(normal)
    torch.testing.assert_close(found, expected)


def test_a_memory_first_used_in_inference_mode():
    memory = CrossBatchMemory(dml_cuda.CircleLoss(), 8, 100, MultiSimilarityMiner(0.1))
    (first, labels), (second, others) = batches(30, 30)  # float64, to which the queue moves
    with torch.inference_mode():
        memory(first.detach().clone(), labels)
    value, gradient = value_and_gradient(lambda x: memory(x, others), second)
    assert value > 0
    assert gradient.abs().max() > 0


# --- The memory with losses and miners of others


def compare(ours, theirs, sizes, *arguments, dtype=torch.float64):
    for embeddings, labels in batches(*sizes):
        leaf = embeddings.detach().to(dtype).requires_grad_()
        found, expected = (
            value_and_gradient(lambda x, m=m, y=labels: m(x, y, *arguments), leaf) for m in (ours, theirs)
        )
        assert found[0].isfinite()
        assert found[1].isfinite().all()
        if dtype == torch.float64:
            assert_same(found, expected)
        else:
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("mined", [False, True])
@pytest.mark.parametrize(
    "loss",
    [losses.NCALoss, lambda: losses.NCALoss(distance=distances.CosineSimilarity()), losses.SupConLoss],
)
def test_a_foreign_loss_sees_the_filled_part(loss, mined, dtype):
    ours, theirs = ((m(0.1) if mined else None) for m in (MultiSimilarityMiner, miners.MultiSimilarityMiner))
    memory = CrossBatchMemory(loss(), 8, 64, ours)
    compare(memory, losses.CrossBatchMemory(loss(), 8, 64, theirs), (16, 12, 20, 16, 24), dtype=dtype)


def test_what_a_foreign_loss_is_given():
    """Ours in a wrapper, a subclass with a forward of its own, a function; compiled, ours is ours."""
    seen = []

    class Own(dml_cuda.CircleLoss):
        def forward(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
            seen.append(len(ref_emb))
            return super().forward(embeddings, labels, indices_tuple, ref_emb, ref_labels)

    def function(embeddings, labels, indices_tuple, ref_emb, ref_labels):
        seen.append(len(ref_emb))
        return dml_cuda.CircleLoss()(embeddings, labels, indices_tuple, ref_emb, ref_labels)

    plain = CrossBatchMemory(dml_cuda.CircleLoss(), 8, 64, MultiSimilarityMiner(0.1))
    others = [CrossBatchMemory(loss, 8, 64, MultiSimilarityMiner(0.1)) for loss in (Own(), function)]
    for embeddings, labels in batches(16, 16):
        expected = plain(embeddings, labels)
        for memory in others:
            torch.testing.assert_close(memory(embeddings, labels), expected)
    assert seen == [16, 16, 32, 32]
    assert dml_cuda.memory._applies_rules(torch.compile(dml_cuda.CircleLoss()))
    assert dml_cuda.memory._applies_rules(dml_cuda.pml.CircleLoss())
    other = dml_cuda.pml.MultiSimilarityLoss(distance=distances.SNRDistance())
    assert not dml_cuda.memory._applies_rules(other)


@pytest.mark.parametrize(
    ("loss", "given"),
    [
        (losses.TripletMarginLoss, None),
        (losses.TripletMarginLoss, "pairs"),
        (losses.TripletMarginLoss, "triplets"),
        (losses.MultiSimilarityLoss, None),
        (dml_cuda.MultiSimilarityLoss, None),
    ],
)
def test_triplets_stay_triplets(loss, given):
    lists = torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5, 6, 7]), torch.tensor([8, 9, 10, 11])
    if given == "pairs":
        lists = (*lists[:2], torch.tensor([0, 0, 2, 2]), torch.tensor([8, 9, 10, 11]))
    arguments = (lists,) if given else ()
    twin = getattr(losses, loss.__name__)
    for miner in (miners.TripletMarginMiner, lambda: miners.TripletMarginMiner(0.3, "semihard")):
        ours = CrossBatchMemory(loss(), 8, 64, miner())
        theirs = losses.CrossBatchMemory(twin(), 8, 64, miner())
        compare(ours, theirs, (16, 16, 16, 16, 16), *arguments)


class Doubling(MultiSimilarityMiner):
    """A subclass with a forward of its own, which must not be passed over."""

    def forward(self, *batch):
        lists = super().forward(*batch)
        return tuple(index[:10] for index in lists)


def test_a_subclass_of_the_miner():
    memory = CrossBatchMemory(losses.ContrastiveLoss(), 8, 64, Doubling(0.1))
    theirs = losses.CrossBatchMemory(losses.ContrastiveLoss(), 8, 64, Doubling(0.1))
    compare(memory, theirs, (16, 16))


def test_counts_of_a_miner_in_a_memory():
    """As in PML's class: of the whole queue, a row's own copy too."""
    ours, theirs = MultiSimilarityMiner(0.1), miners.MultiSimilarityMiner(0.1)
    adapter = dml_cuda.pml.MultiSimilarityMiner(0.1)
    memories = [CrossBatchMemory(dml_cuda.CircleLoss(), 8, 64, miner) for miner in (ours, adapter)]
    memories.append(losses.CrossBatchMemory(losses.CircleLoss(), 8, 64, theirs))
    for embeddings, labels in batches(16, 16, 16, 16, 16):
        for memory in memories:
            memory(embeddings, labels).backward()
        for miner in (ours, adapter):
            assert miner.num_pos_pairs == theirs.num_pos_pairs
            assert miner.num_neg_pairs == theirs.num_neg_pairs


def large_storages():
    gc.collect()
    tensors = [
        x.untyped_storage()
        for x in gc.get_objects()
        if type(x) is torch.Tensor
        and not x.is_meta
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)  # those have no storage of their own
    ]
    return len({x.data_ptr() for x in tensors if x.nbytes() > 4 << 20})


@EVERY_MINER
def test_nothing_large_is_kept(miner):
    """Of a queue of 8 MiB there is one, and the counts are there still."""
    memory = CrossBatchMemory(dml_cuda.MultiSimilarityLoss(), 128, 16_384, MINERS[miner](0.1))
    memory.embedding_memory.normal_()
    memory.label_memory.random_(4_096)
    memory.count.fill_(16_384)

    before = large_storages()
    embeddings = torch.randn(64, 128, requires_grad=True)
    memory(embeddings, torch.arange(64) // 4).backward()
    assert large_storages() == before
    batch = embeddings, torch.arange(64) // 4, memory.embedding_memory, memory.label_memory
    assert memory.miner.num_pos_pairs == int(MultiSimilarityMiner(0.1)(*batch).pair_counts().positives.sum())


@EVERY_MINER
def test_large_references_of_the_user(miner):
    mine = MINERS[miner](0.1)
    embeddings, labels = make_batch(8, 128)
    ref_emb, ref_labels = torch.randn(10_000, 128), torch.arange(10_000) // 4
    pairs = mine(embeddings, labels, ref_emb, ref_labels)
    assert mine.num_pos_pairs == len(pairs[0])
    mine(embeddings, labels, ref_emb, ref_labels)
    storage = ref_emb.untyped_storage()._weak_ref()
    del ref_emb, pairs
    gc.collect()
    assert torch.UntypedStorage._expired(storage)
    with pytest.raises(RuntimeError, match=r"^num_pos_pairs, num_neg_pairs: .*pair_counts"):
        mine.num_pos_pairs  # noqa: B018
    ref_emb = torch.randn(10_000, 128)
    mine(embeddings, labels, ref_emb[:9_000], ref_labels[:9_000])  # a view, gone at once
    assert mine.num_pos_pairs > 0
    mine(embeddings, labels, ref_emb, ref_labels)
    ref_emb.zero_()
    with pytest.raises(RuntimeError, match=r"^num_pos_pairs, num_neg_pairs: .*unchanged"):
        mine.num_neg_pairs  # noqa: B018


# --- Options


def test_options_of_the_miner():
    miner, (batch,) = MultiSimilarityMiner(0.1), batches(32)
    assert (miner.epsilon, miner.similarity, miner.normalize_embeddings, miner.pair_counts) == (
        0.1,
        "cosine",
        None,
        False,
    )
    for changed in ({"epsilon": 0.3}, {"similarity": "euclidean"}, {"normalize_embeddings": False}):
        ((name, value),) = changed.items()
        setattr(miner, name, value)
        assert getattr(miner, name) == value
        assert f"{name}={value!r}" in repr(miner)
        fresh = MultiSimilarityMiner(
            **{n: getattr(miner, n) for n in ("epsilon", "similarity", "normalize_embeddings")}
        )
        assert all(torch.equal(a, b) for a, b in zip(miner(*batch), fresh(*batch), strict=True))
    miner.pair_counts = True
    assert len(miner(*batch)) == 2
    twin = copy.copy(miner)
    twin.epsilon = 0.9
    assert miner.epsilon == 0.3
    for name, value, error in (
        ("epsilon", None, TypeError), ("epsilon", float("inf"), ValueError), ("epsilon", "0.1", TypeError),
        ("similarity", "cosin", ValueError), ("pair_counts", 1, TypeError),
        ("normalize_embeddings", 1, TypeError),
    ):  # fmt: skip
        with pytest.raises(error, match=rf"^{name}: expected"):
            setattr(miner, name, value)
        with pytest.raises(error, match=rf"^{name}: expected"):
            MultiSimilarityMiner(**{name: value})
    assert miner.epsilon == 0.3


@pytest.mark.parametrize("normalize", [True, False])
def test_miner_on_distances(normalize):
    """PML's miner with LpDistance."""
    theirs = miners.MultiSimilarityMiner(0.2, distance=distances.LpDistance(normalize_embeddings=normalize))
    adapter = dml_cuda.pml.MultiSimilarityMiner(0.2, distance=copy.deepcopy(theirs.distance))
    ours = MultiSimilarityMiner(0.2, similarity="euclidean", normalize_embeddings=normalize)
    for (embeddings, labels), refs in zip(batches(40, 60), [(), next(batches(50))], strict=True):
        batch = embeddings, labels, *refs
        expected = theirs(*batch)
        for miner in (ours, adapter):
            pairs = miner(*batch)
            assert isinstance(pairs, MinedPairs)
            for k in (0, 2):
                kinds = [set(zip(x[k].tolist(), x[k + 1].tolist(), strict=True)) for x in (pairs, expected)]
                assert kinds[0] == kinds[1]
                assert kinds[0]


def test_options_of_the_memory():
    memory = CrossBatchMemory(dml_cuda.CircleLoss(), 8, 64, MultiSimilarityMiner(0.1))
    memory.loss.gamma = 20.0
    memory.miner.epsilon = 0.4
    fresh = CrossBatchMemory(dml_cuda.CircleLoss(gamma=20.0), 8, 64, MultiSimilarityMiner(0.4))
    for embeddings, labels in batches(16, 24, 40):
        torch.testing.assert_close(memory(embeddings, labels), fresh(embeddings, labels))
    calls = []
    memory.miner = lambda *batch: (
        calls.append(len(batch[2])) or fresh.miner(*batch)
    )  # a function for a module
    for embeddings, labels in batches(16):
        torch.testing.assert_close(memory(embeddings, labels), fresh(embeddings, labels))
    assert calls == [64]
    memory.miner = fresh.miner = None
    memory.loss = torch.nn.Identity()
    memory.loss = fresh.loss
    for embeddings, labels in batches(16):
        torch.testing.assert_close(memory(embeddings, labels), fresh(embeddings, labels))
    for name, value in (("loss", 3), ("miner", "hard"), ("memory_size", 0.5), ("embedding_size", "8")):
        with pytest.raises(TypeError, match=rf"^{name}: expected"):
            setattr(memory, name, value)
    with pytest.raises(ValueError, match=r"^memory_size: expected at least 1"):
        memory.memory_size = 0


@pytest.mark.parametrize("sizes", [(16,), (16, 24, 40), (30, 30, 30)])
@pytest.mark.parametrize("size", [20, 64, 100])
def test_another_size_of_the_queue(sizes, size):
    """The latest embeddings stay, in their order."""
    memory = CrossBatchMemory(dml_cuda.CircleLoss(), 8, 64)
    rows = []
    for embeddings, labels in batches(*sizes):
        memory(embeddings, labels)
        rows.append(embeddings.detach())
    latest = torch.cat(rows)[-min(64, sum(sizes)) :][-size:]
    memory.memory_size = size
    assert memory.memory_size == len(memory.embedding_memory) == len(memory.label_memory) == size
    assert torch.equal(memory.embedding_memory[: len(latest)], latest)
    assert (memory.queue_idx, memory.has_been_filled) == (len(latest) % size, len(latest) == size)
    for embeddings, labels in batches(8):
        memory(embeddings, labels)
        rows.append(embeddings.detach())
    places = (memory.queue_idx - 1 - torch.arange(8)) % size
    assert torch.equal(memory.embedding_memory[places], rows[-1].flip(0))
    memory.embedding_size = 5
    assert memory.embedding_memory.shape == (size, 5)
    assert (memory.queue_idx, memory.has_been_filled) == (0, False)


# --- State


@pytest.mark.parametrize("sizes", [(), (16,), (16, 24), (16, 24, 40), (64,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_checkpoints_of_pml(sizes, dtype):
    theirs = losses.CrossBatchMemory(losses.CircleLoss(), 8, 64)
    for embeddings, labels in batches(*sizes):
        theirs(embeddings.to(dtype), labels)
    model = torch.nn.ModuleDict({"memory": CrossBatchMemory(dml_cuda.CircleLoss(), 8, 64)})
    state = torch.nn.ModuleDict({"memory": theirs}).state_dict()
    keys = set(state)
    model.load_state_dict(state)
    assert set(state) == keys
    ours = model["memory"]
    assert torch.equal(ours.embedding_memory, theirs.embedding_memory)
    assert torch.equal(ours.label_memory, theirs.label_memory)
    filled = min(sum(sizes), 64)
    assert ours.has_been_filled == (filled == 64)
    if filled < 64:  # a full queue goes on at its first place
        assert ours.queue_idx == theirs.queue_idx == filled
    for embeddings, labels in batches(16):
        places = (ours.queue_idx + torch.arange(16)) % 64
        ours(embeddings.to(dtype), labels)
        assert torch.equal(ours.embedding_memory[places], embeddings.detach().to(dtype))


def test_a_checkpoint_keeps_its_dtype():
    memory = CrossBatchMemory(dml_cuda.CircleLoss(), 8, 64)
    for embeddings, labels in batches(16):
        memory(embeddings, labels)
    for assign in (False, True):
        fresh = CrossBatchMemory(dml_cuda.CircleLoss(), 8, 64)
        fresh.load_state_dict(memory.state_dict(), assign=assign)
        assert torch.equal(fresh.embedding_memory, memory.embedding_memory)
    with pytest.raises(RuntimeError, match="size mismatch for embedding_memory"):
        CrossBatchMemory(dml_cuda.CircleLoss(), 8, 32).load_state_dict(memory.state_dict())


# --- Subclasses of the adapters

ADAPTERS = [
    adapter
    for adapter in (getattr(dml_cuda.pml, name) for name in dml_cuda.pml.__all__)
    if issubclass(adapter, losses.GenericPairLoss)
]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_a_subclass_overrides_is_used(adapter):
    ((embeddings, labels),) = batches(24)
    plain = getattr(losses, adapter.__name__)

    def doubled(base):
        class Mine(base):
            def _compute_loss(self, *arguments):
                result = super()._compute_loss(*arguments)
                for name in result:
                    result[name]["losses"] = 2 * result[name]["losses"]
                return result

        return Mine

    dml_cuda._warnings._given.clear()
    ours, theirs = doubled(adapter)(), doubled(plain)()
    with pytest.warns(UserWarning, match="with its own _compute_loss: pytorch-metric-learning"):
        found = value_and_gradient(lambda x: ours(x, labels), embeddings)
    assert_same(found, value_and_gradient(lambda x: theirs(x, labels), embeddings))
    assert not ours.is_fused()
    further = doubled(type("Further", (adapter,), {}))()
    torch.testing.assert_close(further(embeddings, labels), found[0])
    # On the very loss, and what the constructor chose.
    ours = adapter()
    assert ours.is_fused()
    assert type("Same", (adapter,), {"extra": 1})().is_fused()
    ours._compute_loss = theirs._compute_loss
    torch.testing.assert_close(ours(embeddings, labels), found[0])
    ours = adapter()
    ours.loss_method = lambda *arguments: theirs.loss_method(*arguments)
    torch.testing.assert_close(ours(embeddings, labels), found[0])


def test_margins_of_a_subclass():
    """Contrastive loss has methods for each kind."""

    def squared(base):
        return type("Squared", (base,), {"pos_calc": lambda self, d, m: base.pos_calc(self, d, m) ** 2})()

    ((embeddings, labels),) = batches(24)
    found, expected = (
        squared(base)(embeddings, labels) for base in (dml_cuda.pml.ContrastiveLoss, losses.ContrastiveLoss)
    )
    torch.testing.assert_close(found, expected)


def test_options_of_the_adapters():
    """Set later; circle's margin too, which PML derives other numbers from in its constructor only."""
    ((embeddings, labels),) = batches(24)
    for name, changes in (
        ("MultiSimilarityLoss", {"alpha": 1.0, "beta": 20.0, "base": 0.1}),
        ("CircleLoss", {"m": 0.25, "gamma": 20.0}),
        ("ContrastiveLoss", {"pos_margin": 0.1, "neg_margin": 1.3}),
        ("GeneralizedLiftedStructureLoss", {"pos_margin": 0.1, "neg_margin": 1.3}),
        ("NTXentLoss", {"temperature": 0.4}),
        ("SupConLoss", {"temperature": 0.4}),
    ):
        ours = getattr(dml_cuda.pml, name)()
        for option, value in changes.items():
            setattr(ours, option, value)
            assert getattr(ours, option) == value
        assert ours.is_fused()
        expected = getattr(losses, name)(**changes)(embeddings, labels)
        torch.testing.assert_close(ours(embeddings, labels), expected)
        assert torch.equal(copy.deepcopy(ours)(embeddings, labels), ours(embeddings, labels))
    ours, theirs = dml_cuda.pml.CircleLoss(), losses.CircleLoss()
    ours.delta_p = theirs.delta_p = 0.9
    assert not ours.is_fused()
    torch.testing.assert_close(ours(embeddings, labels), theirs(embeddings, labels))
    ours, theirs = (
        c(alpha=torch.tensor(2.0)) for c in (dml_cuda.pml.MultiSimilarityLoss, losses.MultiSimilarityLoss)
    )
    torch.testing.assert_close(ours(embeddings, labels), theirs(embeddings, labels))


@pytest.mark.parametrize(
    "name", ["MultiSimilarityLoss", "CircleLoss", "ContrastiveLoss", "NTXentLoss", "SupConLoss"]
)
def test_neither_labels_nor_pairs(name):
    for base in (losses, dml_cuda.pml, dml_cuda):
        with pytest.raises(ValueError, match="labels"):
            getattr(base, name)()(torch.randn(6, 4))


# --- Where root classes and PML differ, or might


def test_two_views_with_the_same_labels():
    """PML and the adapters leave out (i, i) where the labels are one object; root classes go by arguments."""
    (e, y), (e2, _) = batches(24, 24)
    theirs, adapter, ours = (
        losses.MultiSimilarityLoss(),
        dml_cuda.pml.MultiSimilarityLoss(),
        dml_cuda.MultiSimilarityLoss(),
    )
    without, with_ = theirs(e, y, None, e2, y), theirs(e, y, None, e2, y.clone())
    assert (with_ - without).abs() > 1e-3
    torch.testing.assert_close(adapter(e, y, None, e2, y), without)
    torch.testing.assert_close(adapter(e, y, None, e2, y.clone()), with_)
    for labels in (y, y.clone()):
        torch.testing.assert_close(ours(e, y, None, e2, labels), with_)
    pairs = MinedPairs(e, y, e2, y, epsilon=None, self_index=torch.arange(24))
    torch.testing.assert_close(ours(e, y, pairs, e2, y), without)
    # PML's miner then lists pairs (i, i) as both kinds, which its losses refuse. Here they are positives.
    expected = MultiSimilarityMiner(0.1)(e, y, e2, y)
    found, theirs = (m.MultiSimilarityMiner(0.1)(e, y, e2, y) for m in (dml_cuda.pml, miners))
    assert (theirs[2] == theirs[3]).any()
    assert not (found[2] == found[3]).any()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_corners_that_differ():
    """A row whose loss is NaN, which PML's reducer leaves out; the floor in the logarithm of its NT-Xent."""
    (e, y), (r, z) = ([x.detach() for x in batch] for batch in batches(24, 32))
    e[3] = float("nan")
    assert losses.CircleLoss()(e, y, None, r, z).isfinite()
    assert dml_cuda.pml.CircleLoss()(e, y, None, r, z).isnan()
    assert dml_cuda.CircleLoss()(e, y, None, r, z).isnan()
    far = torch.tensor([[1.0, 0], [-1, 0], [1, 0.01]], dtype=torch.float16)
    labels = torch.tensor([0, 0, 1])
    assert losses.NTXentLoss()(far, labels).item() == pytest.approx((9.7 + 0.7) / 2, rel=0.02)
    for kind in (dml_cuda, dml_cuda.pml):
        assert kind.NTXentLoss()(far, labels).item() == pytest.approx((2 / 0.07 + 0.7) / 2, rel=0.02)


@EVERY
def test_weights_of_the_adapters(loss):
    ((embeddings, labels),) = batches(24)
    if "adapter" not in loss:
        pytest.skip("test_pair_weights.py has these")
    adapter = OURS[loss]()
    ours = getattr(dml_cuda, type(adapter).__name__)()
    for a, b in zip(*(functional.pair_weights(m, embeddings, labels) for m in (adapter, ours)), strict=True):
        assert torch.equal(a, b)
    summed = OURS[loss](reducer=reducers.SumReducer())
    weights = functional.pair_weights(summed, embeddings, labels).pos_weights
    ours.reduction = "sum"
    assert torch.equal(weights, functional.pair_weights(ours, embeddings, labels).pos_weights)
    with pytest.raises(TypeError, match=r"^loss: expected a pair loss .*SNRDistance"):
        functional.pair_weights(
            dml_cuda.pml.MultiSimilarityLoss(distance=distances.SNRDistance()), embeddings, labels
        )
    with pytest.raises(TypeError, match=r"^loss: expected a pair loss of dml_cuda, got NCALoss"):
        functional.pair_weights(losses.NCALoss(), embeddings, labels)


# --- Lists and messages


@pytest.mark.parametrize("refs", [False, True])
def test_a_pair_of_both_kinds(refs):
    embeddings, lists = torch.randn(6, 4), [torch.tensor(x) for x in ([0, 1], [2, 3], [0, 4], [3, 5])]
    more = {"ref_emb": torch.randn(7, 4)} if refs else {}
    loss_fn = dml_cuda.CircleLoss(check_pairs=True)
    loss_fn(embeddings, indices_tuple=lists, **more)
    lists[3] = torch.tensor([2, 5])
    with pytest.raises(ValueError, match=r"^indices_tuple: .*positive or negative, got \(0, 2\) as both"):
        loss_fn(embeddings, indices_tuple=lists, **more)
    dml_cuda.CircleLoss()(embeddings, indices_tuple=lists, **more)
    triplets = tuple(torch.tensor(x) for x in ([0, 0], [1, 2], [3, 1]))
    with pytest.raises(ValueError, match=r"^indices_tuple: .*got \(0, 1\) as both"):
        loss_fn(embeddings, indices_tuple=triplets, **more)


@pytest.mark.parametrize("loss", ["multi_similarity", "circle"])
def test_empty_lists_of_floats(loss):
    """torch.tensor([]) is one."""
    none, some = torch.tensor([]), torch.tensor([0, 1])
    loss_fn, embeddings = OURS[loss](), torch.randn(4, 3)
    assert loss_fn(embeddings, indices_tuple=(none,) * 4) == 0
    found = loss_fn(embeddings, indices_tuple=(none, none, some, some + 2))
    assert found == loss_fn(embeddings, indices_tuple=(some[:0], some[:0], some, some + 2))
    with pytest.raises(TypeError, match=r"^indices_tuple: positives: expected int64 or int32"):
        loss_fn(embeddings, indices_tuple=(some, some.float(), some, some))


def test_messages():
    (e, y), (r, z) = batches(6, 5)
    with pytest.raises(ValueError, match=r"got pairs mined with no rows of ref_emb where there are 5"):
        dml_cuda.CircleLoss()(e, y, MultiSimilarityMiner()(e, y), r, z)
    with pytest.raises(ValueError, match=r"got pairs mined with 5 rows of ref_emb where there are none"):
        dml_cuda.CircleLoss()(e, y, MultiSimilarityMiner()(e, y, r, z))
    says = r"^miner: expected None as the loss mines by its epsilon=0\.2, got MultiSimilarityMiner"
    with pytest.raises(ValueError, match=says):
        CrossBatchMemory(dml_cuda.CircleLoss(epsilon=0.2), 8, 64, MultiSimilarityMiner(0.1))
    memory = CrossBatchMemory(dml_cuda.CircleLoss(epsilon=0.2), 8, 64, MultiSimilarityMiner(0.2))
    memory(e, y)
    memory.miner.epsilon = 0.1
    with pytest.raises(ValueError, match=says):
        memory(e, y)
    memory.loss.epsilon = None
    memory(e, y)
