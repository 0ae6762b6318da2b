"""Parameters that learn: their gradients against autograd of the reference in float64, and as a module's."""

import copy
import warnings

import pytest
import torch
from cases.data import make_batch, make_labels
from cases.heads import EVERY_HEAD, make_rows
from cases.losses import EVERY_LOSS, LOSSES
from torch import nn

import dml_cuda
from dml_cuda._ops import centers

SIMILARITIES = ("cosine", "euclidean", "dot")


def parameters_of(loss, similarity, dtype):
    """Every parameter that may learn, at values that suit the similarity, or at its default."""
    suited = loss.on_distances if similarity == "euclidean" else loss.on_cosines
    values = {**loss.defaults, **loss.smooth, **suited} if similarity else loss.defaults
    return {
        name: nn.Parameter(torch.tensor(float(value), dtype=dtype)) if name in loss.learnable else value
        for name, value in values.items()
    }


def gradients(loss, values, batch, **options):
    """The loss, and its gradients by the embeddings and by each parameter that learns."""
    embeddings, labels, *refs = batch
    leaf = embeddings.detach().clone().requires_grad_()
    names = dict(zip(("ref_emb", "ref_labels"), refs, strict=False))
    value = loss.function(leaf, labels, **values, **names, **options)
    learned = [values[name] for name in loss.learnable]
    up = torch.linspace(0.5, 2.0, value.numel(), dtype=value.dtype).view(value.shape)
    return [value.detach(), *torch.autograd.grad(value, [leaf, *learned], up)]


def batch_of(n, m, dtype=torch.float64):
    embeddings, labels = make_batch(n, 24, dtype=dtype)
    return (
        (embeddings, labels)
        if m is None
        else (embeddings, labels, torch.randn(m, 24).to(dtype), make_labels(m))
    )


@pytest.mark.check
@EVERY_LOSS
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("epsilon", [None, 0.1], ids=["all", "mined"])
@pytest.mark.parametrize("m", [None, 150], ids=["square", "rectangular"])
def test_as_autograd_of_the_reference(loss, similarity, epsilon, m):
    batch = batch_of(140, m)
    for reduction in ("mean_nonzero", "none"):
        options = {"epsilon": epsilon, "similarity": similarity, "reduction": reduction}
        values = parameters_of(loss, similarity, torch.float64)
        fused = gradients(loss, values, batch, backend="fused", **options)
        truth = gradients(loss, values, batch, backend="reference", **options)
        for got, expected in zip(fused, truth, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
        assert any(gradient.abs() > 1e-6 for gradient in truth[2:])


@EVERY_LOSS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_accuracy(loss, dtype):
    """As near to the truth as the reference in the same type, or twice as far."""
    embeddings, labels = batch_of(300, None)
    embeddings = embeddings.to(dtype)
    similarity = loss.similarity

    def by_params(backend, points, kind):
        values = parameters_of(loss, similarity, kind)
        return torch.stack(gradients(loss, values, (points, labels), backend=backend)[2:]).double()

    truth = by_params("reference", embeddings.double(), torch.float64)
    error = (by_params("fused", embeddings, torch.float32) - truth).abs()
    allowed = 2 * (by_params("reference", embeddings, torch.float32) - truth).abs()
    assert (error <= allowed + 2e-6 * truth.abs().clamp(min=1e-3)).all(), (error, allowed, truth)


@EVERY_LOSS
def test_listed_pairs(loss):
    embeddings, labels = batch_of(40, None)
    same = labels[:, None] == labels
    a1, p = same.logical_and(~torch.eye(40, dtype=torch.bool)).nonzero(as_tuple=True)
    a2, n = (~same).nonzero(as_tuple=True)
    pairs = a1[::2], p[::2], a2[::3], n[::3]
    values = parameters_of(loss, loss.similarity, torch.float64)
    fused, truth = (
        gradients(loss, values, (embeddings, labels), indices_tuple=pairs, backend=backend)
        for backend in ("fused", "reference")
    )
    for got, expected in zip(fused, truth, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@EVERY_LOSS
def test_only_the_parameters_learn(loss):
    """Embeddings that need no gradient, and the same numbers as with one, twice to the bit."""
    embeddings, labels = batch_of(300, None, torch.float32)
    values = parameters_of(loss, loss.similarity, torch.float32)
    both = gradients(loss, values, (embeddings, labels))[2:]
    value = loss.function(embeddings, labels, **values)
    learned = [values[name] for name in loss.learnable]
    if loss.reduction == "none":
        value = value.sum()
    alone = torch.autograd.grad(value, learned, torch.full_like(value, 0.5))
    for got, expected in zip(alone, both, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads):
    embeddings, labels = batch_of(1100, None, torch.float32)
    loss = LOSSES["multi_similarity"]
    values = parameters_of(loss, "cosine", torch.float32)
    torch.set_num_threads(2)
    expected = gradients(loss, values, (embeddings, labels))
    torch.set_num_threads(threads)
    for got, same in zip(gradients(loss, values, (embeddings, labels)), expected, strict=True):
        assert torch.equal(got, same)


def test_rows_that_are_not_finite():
    embeddings, labels = batch_of(70, None)
    embeddings[33, 3] = float("nan")
    loss = LOSSES["nt_xent"]
    for backend in ("fused", "reference"):
        found = gradients(
            loss, parameters_of(loss, "cosine", torch.float64), (embeddings, labels), backend=backend
        )
        assert found[0].isnan()
        assert found[2].isnan()


def test_no_pairs():
    loss = LOSSES["multi_similarity"]
    values = parameters_of(loss, "cosine", torch.float32)
    for n in (0, 1):
        found = gradients(loss, values, (torch.randn(n, 4), torch.zeros(n, dtype=torch.long)))
        assert all((x == 0).all() for x in found)


# ---- the module ---------------------------------------------------------------------------------------


@pytest.mark.check
@EVERY_LOSS
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_a_parameter_of_the_module(loss, shape):
    made = loss.module(
        **{name: nn.Parameter(torch.full(shape, float(loss.defaults[name]))) for name in loss.learnable}
    )
    assert [name for name, _ in made.named_parameters()] == loss.learnable
    assert list(made.state_dict()) == loss.learnable
    embeddings, labels = batch_of(40, None, torch.float32)
    value = made(embeddings, labels)
    assert value == loss.module()(embeddings, labels)
    value.backward()
    assert all(p.grad is not None and p.grad.shape == shape for p in made.parameters())
    # Its value is read at every call.
    other = copy.deepcopy(made)
    other.load_state_dict({name: torch.full(shape, float(loss.changed[name])) for name in loss.learnable})
    changed = loss.module(**{name: loss.changed[name] for name in loss.learnable})
    assert other(embeddings, labels) == changed(embeddings, labels)
    assert made(embeddings, labels) == value
    assert made.double().state_dict()[loss.learnable[0]].dtype == torch.float64
    assert f"={float(loss.defaults[loss.learnable[0]])}" in repr(made)


def test_setting_one():
    made = dml_cuda.NTXentLoss(temperature=0.1)
    assert not list(made.parameters())
    made.temperature = nn.Parameter(torch.tensor(0.2))
    assert [name for name, _ in made.named_parameters()] == ["temperature"]
    assert isinstance(made.temperature, nn.Parameter)
    made.temperature = 0.3
    assert made.temperature == 0.3
    assert not list(made.parameters())
    made.temperature = torch.tensor(0.4, requires_grad=True)  # a leaf of the user's, or the result of a model
    assert not list(made.parameters())
    embeddings, labels = batch_of(40, None, torch.float32)
    made(embeddings, labels).backward()
    assert made.temperature.grad != 0
    with pytest.raises(ValueError, match="temperature: expected a number above 0, got 0"):
        made.temperature = nn.Parameter(torch.tensor(0.0))


def test_the_alias_of_circle_loss():
    made = dml_cuda.CircleLoss()
    made.margin = nn.Parameter(torch.tensor(0.3))
    assert [name for name, _ in made.named_parameters()] == ["m"]


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_a_value_that_went_wrong(value):
    """An error where the value can be looked at; in compiled code the loss is not a number."""
    made = dml_cuda.NTXentLoss(temperature=nn.Parameter(torch.tensor(0.1)))
    embeddings, labels = batch_of(40, None, torch.float32)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    assert compiled(embeddings, labels).isfinite()
    with torch.no_grad():
        made.temperature.fill_(value)
    with pytest.raises(ValueError, match="temperature: expected a"):
        made(embeddings, labels)
    assert compiled(embeddings, labels).isnan()


def test_functional_call():
    made = dml_cuda.MultiSimilarityLoss(beta=nn.Parameter(torch.tensor(50.0)))
    embeddings, labels = batch_of(40, None, torch.float32)

    def value(beta):
        return torch.func.functional_call(made, {"beta": beta}, (embeddings, labels))

    beta = torch.tensor(30.0)
    assert value(beta) == dml_cuda.MultiSimilarityLoss(beta=30.0)(embeddings, labels)
    leaf = beta.clone().requires_grad_()
    (expected,) = torch.autograd.grad(value(leaf), leaf)
    assert torch.func.grad(value)(beta) == expected


def test_training_finds_a_scale():
    """A step of an optimiser over a model and its loss's parameter."""
    torch.manual_seed(0)
    model, made = nn.Linear(16, 8), dml_cuda.NTXentLoss(temperature=nn.Parameter(torch.tensor(0.5)))
    optimizer = torch.optim.SGD([*model.parameters(), *made.parameters()], lr=0.1)
    points, labels = torch.randn(64, 16), torch.arange(16).repeat(4)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        value = made(model(points), labels)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0]
    assert made.temperature != 0.5


def test_compiled_once_for_all_values():
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph

    made = dml_cuda.NTXentLoss(temperature=nn.Parameter(torch.tensor(0.1)))
    compiled = torch.compile(made, fullgraph=True, backend=backend)
    embeddings, labels = batch_of(40, None, torch.float32)
    for value in (0.1, 0.2, 0.3):
        with torch.no_grad():
            made.temperature.fill_(value)
        made.temperature.grad = None
        result = compiled(embeddings, labels)
        result.backward()
        found = made.temperature.grad.clone()
        made.temperature.grad = None
        expected = made(embeddings, labels)
        expected.backward()
        assert result == expected
        assert found == made.temperature.grad
    assert len(compilations) == 1


def test_opcheck():
    embeddings, labels = batch_of(20, None, torch.float32)
    loss = LOSSES["circle"]
    from dml_cuda._ops.arguments import OpBatch, OpOptions

    params = torch.tensor([*loss.params(), 0.1], dtype=torch.float64, requires_grad=True)
    options = OpOptions("circle", [], 0.1, "cosine", "mean", save_for_backward=True, dynamic_params=params)
    batch = OpBatch(embeddings.requires_grad_(), labels, None, None, None, None)
    torch.library.opcheck(torch.ops.dml_cuda.pair_loss.default, (*batch, *options))


# ---- class-level losses ------------------------------------------------------------------------------------

HEAD_VALUES = {
    "NormalizedSoftmaxLoss": {"temperature": 0.2},
    "CosFaceLoss": {"margin": 0.2, "scale": 8.0},
    "ArcFaceLoss": {"margin": 20.0, "scale": 8.0},
    "ProxyAnchorLoss": {"margin": 0.1, "alpha": 8.0},
    "ProxyNCALoss": {"softmax_scale": 2.0},
    "SoftTripleLoss": {"la": 8.0, "gamma": 0.2, "margin": 0.05, "tau": 0.3},
    "CircleClassifierLoss": {"m": 0.25, "gamma": 8.0},
    "SubCenterArcFaceLoss": {"margin": 20.0, "scale": 8.0},
    "SphereFaceLoss": {"scale": 2.0},
}


@pytest.mark.check
@EVERY_HEAD
def test_heads(head):
    both = []
    for backend in ("auto", "reference"):
        torch.manual_seed(0)
        values = {
            name: nn.Parameter(torch.tensor(value, dtype=torch.float64))
            for name, value in HEAD_VALUES[head.name].items()
        }
        module = head.make(7, 12, backend=backend, **values).double()
        assert {*values} < {name for name, _ in module.named_parameters()}
        embeddings, labels = make_rows(module, 40, 3.0)
        loss = module(embeddings.double(), labels)
        both.append([loss.detach(), *torch.autograd.grad(loss, [*module.parameters()])])
        fixed = head.make(7, 12, backend=backend, **HEAD_VALUES[head.name]).double()
        fixed.load_state_dict(module.state_dict(), strict=False)
        torch.testing.assert_close(fixed(embeddings.double(), labels), loss, rtol=1e-12, atol=0)
    for got, expected in zip(*both, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    assert all(gradient.abs().max() > 1e-6 for gradient in both[0][1:])


def test_a_default_that_follows_a_parameter():
    """Ranked list loss takes its alpha from the margin, as a constant, and does not look at the number."""
    embeddings, labels = batch_of(40, None)
    margin = nn.Parameter(torch.tensor(0.4))
    fixed = dml_cuda.RankedListLoss(margin=0.4)(embeddings, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_fn = copy.deepcopy(dml_cuda.RankedListLoss(margin=margin))
        values = [
            loss_fn(embeddings, labels),
            dml_cuda.functional.ranked_list_loss(embeddings, labels, margin=margin),
        ]
    assert [*dict(loss_fn.named_parameters())] == ["margin"]
    for value in values:
        torch.testing.assert_close(value.detach(), fixed, rtol=1e-6, atol=1e-7)


CENTER_HEADS = {
    "SoftTripleLoss": {"centers_per_class": 3},
    "SubCenterArcFaceLoss": {"sub_centers": 3},
}


def center_head(name, **options):
    values = {
        key: nn.Parameter(torch.tensor(value, dtype=torch.float64))
        for key, value in HEAD_VALUES[name].items()
    }
    return getattr(dml_cuda, name)(7, 5, **CENTER_HEADS[name], **values, **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", CENTER_HEADS)
def test_gradcheck_of_heads_with_several_centers(monkeypatch, name, reduction):
    """In blocks of two classes; one row has no class."""
    monkeypatch.setattr(centers, "_BLOCK", 2 * 3 * 6)
    head = center_head(name, reduction=reduction).double()
    embeddings, labels = make_rows(head, 6)
    labels[2] = -1
    embeddings = embeddings.double().requires_grad_()
    names = [name for name, _ in head.named_parameters()]

    def loss(embeddings, *values):
        return torch.func.functional_call(head, dict(zip(names, values, strict=True)), (embeddings, labels))

    assert torch.autograd.gradcheck(loss, (embeddings, *head.parameters()))


@pytest.mark.parametrize("name", CENTER_HEADS)
def test_heads_with_several_centers_are_compiled_once_for_all_values(name):
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph

    head = center_head(name)
    compiled = torch.compile(head, fullgraph=True, backend=backend)
    embeddings, labels = make_rows(head, 20)
    for factor in (1.0, 1.5, 0.5):
        with torch.no_grad():
            for key, value in HEAD_VALUES[name].items():
                getattr(head, key).fill_(value * factor)
        results = []
        for run in (head, compiled):
            head.zero_grad()
            value = run(embeddings, labels)
            value.backward()
            results.append([value, *(p.grad for p in head.parameters())])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
    assert len(compilations) == 1
