"""The ranking losses against float64 truth, in every dtype, similarity and reduction."""

import itertools

import numpy as np
import pytest
import torch
from cases.accuracy import assert_as_accurate
from cases.data import make_labels, make_points
from cases.losses import REDUCTIONS, by_name
from cases.ranking import EVERY_RANKING, RANKINGS, classes_of
from oracle.ranking import ROWS, ranking_truth

import dml_cuda
from dml_cuda.miners.mined_pairs import mined_pairs
from dml_cuda.reference import ranks as reference_ranks

EACH_SIMILARITY = pytest.mark.parametrize(
    ("loss", "similarity"),
    [(loss, similarity) for loss in RANKINGS.values() for similarity in loss.similarities],
    ids=lambda x: getattr(x, "name", x),
)
BACKENDS = ("fused", "reference")


def step(loss, batch, values=None, upstream=None, **options):
    """The loss, and its gradients by the points and by the parameters that learn."""
    embeddings, labels, *refs = batch
    leaves = [embeddings.detach().clone().requires_grad_()]
    names = {}
    if refs:
        leaves.append(refs[0].detach().clone().requires_grad_())
        names = {"ref_emb": leaves[1], "ref_labels": refs[1]}
    values = values or {}
    value = loss.function(leaves[0], labels, **names, **values, **options)
    learned = [x for x in values.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    up = torch.ones_like(value) if upstream is None else upstream.to(value.dtype)
    return [value.detach(), *torch.autograd.grad(value, [*leaves, *learned], up)]


def batch_of(labels, ref_labels=None, dim=12, dtype=torch.float64, spread=0.6):
    points = make_points(labels, dim, dtype, spread)
    if ref_labels is None:
        return points, labels
    every = make_points(torch.cat([labels, ref_labels]), dim, dtype, spread)
    return every[: len(labels)], labels, every[len(labels) :], ref_labels


SIZES = {
    "unequal": (1, 2, 3, 5, 9, 17),
    "one class": (23,),
    "distinct": (1,) * 9,
    "pairs": (2,) * 12,
    "large": (140, 130, 3, 1),
}
EVERY_SIZE = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


# ---- the oracle --------------------------------------------------------------------------------------------


@EVERY_RANKING
def test_the_oracle_by_finite_differences(loss):
    random = np.random.default_rng(1)
    s, is_positive = random.uniform(-0.9, 0.9, 40), random.random(40) < 0.3
    row, values = ROWS[loss.name], loss.smooth
    _, by_s, by_params = row(s, is_positive, **values)
    h = 1e-6
    for k in range(len(s)):
        moved = [row(s + h * sign * (np.arange(len(s)) == k), is_positive, **values)[0] for sign in (1, -1)]
        assert abs((moved[0] - moved[1]) / (2 * h) - by_s[k]) < 1e-7
    for name, derivative in by_params.items():
        moved = [row(s, is_positive, **{**values, name: values[name] + h * sign})[0] for sign in (1, -1)]
        assert abs((moved[0] - moved[1]) / (2 * h) - derivative) < 1e-7


def test_the_oracle_of_hard_ranks():
    """At a small temperature: the average precision, and the mean of Recall@K's surrogate at small ones."""
    s, is_positive = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4]), np.array([0, 1, 1, 0, 0, 1], dtype=bool)
    loss, _, _ = ROWS["smooth_ap"](s, is_positive, temperature=1e-4)
    assert abs(loss - (1 - np.mean([1 / 2, 2 / 3, 3 / 6]))) < 1e-12
    loss, _, _ = ROWS["recall_at_k"](s, is_positive, ks=(1, 4), temperature=1e-4, temperature_k=1e-3)
    assert abs(loss - (1 - np.mean([0, 2 / 3]))) < 1e-12


# ---- values and gradients ----------------------------------------------------------------------------------


@EACH_SIMILARITY
@EVERY_SIZE
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["defaults", "changed", pytest.param("smooth", marks=pytest.mark.check)])
def test_as_the_oracle(loss, similarity, sizes, backend, kind):
    batch = batch_of(classes_of(*sizes))
    values = getattr(loss, kind)
    found = step(loss, batch, backend=backend, **values, **by_name(similarity))
    truth = ranking_truth(loss.name, *batch, similarity=similarity, **values)
    torch.testing.assert_close(found[0].item(), truth.loss, rtol=1e-10, atol=1e-12)
    scale = max(1.0, np.abs(truth.grad_emb).max())
    torch.testing.assert_close(found[1], torch.from_numpy(truth.grad_emb), rtol=0, atol=1e-10 * scale)


@EACH_SIMILARITY
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "m"), [(37, 150), (150, 37), (1, 300), (20, 1)])
def test_against_references(loss, similarity, backend, n, m):
    batch = batch_of(make_labels(n, "unequal"), make_labels(m, "unequal"))
    found = step(loss, batch, backend=backend, **loss.smooth, **by_name(similarity))
    truth = ranking_truth(
        loss.name, *batch[:2], ref_emb=batch[2], ref_labels=batch[3], similarity=similarity, **loss.smooth
    )
    torch.testing.assert_close(found[0].item(), truth.loss, rtol=1e-10, atol=1e-12)
    for got, expected in zip(found[1:], (truth.grad_emb, truth.grad_ref), strict=True):
        torch.testing.assert_close(got, torch.from_numpy(expected), rtol=0, atol=1e-10)


@EVERY_RANKING
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_reductions(loss, backend, reduction, weighted):
    labels = classes_of(1, 1, 2, 3, 9, 12)
    batch, n = batch_of(labels), len(labels)
    upstream = torch.linspace(-1, 2, n).double() if reduction == "none" else None
    weights = torch.linspace(0, 3, n).double() if weighted else None
    found = step(
        loss,
        batch,
        upstream=upstream,
        reduction=reduction,
        row_weights=weights,
        backend=backend,
        **loss.smooth,
    )
    truth = ranking_truth(
        loss.name, *batch, upstream=upstream, reduction=reduction, row_weights=weights, **loss.smooth
    )
    expected = (
        torch.from_numpy(truth.losses)
        if reduction == "none"
        else torch.tensor(truth.loss, dtype=torch.float64)
    )
    torch.testing.assert_close(found[0], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[1], torch.from_numpy(truth.grad_emb), rtol=0, atol=1e-10)


@EVERY_RANKING
def test_class_weights(loss):
    batch = batch_of(torch.arange(30) % 5)
    weights = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0])
    by_class = step(loss, batch, class_weights=weights)
    by_row = step(loss, batch, row_weights=weights[batch[1]])
    for a, b in zip(by_class, by_row, strict=True):
        assert torch.equal(a, b)


def nearest_edge(batch, num_bins):
    """How far the pair nearest to an edge of a bin, where its derivative jumps, is from it, in bins."""
    points = [torch.nn.functional.normalize(x.double()) for x in batch if x.is_floating_point()]
    s = points[0] @ points[-1].T
    places = ((1 - s) * num_bins / 2).view(-1)[
        slice(None) if len(points) == 2 else (torch.eye(len(s)) == 0).view(-1)
    ]
    return (places - places.round()).abs().min()


@EACH_SIMILARITY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", [1.0, 0.3], ids=["noisy", "separated"])
@pytest.mark.parametrize("references", [False, True], ids=["", "references"])
def test_accuracy(loss, similarity, dtype, spread, references):
    """As near to the truth as the reference in the same type, or twice as far."""
    rows = 100 if loss.name == "fast_ap" else 300

    def make():
        return batch_of(make_labels(rows), make_labels(200) if references else None, 64, dtype, spread)

    batch = make()
    while loss.name == "fast_ap" and nearest_edge(batch, **loss.defaults) < 1e-6:
        batch = make()
    names = {"ref_emb": batch[2], "ref_labels": batch[3]} if references else {}
    values = loss.smooth if similarity in ("dot", "euclidean_raw") else loss.defaults
    truth = ranking_truth(loss.name, *batch[:2], **names, similarity=similarity, **values)
    fused, reference = (
        step(loss, batch, backend=backend, **values, **by_name(similarity)) for backend in BACKENDS
    )
    wide = [x.float() if x.is_floating_point() else x for x in batch]
    plain = step(loss, wide, backend="reference", **values, **by_name(similarity))
    assert fused[0].dtype == reference[0].dtype == dtype
    expected = [truth.loss, truth.grad_emb, *([truth.grad_ref] if references else [])]
    names = ("loss", "by rows", "by refs")[: len(expected)]
    for what, got, other, true in zip(names, fused, plain, expected, strict=True):
        assert_as_accurate(what, got, other, true)


@EVERY_RANKING
@pytest.mark.parametrize("backend", BACKENDS)
def test_self_index_and_num_valid_refs(loss, backend):
    """As the memory bank passes them: a row's copy, and slots that are not filled and may hold anything."""
    embeddings, labels, refs, ref_labels = batch_of(make_labels(20, "unequal"), make_labels(60, "unequal"))
    refs, ref_labels = refs.clone(), ref_labels.clone()
    index = torch.randperm(40)[:20]
    refs[index], ref_labels[index] = embeddings, labels
    filled = torch.tensor(45)
    refs[45:] = float("nan") if backend == "fused" else 1000
    names, leaf = {"ref_emb": refs, "ref_labels": ref_labels}, embeddings.clone().requires_grad_()
    pairs = mined_pairs(
        leaf, labels, **names, epsilon=None, similarity="cosine", self_index=index, num_valid_refs=filled
    )
    value = loss.function(leaf, labels, **names, indices_tuple=pairs, backend=backend, **loss.smooth)
    (gradient,) = torch.autograd.grad(value, leaf)
    truth = ranking_truth(
        loss.name,
        embeddings,
        labels,
        **{**names, "ref_emb": refs.nan_to_num()},
        self_index=index,
        num_valid_refs=filled,
        **loss.smooth,
    )
    torch.testing.assert_close(value.item(), truth.loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, torch.from_numpy(truth.grad_emb), rtol=0, atol=1e-10)


@EVERY_RANKING
def test_gradcheck(loss):
    embeddings, labels, refs, ref_labels = batch_of(make_labels(9, "unequal"), make_labels(13, "unequal"), 4)
    values = {name: torch.tensor(value).double().requires_grad_() if name in loss.learnable else value
              for name, value in loss.smooth.items()}  # fmt: skip
    learned = [x for x in values.values() if isinstance(x, torch.Tensor)]
    for reduction in ("mean_valid", "none"):

        def value(x, y, *numbers, reduction=reduction):
            given = {**values, **dict(zip(loss.learnable, numbers, strict=True))} if numbers else values
            return loss.function(x, labels, ref_emb=y, ref_labels=ref_labels, reduction=reduction, **given)

        points = embeddings.requires_grad_(), refs.requires_grad_()
        assert torch.autograd.gradcheck(value, (*points, *learned))


# ---- parameters that learn ---------------------------------------------------------------------------------


def _learned(loss, values, dtype=torch.float64):
    return {
        name: torch.nn.Parameter(torch.tensor(float(value), dtype=dtype)) if name in loss.learnable else value
        for name, value in {**loss.defaults, **values}.items()
    }


@pytest.mark.parametrize("loss", [x for x in RANKINGS.values() if x.learnable], ids=lambda x: x.name)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
@pytest.mark.parametrize("kind", ["changed", "smooth"])
def test_temperatures_that_learn(loss, backend, similarity, kind):
    batch = batch_of(classes_of(*SIZES["unequal"]))
    plain = {**loss.defaults, **getattr(loss, kind)}
    values = _learned(loss, plain)
    weights = torch.linspace(0.5, 2, len(batch[1])).double()
    found = step(loss, batch, values, backend=backend, similarity=similarity, row_weights=weights)
    truth = ranking_truth(loss.name, *batch, similarity=similarity, row_weights=weights, **plain)
    torch.testing.assert_close(found[0].item(), truth.loss, rtol=1e-10, atol=1e-12)
    learnt = [name for name in values if name in loss.learnable]
    for name, got in zip(learnt, found[2:], strict=True):
        assert abs(truth.by_params[name]) > 1e-5
        torch.testing.assert_close(got.item(), truth.by_params[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", [x for x in RANKINGS.values() if x.learnable], ids=lambda x: x.name)
def test_accuracy_of_learned_temperatures(loss):
    embeddings, labels = batch_of(make_labels(300, "few"), dim=32)
    truth = ranking_truth(loss.name, embeddings, labels, **loss.changed).by_params
    found = [
        step(loss, (embeddings.float(), labels), _learned(loss, loss.changed, torch.float32), backend=backend)
        for backend in BACKENDS
    ]
    learnt = [name for name in _learned(loss, loss.changed) if name in loss.learnable]
    for k, name in enumerate(learnt):
        errors = [abs(float(x[2 + k]) - truth[name]) for x in found]
        assert errors[0] <= 2 * errors[1] + 2e-6 * max(abs(truth[name]), 1e-3)


@pytest.mark.parametrize("loss", [x for x in RANKINGS.values() if x.learnable], ids=lambda x: x.name)
def test_a_parameter_of_the_module(loss):
    made = loss.module(**_learned(loss, {}, torch.float32))
    assert [name for name, _ in made.named_parameters()] == list(loss.learnable)
    assert list(made.state_dict()) == list(loss.learnable)
    embeddings, labels = batch_of(make_labels(40), dtype=torch.float32)
    value = made(embeddings, labels)
    assert value == loss.module()(embeddings, labels)
    value.backward()
    assert all(p.grad is not None and p.grad.shape == () for p in made.parameters())


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_a_temperature_that_went_wrong(value):
    """An error where the value can be looked at; in compiled code the loss is not a number."""
    made = dml_cuda.SmoothAPLoss(temperature=torch.nn.Parameter(torch.tensor(0.1)))
    embeddings, labels = batch_of(make_labels(40), dtype=torch.float32)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    assert compiled(embeddings, labels).isfinite()
    with torch.no_grad():
        made.temperature.fill_(value)
    with pytest.raises(ValueError, match="temperature: expected a"):
        made(embeddings, labels)
    assert compiled(embeddings, labels).isnan()


# ---- large and odd batches ---------------------------------------------------------------------------------


@EVERY_RANKING
@pytest.mark.parametrize("n", [0, 1, 2, 3])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_tiny_batches(loss, n, reduction):
    for labels in (torch.zeros(n), torch.arange(n)):
        batch = torch.randn(n, 5), labels.long()
        fused, plain = (step(loss, batch, reduction=reduction, backend=backend) for backend in BACKENDS)
        for a, b in zip(fused, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        if labels.unique().numel() == n:
            assert not fused[0].any()
            assert not fused[1].any()


@EVERY_RANKING
def test_no_columns(loss):
    batch = torch.randn(3, 5), torch.zeros(3).long(), torch.randn(0, 5), torch.zeros(0).long()
    for backend in BACKENDS:
        value, by_rows, by_refs = step(loss, batch, backend=backend)
        assert value == 0
        assert not by_rows.any()
        assert by_refs.shape == (0, 5)


@EVERY_RANKING
@pytest.mark.parametrize("duplicates", ["equal rows", "zero rows"])
def test_duplicates(loss, duplicates):
    embeddings, labels = batch_of(make_labels(40, "few"))
    embeddings[10:20] = embeddings[:10] if duplicates == "equal rows" else 0
    found = step(loss, (embeddings, labels), **loss.smooth)
    plain = step(loss, (embeddings, labels), backend="reference", **loss.smooth)
    truth = ranking_truth(loss.name, embeddings, labels, **loss.smooth)
    torch.testing.assert_close(found[0].item(), truth.loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[1], plain[1], rtol=1e-8, atol=1e-9)


@EVERY_RANKING
@pytest.mark.parametrize("place", ["row", "reference"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_not_finite(loss, place, backend):
    embeddings, labels, refs, ref_labels = batch_of(make_labels(20), make_labels(20))
    (embeddings if place == "row" else refs)[3, 1] = float("nan")
    found = step(loss, (embeddings, labels, refs, ref_labels), backend=backend)
    assert found[0].isnan()


@pytest.mark.long
@EVERY_RANKING
@pytest.mark.parametrize("spread", [0.05, 1.0], ids=["separated", "noisy"])
def test_several_row_blocks(loss, spread):
    """More rows than one block of similarities holds, with skipped columns and without."""
    labels = make_labels(2100, "few")
    batch = batch_of(labels, dim=8, dtype=torch.float64, spread=spread)
    wide = batch_of(labels[:700], make_labels(9000, "few"), dim=8, dtype=torch.float64, spread=spread)
    for one in (batch, wide):
        fused, plain = (step(loss, one, backend=backend) for backend in BACKENDS)
        for a, b in zip(fused, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@EVERY_RANKING
def test_any_number_of_threads_and_repeats(loss):
    batch = batch_of(make_labels(700, "few"), dim=16, dtype=torch.float32)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append(step(loss, batch))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@EVERY_RANKING
@pytest.mark.parametrize("isa", dml_cuda.build_info()["cpu"]["available"])
def test_every_instruction_set(loss, isa):
    batch = batch_of(classes_of(*SIZES["large"]))
    expected = step(loss, batch, backend="reference", **loss.smooth)
    before = dml_cuda._C.cpu_instruction_set()
    try:
        dml_cuda._C.set_cpu_instruction_set(isa)
        found = step(loss, batch, **loss.smooth)
    finally:
        dml_cuda._C.set_cpu_instruction_set(before)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@EVERY_RANKING
def test_blocks_of_the_reference(loss, monkeypatch):
    batch = batch_of(classes_of(*SIZES["unequal"]))
    whole = step(loss, batch, backend="reference", **loss.smooth)
    monkeypatch.setattr(reference_ranks, "AREA", 500)
    for a, b in zip(step(loss, batch, backend="reference", **loss.smooth), whole, strict=True):
        torch.testing.assert_close(a, b)


# ---- bad input ---------------------------------------------------------------------------------------------

WRONG = [(loss, name) for loss in RANKINGS.values() for name in loss.wrong]


@pytest.mark.parametrize(("loss", "name"), WRONG, ids=lambda x: getattr(x, "name", x))
def test_bad_parameters(loss, name):
    values, error, words = loss.wrong[name]
    for make in (lambda: loss.module(**values), lambda: loss.function(torch.randn(4, 2), None, **values)):
        with pytest.raises(error) as caught:
            make()
        assert all(word in str(caught.value) for word in words), caught.value


@EVERY_RANKING
def test_bad_options(loss):
    made = loss.module()
    for name in ("epsilon", "check_pairs", "distance"):
        for make in (lambda name=name: loss.module(**{name: None}),
                     lambda name=name: loss.function(torch.randn(4, 2), None, **{name: None})):  # fmt: skip
            with pytest.raises(TypeError, match=f"{name}: expected one of the parameters or options"):
                make()
    batch = embeddings, labels = torch.randn(12, 4), torch.arange(12) % 3
    listed = torch.tensor([0]), torch.tensor([3]), torch.tensor([0]), torch.tensor([1])
    with pytest.raises(ValueError, match=r"indices_tuple: expected None with a ranking loss.*lists"):
        made(embeddings, labels, listed)
    with pytest.raises(ValueError, match=r"indices_tuple: expected None with a ranking loss.*mined"):
        made(*batch, dml_cuda.MultiSimilarityMiner(0.1)(*batch))
    with pytest.raises(ValueError, match="labels: expected"):
        made(embeddings)
    with pytest.raises(TypeError, match="loss: expected a loss of pairs"):
        dml_cuda.functional.pair_weights(made, *batch)
    with pytest.raises(ValueError, match="miner: expected None"):
        dml_cuda.distributed.DistributedLoss(made, miner=dml_cuda.MultiSimilarityMiner(0.1))
    with pytest.raises(ValueError, match='mode: expected "gather" with a ranking loss'):
        dml_cuda.distributed.DistributedLoss(made, mode="ring")(*batch)


@EVERY_RANKING
def test_the_op_checks_its_arguments(loss):
    op, embeddings, labels = torch.ops.dml_cuda.ranking_loss, torch.randn(6, 3), torch.arange(6) % 2
    none = (None,) * 5
    params = loss.module.formula.params(loss.defaults, "cosine")

    def call(name=loss.name, numbers=params, similarity="cosine", dynamic=None, weights=None):
        rest = None, None, None, None, weights, dynamic
        return op(embeddings, labels, *rest, name, numbers, similarity, True, True)

    assert call()[0].shape == (6,)
    assert len(none) == 5
    for error, message, named in (
        (ValueError, "loss: expected smooth_ap", {"name": "nothing"}),
        (ValueError, "params: expected", {"numbers": []}),
        (ValueError, "params: expected", {"numbers": [1.0] * 67}),
        (ValueError, "similarity", {"similarity": "nothing"}),
        (ValueError, "dynamic_params: expected", {"dynamic": torch.ones(3)}),
        (ValueError, "row_weights: expected 6", {"weights": torch.ones(3)}),
    ):
        with pytest.raises(error, match=message):
            call(**named)


# ---- around the losses -------------------------------------------------------------------------------------


@EVERY_RANKING
def test_the_module(loss):
    made = loss.module(**loss.changed, reduction="sum")
    batch = batch_of(make_labels(30))
    assert torch.equal(made(*batch), loss.function(*batch, **loss.changed, reduction="sum"))
    for name, value in loss.defaults.items():
        assert getattr(made, name) == loss.changed[name]
        setattr(made, name, value)
        assert f"{name}={value!r}" in repr(made)
    assert "epsilon" not in repr(made)
    made.reduction = "mean_valid"
    assert torch.equal(made(*batch), loss.module()(*batch))


@EVERY_RANKING
@pytest.mark.parametrize("memory_size", [30, 200])
def test_memory_bank(loss, memory_size):
    """As the same bank with the reference, while it fills and when it is full."""
    banks = [
        dml_cuda.CrossBatchMemory(loss.module(backend=backend, **loss.smooth), 6, memory_size)
        for backend in BACKENDS
    ]
    for _ in range(4):
        batch = batch_of(make_labels(15), dim=6)
        found = []
        for bank in banks:
            leaf = batch[0].clone().requires_grad_()
            value = bank(leaf, batch[1])
            found.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@EVERY_RANKING
def test_opcheck(loss):
    embeddings, labels = batch_of(make_labels(12), dtype=torch.float32)
    refs, ref_labels = batch_of(make_labels(9), dtype=torch.float32)
    op = torch.ops.dml_cuda.ranking_loss.default
    params = loss.module.formula.params(loss.defaults, "cosine")
    dynamic = torch.tensor(params, dtype=torch.float64, requires_grad=True)
    for refs_of in ((None, None), (refs.requires_grad_(), ref_labels)):
        points = embeddings.requires_grad_(), labels, *refs_of, None, None
        torch.library.opcheck(op, (*points, torch.rand(12), None, loss.name, params, "cosine", True, True))
        torch.library.opcheck(op, (*points, None, dynamic, loss.name, [], "cosine", True, True))


@EVERY_RANKING
@pytest.mark.parametrize("reduction", ["mean_valid", "mean_nonzero", "none"])
def test_compiled_with_dynamic_shapes(loss, reduction):
    made = loss.module(reduction=reduction, **loss.smooth)
    compiled = torch.compile(made, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, m in itertools.product((20, 33), (None, 41)):
        batch = batch_of(make_labels(n), None if m is None else make_labels(m), dtype=torch.float32)
        found = []
        for function in (compiled, made):
            leaf = batch[0].clone().requires_grad_()
            value = function(leaf, batch[1], None, *batch[2:])
            up = torch.linspace(0.5, 2, value.numel()).view(value.shape)
            found.append((value.detach(), torch.autograd.grad(value, leaf, up)[0]))
        assert all(map(torch.equal, *found))


@EVERY_RANKING
@pytest.mark.parametrize("reduction", ["mean_valid", "none"])
def test_torch_func(loss, reduction):
    embeddings, labels = batch_of(make_labels(20), dtype=torch.float64)

    def value(x):
        return (loss.function(x, labels, reduction=reduction, **loss.smooth) * 2.0).sum()

    leaf = embeddings.clone().requires_grad_()
    (expected,) = torch.autograd.grad(value(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(value)(embeddings), expected)


@EVERY_RANKING
def test_a_second_derivative_is_refused(loss):
    embeddings, labels = batch_of(make_labels(20))
    leaf = embeddings.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss.function(leaf, labels, **loss.smooth), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()
    value = loss.function(leaf, labels, backend="reference", **loss.smooth)
    (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), leaf)[0].isfinite().all()
