"""The modules, and what surrounds the functions: copies, printing, autocast, devices, type hints."""

import copy
import inspect
import io
import pickle
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from cases.data import make_batch
from cases.losses import EVERY_LOSS, LOSSES
from cases.ranking import RANKINGS

import dml_cuda
from dml_cuda import functional
from dml_cuda.losses import _pair

pytestmark = pytest.mark.slow(40)

ROOT = Path(__file__).parents[2]
SHARED = {  # every shared option, at another value than its default
    "epsilon": -0.1,
    "similarity": "dot",
    "normalize_embeddings": False,
    "reduction": "none",
    "backend": "reference",
    "check_pairs": True,
    "cache_bytes": 0,
}


def other_options(loss):
    return {**loss.changed, **SHARED}


@EVERY_LOSS
def test_options_reach_the_function(loss):
    """Each option, changed alone, gives what the function gives, which is not what the default gives."""
    embeddings, labels = make_batch(40, 6)
    embeddings = 0.4 * embeddings
    default = loss.module()(embeddings, labels)
    assert torch.equal(default, loss.function(embeddings, labels))
    for name, value in other_options(loss).items():
        module = loss.module(**{name: value})
        leaf = embeddings.clone().requires_grad_()
        changed = module(leaf, labels)
        assert torch.equal(changed, loss.function(embeddings, labels, **{name: value})), name
        if name == "detach_weights":  # changes the gradient only
            (gradient,) = torch.autograd.grad(changed, leaf)
            (before,) = torch.autograd.grad(loss.module()(leaf, labels), leaf)
            assert not torch.allclose(gradient, before)
        elif name not in ("backend", "check_pairs", "cache_bytes"):
            assert changed.shape != default.shape or not torch.equal(changed, default), name
    options = other_options(loss)
    everything = loss.module(**options)
    assert torch.equal(everything(embeddings, labels), loss.function(embeddings, labels, **options))


@EVERY_LOSS
def test_options_are_attributes(loss):
    """What was given, what is set, and what a call then does."""
    embeddings, labels = make_batch(40, 6)
    module = loss.module()
    for name, value in other_options(loss).items():
        made = loss.module(**{name: value})
        assert getattr(made, name) == value
        module = loss.module()
        assert getattr(module, name) != value
        setattr(module, name, value)
        assert getattr(module, name) == value
        assert repr(module) == repr(made)
        assert torch.equal(module(embeddings, labels), made(embeddings, labels)), name
    with pytest.raises(AttributeError):
        module.no_such_option  # noqa: B018


def test_margin_is_m():
    module = dml_cuda.CircleLoss(margin=0.3)
    assert module.m == module.margin == 0.3
    module.margin = 0.2
    assert module.m == module.margin == 0.2
    for wrong in ("x", float("nan")):
        with pytest.raises((TypeError, ValueError), match=r"^margin: expected"):
            dml_cuda.CircleLoss(margin=wrong)
        with pytest.raises((TypeError, ValueError), match=r"^margin: expected"):
            module.margin = wrong
    with pytest.raises(ValueError, match=r"^margin: .*m=0\.3 and margin=0\.2"):
        dml_cuda.CircleLoss(m=0.3, margin=0.2)


def schedule(loss, k):
    """Parameters of step k, and an epsilon."""
    scaled = {name: v for name, v in loss.changed.items() if name != "detach_weights"}
    return {**{name: v * (1 + k / 50) for name, v in scaled.items()}, "epsilon": 0.1 + k / 100}


SCHEDULES = [(loss, backend, None) for loss in LOSSES.values() for backend in ("fused", "reference")]
SCHEDULES.append((LOSSES["multi_similarity"], "fused", True))  # shapes are the ops' affair, no loss's


@pytest.mark.long
@pytest.mark.parametrize(
    ("loss", "backend", "dynamic"),
    SCHEDULES,
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_schedules_compile(loss, backend, dynamic):
    """Options that change at every step, of a module and of a function: a graph or two, whole, serve all."""
    embeddings, labels = make_batch(24, 6)
    module, eager = loss.module(backend=backend), loss.function

    def function(x, y, **options):
        return eager(x, y, backend=backend, **options)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = [
        torch.compile(call, fullgraph=True, dynamic=dynamic, backend=counter) for call in (module, function)
    ]
    for k in range(6):
        options = schedule(loss, k)
        for name, value in options.items():
            setattr(module, name, value)
        results = []
        for call, own in ((module, {}), (compiled[0], {}), (compiled[1], options)):
            leaf = embeddings.clone().requires_grad_()
            value = call(leaf, labels, **own)
            results.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
        for found in results[1:]:
            torch.testing.assert_close(found, results[0])
    assert counter.frame_count <= 4


def test_modules_of_many_options_compile():
    """A sweep in one process: another instance is no reason to give up."""
    embeddings, labels = make_batch(24, 6)
    torch._dynamo.reset()
    for k in range(12):
        module = dml_cuda.MultiSimilarityLoss(alpha=1 + k / 7, epsilon=k / 50)
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
        torch.testing.assert_close(compiled(embeddings, labels), module(embeddings, labels))


@EVERY_LOSS
def test_copies(loss):
    """Pickle, deepcopy and torch.save keep the options; there is no state to load."""
    embeddings, labels = make_batch(40, 6)
    module = loss.module(**{**SHARED, "epsilon": 0.3})
    for name, value in other_options(loss).items():
        setattr(module, name, value)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [
        pickle.loads(pickle.dumps(module)),
        copy.deepcopy(module),
        torch.load(file, weights_only=False),
    ]
    for other in copies:
        assert other is not module
        assert repr(other) == repr(module)
        assert torch.equal(other(embeddings, labels), module(embeddings, labels))
        other.reduction = "sum"
        assert module.reduction == "none"
    assert module.state_dict() == {}
    loss.module().load_state_dict({})


@EVERY_LOSS
def test_ref_emb(loss):
    embeddings, labels = make_batch(20, 6)
    ref_emb, ref_labels = make_batch(30, 6)
    expected = loss.function(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)
    module = loss.module()
    assert torch.equal(module(embeddings, labels, None, ref_emb, ref_labels), expected)
    assert torch.equal(module(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels), expected)
    assert expected != module(embeddings, labels)


def test_functions_check_plain_options_once(monkeypatch):
    """And what is equal to them but of another type again, as every parameter that is a tensor."""
    made = []

    def make_call(formula, values, options, **how):
        made.append(dict(values))
        return original(formula, values, options, **how)

    original = _pair.make_call
    monkeypatch.setattr(_pair, "make_call", make_call)
    monkeypatch.setattr(_pair, "_remembered", {})
    x, labels = make_batch(12, 4)
    loss = functional.multi_similarity_loss
    first = loss(x, labels, beta=1, epsilon=0.1)
    assert torch.equal(loss(x, labels, beta=1, epsilon=0.1), first)
    assert len(made) == 1
    assert not torch.equal(loss(x, labels, beta=2, epsilon=0.1), first)
    assert torch.equal(loss(x, labels, beta=1.0, epsilon=0.1), first)
    assert not torch.equal(loss(x, labels, beta=1), first)
    assert len(made) == 4
    for _ in range(2):
        with pytest.raises(TypeError, match="beta"):
            loss(x, labels, beta=True)
        loss(x, labels, beta=torch.tensor(1.0))
    assert len(made) == 8
    for k in range(600):  # a schedule
        loss(x, labels, beta=1 + k / 600)
    assert len(_pair._remembered) <= 256


def test_repr():
    shared = "epsilon=None, similarity='cosine', normalize_embeddings=None, reduction={!r}, backend='auto', "
    assert repr(dml_cuda.MultiSimilarityLoss(beta=40)) == (
        f"MultiSimilarityLoss(alpha=2.0, beta=40, base=0.5, {shared.format('mean')}check_pairs=False, "
        "class_weights=None, cache_bytes=None)"
    )
    assert repr(dml_cuda.CircleLoss(gamma=256)) == (
        "CircleLoss(m=0.4, gamma=256, detach_weights=True, "
        f"{shared.format('mean_nonzero')}check_pairs=False, class_weights=None, cache_bytes=None)"
    )


@EVERY_LOSS
@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast(loss, backend, dtype):
    """Under autocast the loss is float32, computed from the embeddings as they come, and no less exact."""
    embeddings, labels = make_batch(40, 16, dtype=dtype)
    expected = loss.function(embeddings.float(), labels, backend=backend)
    leaf = embeddings.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss.function(leaf, labels, backend=backend)
        assert value.dtype == torch.float32
        value.backward()
    torch.testing.assert_close(value.detach(), expected, rtol=1e-5, atol=1e-6)
    assert leaf.grad.dtype == dtype
    assert leaf.grad.abs().max() > 0


@EVERY_LOSS
def test_in_a_network_under_autocast(loss):
    """The usual loop: a layer in bfloat16, the loss in float32, the gradient back to float32 weights."""
    inputs, labels = make_batch(40, 16)
    layer = torch.nn.Linear(16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = layer(inputs)
        assert embeddings.dtype == torch.bfloat16
        value = loss.module()(embeddings, labels)
    value.backward()
    assert value.dtype == layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.abs().max() > 0


@EVERY_LOSS
@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_result_dtype(loss, backend, dtype):
    embeddings, labels = make_batch(20, 16, dtype=dtype)
    for reduction, shape in (("mean", ()), ("none", (20,))):
        value = loss.function(embeddings, labels, backend=backend, reduction=reduction)
        assert value.dtype == dtype
        assert value.shape == shape


@EVERY_LOSS
def test_training_separates_the_classes(loss):
    """The gradient is of use: a few steps bring every row's nearest neighbour into its own class."""
    embeddings, labels = make_batch(64, 16)
    points = torch.nn.Parameter(embeddings)
    optimizer = torch.optim.Adam([points], lr=0.05)
    module = loss.module(epsilon=0.1)

    def recall():
        unit = torch.nn.functional.normalize(points.detach())
        nearest = (unit @ unit.T).fill_diagonal_(-2).argmax(1)
        return (labels[nearest] == labels).float().mean()

    assert recall() < 0.6
    for _ in range(40):
        optimizer.zero_grad()
        module(points, labels).backward()
        optimizer.step()
    assert recall() == 1


@pytest.mark.check
def test_signatures():
    """Every parameter stands in the signature and every option in the documentation, with its default."""
    for loss in LOSSES.values():
        module = loss.module()
        for documented in (loss.function, loss.module):
            parameters = inspect.signature(documented).parameters
            for name in loss.changed:
                assert parameters[name].default == getattr(module, name)
            assert parameters["options"].kind == inspect.Parameter.VAR_KEYWORD
        text = loss.function.__doc__
        for name in dml_cuda.PairOptions.__annotations__:
            assert f"``{name}" in text
            assert f"{name}: " in dml_cuda.PairOptions.__doc__
        assert f'``similarity="{module.similarity}"``' in text
        assert f'``reduction="{module.reduction}"``' in text
    others = {
        "pair_weights",
        "PairWeights",
        "triplet_margin_loss",  # tests/integration/test_triplet_integration.py
        "margin_loss",
        "lifted_structure_loss",  # tests/pairs/test_composed.py
        "ranked_list_loss",
        *(loss.function.__name__ for loss in RANKINGS.values()),  # tests/ranking
    }
    assert {loss.function.__name__ for loss in LOSSES.values()} | others == set(functional.__all__)


@pytest.mark.check
@EVERY_LOSS
def test_defaults(loss):
    """As users and PML know them."""
    module = loss.module()
    assert {name: getattr(module, name) for name in loss.changed} == loss.defaults
    assert module.epsilon is None
    assert (module.similarity, module.reduction) == (loss.similarity, loss.reduction)
