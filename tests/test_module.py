"""The modules, and what surrounds the functions: copies, printing, autocast, devices, type hints."""

import copy
import io
import pickle
from importlib import resources

import pytest
import torch
from accuracy import FUNCTIONS
from data import make_batch

import dml_cuda
from dml_cuda import functional

OPTIONS = {
    "multi_similarity": {
        "alpha": 3.0,
        "beta": 40.0,
        "base": 0.3,
        "epsilon": -0.1,
        "similarity": "dot",
        "reduction": "none",
        "backend": "fused",
    },
    "circle": {
        "m": 0.25,
        "gamma": 64.0,
        "detach_weights": False,
        "epsilon": -0.1,
        "similarity": "dot",
        "reduction": "none",
        "backend": "fused",
    },
}
MODULES = {"multi_similarity": dml_cuda.MultiSimilarityLoss, "circle": dml_cuda.CircleLoss}
EVERY = pytest.mark.parametrize("loss", MODULES)


@EVERY
def test_options_reach_the_function(loss):
    """Each option, changed alone, gives what the function gives, which is not what the default gives."""
    embeddings, labels = make_batch(40, 6)
    embeddings = 0.4 * embeddings
    function = getattr(functional, FUNCTIONS[loss])
    default = MODULES[loss]()(embeddings, labels)
    assert torch.equal(default, function(embeddings, labels))
    for name, value in OPTIONS[loss].items():
        module = MODULES[loss](**{name: value})
        leaf = embeddings.clone().requires_grad_()
        changed = module(leaf, labels)
        assert torch.equal(changed, function(embeddings, labels, **{name: value})), name
        if name == "detach_weights":  # changes the gradient only
            (gradient,) = torch.autograd.grad(changed, leaf)
            (before,) = torch.autograd.grad(MODULES[loss]()(leaf, labels), leaf)
            assert not torch.allclose(gradient, before)
        elif name != "backend":
            assert changed.shape != default.shape or not torch.equal(changed, default), name
    everything = MODULES[loss](**OPTIONS[loss])
    assert torch.equal(everything(embeddings, labels), function(embeddings, labels, **OPTIONS[loss]))


@EVERY
def test_ref_emb(loss):
    embeddings, labels = make_batch(20, 6)
    ref_emb, ref_labels = make_batch(30, 6)
    expected = getattr(functional, FUNCTIONS[loss])(
        embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels
    )
    module = MODULES[loss]()
    assert torch.equal(module(embeddings, labels, None, ref_emb, ref_labels), expected)
    assert torch.equal(module(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels), expected)
    assert expected != module(embeddings, labels)


def test_repr():
    assert repr(dml_cuda.MultiSimilarityLoss(beta=40, epsilon=0.1)) == (
        "MultiSimilarityLoss(alpha=2.0, beta=40, base=0.5, epsilon=0.1, similarity='cosine', "
        "reduction='mean', backend='auto', check_pairs=False)"
    )
    assert repr(dml_cuda.CircleLoss(gamma=256)) == (
        "CircleLoss(m=0.4, gamma=256, detach_weights=True, epsilon=None, similarity='cosine', "
        "reduction='mean_nonzero', backend='auto', check_pairs=False)"
    )


@EVERY
def test_copies(loss):
    """Pickle, deepcopy and torch.save keep the options; there is no state to load."""
    embeddings, labels = make_batch(40, 6)
    module = MODULES[loss](**OPTIONS[loss])
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
    assert module.state_dict() == {}
    MODULES[loss]().load_state_dict({})


@EVERY
@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast(loss, backend, dtype):
    """Under autocast the loss is float32, computed from the embeddings as they come, and no less exact."""
    embeddings, labels = make_batch(40, 16, dtype=dtype)
    function = getattr(functional, FUNCTIONS[loss])
    expected = function(embeddings.float(), labels, backend=backend)
    leaf = embeddings.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = function(leaf, labels, backend=backend)
        assert value.dtype == torch.float32
        value.backward()
    torch.testing.assert_close(value.detach(), expected, rtol=1e-5, atol=1e-6)
    assert leaf.grad.dtype == dtype
    assert leaf.grad.abs().max() > 0


@EVERY
def test_in_a_network_under_autocast(loss):
    """The usual loop: a layer in bfloat16, the loss in float32, the gradient back to float32 weights."""
    inputs, labels = make_batch(40, 16)
    layer = torch.nn.Linear(16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = layer(inputs)
        assert embeddings.dtype == torch.bfloat16
        value = MODULES[loss]()(embeddings, labels)
    value.backward()
    assert value.dtype == layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.abs().max() > 0


@EVERY
@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_result_dtype(loss, backend, dtype):
    embeddings, labels = make_batch(20, 16, dtype=dtype)
    for reduction, shape in (("mean", ()), ("none", (20,))):
        value = getattr(functional, FUNCTIONS[loss])(embeddings, labels, backend=backend, reduction=reduction)
        assert value.dtype == dtype
        assert value.shape == shape


@EVERY
def test_training_separates_the_classes(loss):
    """The gradient is of use: a few steps bring every row's nearest neighbour into its own class."""
    embeddings, labels = make_batch(64, 16)
    points = torch.nn.Parameter(embeddings)
    optimizer = torch.optim.Adam([points], lr=0.05)
    module = MODULES[loss](epsilon=0.1)

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


def test_type_hints_are_shipped():
    assert resources.files("dml_cuda").joinpath("py.typed").is_file()
    for name in FUNCTIONS.values():
        function = getattr(functional, name)
        assert function.__annotations__.keys() == {*function.__kwdefaults__, "embeddings", "labels", "return"}


def test_signatures():
    """The public defaults, as users and PML know them."""
    assert functional.multi_similarity_loss.__kwdefaults__ == {
        "alpha": 2.0,
        "beta": 50.0,
        "base": 0.5,
        "epsilon": None,
        "ref_emb": None,
        "ref_labels": None,
        "indices_tuple": None,
        "similarity": "cosine",
        "reduction": "mean",
        "backend": "auto",
        "check_pairs": False,
    }
    assert functional.circle_loss.__kwdefaults__ == {
        "m": 0.4,
        "gamma": 80.0,
        "detach_weights": True,
        "epsilon": None,
        "ref_emb": None,
        "ref_labels": None,
        "indices_tuple": None,
        "similarity": "cosine",
        "reduction": "mean_nonzero",
        "backend": "auto",
        "check_pairs": False,
    }
    for name in FUNCTIONS.values():
        ours = dict(getattr(functional, name).__kwdefaults__)
        for name_of_pairs_or_kernels in ("backend", "indices_tuple", "check_pairs"):
            ours.pop(name_of_pairs_or_kernels)
        assert getattr(dml_cuda.reference, name).__kwdefaults__ == ours
