"""The losses and miners of triplets among PyTorch's other features, and with bad input."""

import copy
import inspect
import io
import pickle
import re

import pytest
import torch
from cases.data import make_batch

import dml_cuda
from dml_cuda import (
    BatchEasyHardMiner,
    BatchHardMiner,
    CrossBatchMemory,
    DistanceWeightedMiner,
    MarginLoss,
    MinedTriplets,
    PairMarginMiner,
    TripletMarginLoss,
    TripletMarginMiner,
    TripletOptions,
)
from dml_cuda.distributed import DistributedLoss
from dml_cuda.functional import margin_loss, triplet_margin_loss

LOSSES = {
    "triplet": TripletMarginLoss(margin=0.2),
    "smooth": TripletMarginLoss(smooth_loss=True),
    "margin": MarginLoss(beta=1.0),
}
MINERS = {
    "none": None,
    "batch hard": BatchHardMiner(),
    "semihard": TripletMarginMiner(0.3, "semihard"),
    "easy hard": BatchEasyHardMiner(),
    "distance weighted": DistanceWeightedMiner(nonzero_loss_cutoff=1.8),
}
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES)
EVERY_MINER = pytest.mark.parametrize("miner", MINERS)


def evaluate(function, embeddings, *arguments):
    x = embeddings.detach().clone().requires_grad_()
    value = function(x, *arguments)
    return value.detach(), *torch.autograd.grad(value, x)


def mined_loss(loss, miner):
    loss_fn, find = LOSSES[loss], MINERS[miner]

    def function(x, y):
        return loss_fn(x, y, None if find is None else find(x, y))

    return function


# --- Bad input

X, Y = make_batch(12, 4)
_TYPES = "type_of_triplets"
WRONG_LOSSES = {
    "margin string": (TripletMarginLoss, {"margin": "0.1"}, TypeError, ["margin", "number", "str"]),
    "margin NaN": (MarginLoss, {"margin": float("nan")}, ValueError, ["margin", "finite", "nan"]),
    "swap": (TripletMarginLoss, {"swap": 1}, TypeError, ["swap", "True or False", "int"]),
    "smooth_loss": (TripletMarginLoss, {"smooth_loss": None}, TypeError, ["smooth_loss", "NoneType"]),
    "per anchor 0": (TripletMarginLoss, {"triplets_per_anchor": 0}, ValueError, ["triplets_per_anchor", "1"]),
    "per anchor": (
        MarginLoss,
        {"triplets_per_anchor": "some"},
        ValueError,
        ["triplets_per_anchor", "all", "some"],
    ),
    "epsilon": (TripletMarginLoss, {"epsilon": 0.1}, TypeError, ["epsilon", "similarity", "reduction"]),
    "similarity": (TripletMarginLoss, {"similarity": "l2"}, ValueError, ["similarity", "cosine", "l2"]),
    "reduction": (MarginLoss, {"reduction": "max"}, ValueError, ["reduction", "mean_nonzero", "max"]),
    "beta": (MarginLoss, {"beta": "1"}, TypeError, ["beta", "number", "str"]),
    "nu": (MarginLoss, {"nu": None}, TypeError, ["nu", "number", "NoneType"]),
    "num_classes": (MarginLoss, {"num_classes": 0}, ValueError, ["num_classes", "1", "0"]),
    "learn_beta": (MarginLoss, {"learn_beta": "yes"}, TypeError, ["learn_beta", "True or False", "str"]),
    "strategy": (
        BatchEasyHardMiner,
        {"pos_strategy": "middle"},
        ValueError,
        ["pos_strategy", "hard", "middle"],
    ),
    "both semihard": (
        BatchEasyHardMiner,
        {"pos_strategy": "semihard"},
        ValueError,
        ["pos_strategy", "neg_strategy", "semihard"],
    ),
    "semihard beside all": (BatchEasyHardMiner, {"pos_strategy": "all"}, ValueError, ["all", "semihard"]),
    "range": (
        BatchEasyHardMiner,
        {"allowed_pos_range": 0.5},
        ValueError,
        ["allowed_pos_range", "low", "0.5"],
    ),
    "range turned": (
        BatchEasyHardMiner,
        {"allowed_neg_range": (2, 1)},
        ValueError,
        ["allowed_neg_range", "low"],
    ),
    "type": (
        TripletMarginMiner,
        {"type_of_triplets": "soft"},
        ValueError,
        ["type_of_triplets", "semihard", "soft"],
    ),
    "miner's margin": (TripletMarginMiner, {"margin": None}, TypeError, ["margin", "number", "NoneType"]),
    "pair margin": (PairMarginMiner, {"pos_margin": "a"}, TypeError, ["pos_margin", "number", "str"]),
    "cutoff": (DistanceWeightedMiner, {"cutoff": float("inf")}, ValueError, ["cutoff", "finite", "inf"]),
    "collect_stats": (
        BatchHardMiner,
        {"collect_stats": 1},
        TypeError,
        ["collect_stats", "True or False", "int"],
    ),
}


@pytest.mark.parametrize("case", WRONG_LOSSES)
def test_wrong_options(case):
    kind, options, error, words = WRONG_LOSSES[case]
    with pytest.raises(error) as caught:
        kind(**options)
    assert all(word in str(caught.value) for word in words), caught.value
    if case in ("both semihard", "semihard beside all", "epsilon", "num_classes", "learn_beta"):
        return
    module = kind()
    (name, value), *_ = options.items()
    before = repr(module)
    with pytest.raises(error):  # set later, too, without an effect
        setattr(module, name, value)
    assert repr(module) == before


WRONG_BATCHES = {
    "labels": ((X, None), {}, ValueError, ["labels", "indices_tuple"]),
    "labels' length": ((X, Y[:-1]), {}, ValueError, ["labels", "12", "11"]),
    "embeddings": ((X.long(), Y), {}, TypeError, ["embeddings", "float32", "int64"]),
    "ref_labels": ((X, Y), {"ref_emb": X}, ValueError, ["ref_labels", "None"]),
    "indices": ((X, Y), {"indices_tuple": 3}, TypeError, ["indices_tuple", "int"]),
    "two lists": ((X, Y), {"indices_tuple": (Y, Y)}, ValueError, ["indices_tuple", "2"]),
    "out of range": ((X, Y), {"indices_tuple": (Y, Y, Y + 12)}, ValueError, ["negatives", "12"]),
    "unequal lists": ((X, Y), {"indices_tuple": (Y, Y, Y[:3])}, ValueError, ["negatives", "12", "3"]),
    "another batch": (
        (X[:6], Y[:6]),
        {"indices_tuple": BatchHardMiner()(X, Y)},
        ValueError,
        ["indices_tuple", "12", "6"],
    ),
    "backend": ((X, Y), {"backend": "cuda"}, ValueError, ["backend", "fused", "cuda"]),
}


@pytest.mark.parametrize("function", [triplet_margin_loss, margin_loss])
@pytest.mark.parametrize("case", WRONG_BATCHES)
def test_wrong_batches(case, function):
    arguments, options, error, words = WRONG_BATCHES[case]
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    assert all(word in str(caught.value) for word in words), caught.value


def test_wrong_betas():
    for beta, error, word in (
        (torch.ones(2, 2), ValueError, "[2, 2]"),
        (torch.ones(0), ValueError, "[0]"),
        (torch.ones(3, dtype=torch.long), TypeError, "int64"),
    ):
        with pytest.raises(error, match=re.escape(word)):
            margin_loss(X, Y, beta=beta)
    for labels in (Y + 1, Y - 1):
        with pytest.raises(ValueError, match=r"labels: expected classes in \[0, 3\)"):
            margin_loss(X, labels, beta=torch.ones(3))
    triplets = tuple(BatchHardMiner()(X, Y))
    assert margin_loss(X, indices_tuple=triplets) > 0
    with pytest.raises(ValueError, match="labels: expected the labels"):
        margin_loss(X, indices_tuple=triplets, beta=torch.ones(3))


def test_a_miner_of_triplets_beside_a_loss_of_pairs_of_several_processes():
    with pytest.raises(TypeError, match="miner: expected"):
        DistributedLoss(dml_cuda.MultiSimilarityLoss(), miner=BatchHardMiner())


# --- Options and copies


@pytest.mark.parametrize("function", [triplet_margin_loss, margin_loss])
def test_signatures(function):
    """Every parameter stands in the signature and every option in the documentation, with its default."""
    module = {triplet_margin_loss: TripletMarginLoss, margin_loss: MarginLoss}[function]
    own = {name for name, p in inspect.signature(module).parameters.items() if name != "options"}
    for name in own - {"learn_beta", "num_classes"}:
        default = inspect.signature(module).parameters[name].default
        assert inspect.signature(function).parameters[name].default == default
        assert f"{name}: " in function.__doc__ or name == "triplets_per_anchor"
    documented = triplet_margin_loss.__doc__
    for name in TripletOptions.__annotations__:
        assert f"``{name}" in documented
        assert re.search(rf"\b{name}\b", TripletOptions.__doc__)
    assert f'``similarity="{module().similarity}"``' in documented
    assert f'``reduction="{module().reduction}"``' in documented


@pytest.mark.parametrize("listed", [False, True])
@EVERY_MINER
@EVERY_LOSS
def test_threads_do_not_change_a_bit(loss, miner, listed):
    x, y = make_batch(200, 33)
    loss_fn, find = LOSSES[loss], MINERS[miner]
    torch.manual_seed(0)
    mined = None if find is None else find(x, y)
    mined = tuple(mined) if listed and mined is not None else mined
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaf = x.clone().requires_grad_()
        if mined is not None and not listed:
            torch.manual_seed(0)
        value = loss_fn(leaf, y, mined if listed or find is None else find(leaf, y))
        results.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    for value, gradient in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(gradient, results[0][1])


@EVERY_LOSS
def test_options_set_later(loss):
    x, y = make_batch(24, 6)
    module = copy.deepcopy(LOSSES[loss])
    module.margin, module.similarity, module.reduction = 0.4, "cosine", "sum"
    options = {"margin": 0.4, "similarity": "cosine", "reduction": "sum"}
    if loss == "margin":
        module.beta = 0.3
        expected = margin_loss(x, y, beta=0.3, **options)
    else:
        expected = triplet_margin_loss(x, y, smooth_loss=loss == "smooth", **options)
    assert torch.equal(module(x, y), expected)
    assert "margin=0.4" in repr(module)
    assert "similarity='cosine'" in repr(module)


def test_options_of_miners_set_later():
    x, y = make_batch(24, 6)
    miner = BatchEasyHardMiner()
    miner.neg_strategy, miner.pos_strategy, miner.similarity = "hard", "hard", "cosine"
    for a, b in zip(miner(x, y), BatchEasyHardMiner("hard", "hard", similarity="cosine")(x, y), strict=True):
        assert torch.equal(a, b)
    assert "pos_strategy='hard'" in repr(miner)
    with pytest.raises(ValueError, match="similarity: expected distances of unit rows"):
        DistanceWeightedMiner().similarity = "cosine"


@EVERY_LOSS
@EVERY_MINER
def test_copies(loss, miner):
    x, y = make_batch(24, 6)
    module, find = LOSSES[loss], MINERS[miner]
    mined = None if find is None else find(x, y)
    expected = module(x, y, mined)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x, y, mined), expected)
    if find is None:
        return
    for other in (copy.deepcopy(mined), pickle.loads(pickle.dumps(mined))):
        assert type(other) is type(mined)
        assert all(torch.equal(a, b) for a, b in zip(other, mined, strict=True))
        torch.testing.assert_close(module(x, y, other), expected)
    other = pickle.loads(pickle.dumps(copy.deepcopy(find)))
    torch.manual_seed(0)
    lists = tuple(find(x, y))
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(other(x, y), lists, strict=True))


def test_learnt_beta():
    """A parameter, in the state dict, beside the network's."""
    loss_fn = MarginLoss(learn_beta=True, num_classes=5, nu=0.01)
    (beta,) = loss_fn.parameters()
    assert beta.shape == (5,)
    assert loss_fn.state_dict().keys() == {"beta"}
    assert MarginLoss(num_classes=5).state_dict() == {}
    assert not list(MarginLoss().parameters())
    y = torch.arange(20) % 5
    x = torch.randn(20, 6, requires_grad=True)
    optimizer = torch.optim.SGD([x, *loss_fn.parameters()], 0.5)
    values = []
    for _ in range(10):
        value = loss_fn(x, y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0]
    assert len(loss_fn.beta.unique()) > 1
    file = io.BytesIO()
    torch.save(loss_fn.state_dict(), file)
    file.seek(0)
    other = MarginLoss(learn_beta=True, num_classes=5, nu=0.01)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x, y), loss_fn(x, y))
    with pytest.raises(RuntimeError, match="size mismatch for beta"):
        MarginLoss(learn_beta=True).load_state_dict(loss_fn.state_dict())


# --- A batch that changes


def test_a_batch_changed_in_place_is_an_error():
    for find in (miner for miner in MINERS.values() if miner is not None):
        x, y = make_batch(16, 4)
        mined, looked = find(x, y), find(x, y)
        lists = tuple(looked)
        x.mul_(2)
        with pytest.raises(RuntimeError, match="embeddings changed in place"):
            LOSSES["triplet"](x, y, mined)
        with pytest.raises(RuntimeError, match="embeddings changed in place"):
            len(mined[0])
        expected = LOSSES["triplet"](x, y, lists)
        torch.testing.assert_close(LOSSES["triplet"](x, y, looked), expected)


def test_other_points_than_were_mined():
    """Two dropouts, say: the lists of one, the distances of the other."""
    x, y = make_batch(24, 6, dtype=torch.float64)
    other = x + 0.1 * torch.randn_like(x)
    for find in (miner for miner in MINERS.values() if miner is not None):
        mined = find(x, y)
        lists = tuple(mined)
        for loss_fn in LOSSES.values():
            torch.testing.assert_close(loss_fn(other, y, mined), loss_fn(other, y, lists))


def test_mined_by_another_similarity():
    x, y = make_batch(24, 6, dtype=torch.float64)
    mined = BatchHardMiner(similarity="dot")(x, y)
    assert isinstance(mined, MinedTriplets)
    loss_fn = TripletMarginLoss(0.2)
    torch.testing.assert_close(loss_fn(x, y, mined), loss_fn(x, y, tuple(mined)))


def test_check_pairs():
    x, y = make_batch(24, 6)
    loss_fn = TripletMarginLoss(check_pairs=True)
    mined = BatchHardMiner()(x, y)
    loss_fn(x, y, mined)
    with pytest.raises(ValueError, match="other labels"):
        loss_fn(x, y.roll(1), mined)


# --- Autocast, inference mode, transforms, compilation


@EVERY_LOSS
@EVERY_MINER
def test_autocast(loss, miner):
    x, y = make_batch(24, 6)
    function = mined_loss(loss, miner)
    torch.manual_seed(0)
    expected = evaluate(function, x, y)
    torch.manual_seed(0)
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = function(leaf, y)
        assert function(x.bfloat16(), y).dtype == torch.float32
    assert torch.equal(value, expected[0])
    assert torch.equal(torch.autograd.grad(value, leaf)[0], expected[1])


@EVERY_LOSS
@EVERY_MINER
def test_inference_mode(loss, miner):
    x, y = make_batch(24, 6)
    function = mined_loss(loss, miner)
    torch.manual_seed(0)
    expected = function(x, y)
    torch.manual_seed(0)
    with torch.inference_mode():
        assert torch.equal(function(x.clone(), y.clone()), expected)
        inside = x.clone(), y.clone()
    torch.manual_seed(0)
    assert torch.equal(function(*inside), expected)


@EVERY_LOSS
@EVERY_MINER
def test_func_grad(loss, miner):
    x, y = make_batch(24, 6)
    function = mined_loss(loss, miner)
    torch.manual_seed(0)
    _, expected = evaluate(function, x, y)
    torch.manual_seed(0)
    torch.testing.assert_close(torch.func.grad(function)(x, y), expected)


@pytest.mark.parametrize(
    ("loss", "miner"),
    [("triplet", "none"), ("triplet", "batch hard"), ("margin", "semihard"), ("margin", "distance weighted")],
)
def test_compiled(loss, miner):
    """One graph for batches of all sizes; draws as without a compiler where torch's generator is the same."""
    torch._dynamo.reset()
    function = mined_loss(loss, miner)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (24, 32):
        x, y = make_batch(n, 6)
        torch.manual_seed(n)
        expected = evaluate(function, x, y)
        torch.manual_seed(n)
        for a, b in zip(evaluate(compiled, x, y), expected, strict=True):
            torch.testing.assert_close(a, b)


@EVERY_LOSS
def test_memory_bank_of_many_steps(loss):
    """As one batch against the whole queue, whatever part of it is filled."""
    loss_fn = LOSSES[loss]
    memory = CrossBatchMemory(loss_fn, 6, 64)
    seen, classes = [], []
    for n in (16, 16, 24):
        x, y = make_batch(n, 6, dtype=torch.float64)
        seen.append(x)
        classes.append(y)
        value, gradient = evaluate(memory, x, y)
        queue, labels = torch.cat(seen), torch.cat(classes)
        own = torch.arange(len(queue) - n, len(queue))
        mined = dml_cuda.MinedPairs(x, y, queue, labels, epsilon=None, self_index=own)
        leaf = x.clone().requires_grad_()
        expected = loss_fn(leaf, y, mined, queue, labels)
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, expected.detach())
        # Mined of other numbers than the leaf, so by lists; the gradient is the same.
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf)[0])


@EVERY_LOSS
def test_second_derivatives_are_refused(loss):
    """Of a function of the loss too, of which a part could be computed."""
    x, y = make_batch(16, 4)
    x.requires_grad_()
    for function in (lambda value: value, lambda value: value**2):
        (gradient,) = torch.autograd.grad(function(LOSSES[loss](x, y)), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward()
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.func.grad(lambda q: torch.func.grad(lambda p: LOSSES[loss](p, y))(q).sum())(x.detach())


def test_nan():
    for loss_fn in LOSSES.values():
        x, y = make_batch(16, 4)
        x[3, 1] = float("nan")
        assert loss_fn(x, y).isnan()
