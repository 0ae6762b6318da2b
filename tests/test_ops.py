"""What PyTorch asks of an op: opcheck, gradcheck, torch.compile, and the rules of autograd."""

import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config
from accuracy import evaluate
from data import make_batch, make_labels
from losses import LOSSES

import dml_cuda
from dml_cuda import _C, functional

OPS = torch.ops.dml_cuda
EVERY = pytest.mark.parametrize("function", [loss.function for loss in LOSSES.values()], ids=LOSSES)


def forward_arguments(
    loss,
    n,
    *,
    m=None,
    self_ref=None,
    ref_count=None,
    dtype=torch.float32,
    epsilon=0.1,
    similarity="cosine",
    reduction="mean",
    divide=True,
    save=True,
):
    embeddings, labels = make_batch(n, 6, dtype=dtype)
    ref_emb = ref_labels = None
    if m is not None:
        ref_emb, ref_labels = torch.randn(m, 6).to(dtype).requires_grad_(), make_labels(m)
    return (
        embeddings.requires_grad_(),
        labels,
        ref_emb,
        ref_labels,
        self_ref,
        ref_count,
        loss,
        LOSSES[loss].params(similarity),
        epsilon,
        similarity,
        reduction,
        True,
        divide,
        save,
    )


FORWARD_CASES = {
    "square": {"loss": "multi_similarity", "n": 140},
    "rectangular": {"loss": "circle", "n": 10, "m": 130, "reduction": "none", "epsilon": None},
    "own among the references": {"loss": "circle", "n": 4, "m": 9, "self_ref": torch.tensor([0, -1, 8, 3])},
    "some of the references": {"loss": "circle", "n": 4, "m": 300, "ref_count": torch.tensor(150)},
    "half": {"loss": "multi_similarity", "n": 9, "dtype": torch.float16, "reduction": "mean_nonzero"},
    "double, nothing saved": {"loss": "circle", "n": 130, "dtype": torch.float64, "save": False},
    "empty": {"loss": "multi_similarity", "n": 0, "reduction": "none"},
    **{name: {"loss": name, "n": 30, "similarity": "euclidean"} for name in LOSSES},
    "undivided": {"loss": "contrastive", "n": 20, "divide": False},
}


@pytest.mark.parametrize("name", FORWARD_CASES)
def test_opcheck(name):
    torch.library.opcheck(OPS.pair_loss.default, forward_arguments(**FORWARD_CASES[name]))


@pytest.mark.parametrize(
    ("name", "need"),
    [
        ("square", (True, False)),
        ("rectangular", (True, True)),
        ("own among the references", (True, False)),
        ("some of the references", (True, True)),
        ("undivided", (True, False)),
    ],
)
def test_opcheck_backward(name, need):
    inputs = forward_arguments(**FORWARD_CASES[name])
    with torch.no_grad():
        loss, saved = OPS.pair_loss(*inputs)
    points = [None if x is None else x.detach() for x in inputs[:6]]
    arguments = (torch.ones_like(loss), *points, saved, *inputs[6:8], *inputs[9:11], inputs[12], *need)
    # It has no derivative of its own, so what is left to check is its schema and its fake.
    names = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OPS.pair_loss_backward.default, arguments, test_utils=names)


@pytest.mark.parametrize("reduction", ["mean", "mean_nonzero", "mean_valid", "sum", "none"])
def test_gradients_by_finite_differences(reduction):
    embeddings, labels = make_batch(9, 4, dtype=torch.float64)
    ref_labels = make_labels(11)
    points = [embeddings.requires_grad_(), torch.randn(11, 4, dtype=torch.float64, requires_grad=True)]
    losses = (
        (functional.multi_similarity_loss, {"beta": 5.0}),
        (functional.multi_similarity_loss, {"epsilon": 0.3, "similarity": "dot"}),
        (functional.circle_loss, {"gamma": 4.0, "detach_weights": False}),
        (functional.circle_loss, {"gamma": 4.0, "detach_weights": False, "epsilon": 0.3}),
    )
    for function, options in losses:
        options = {**options, "reduction": reduction, "backend": "fused"}

        def square(x, function=function, options=options):
            return function(x, labels, **options)

        def rectangular(x, y, function=function, options=options):
            return function(x, labels, ref_emb=y, ref_labels=ref_labels, **options)

        assert torch.autograd.gradcheck(square, points[:1])
        assert torch.autograd.gradcheck(rectangular, points)


def test_compiled_with_inductor():
    """The loss between ordinary operations, compiled whole: the same value and gradients."""
    embeddings, labels = make_batch(40, 8)
    weight = torch.randn(8, 8)

    def step(weight, embeddings, labels):
        return 3 * functional.multi_similarity_loss(embeddings @ weight, labels, epsilon=0.1)

    results = []
    # Inductor's cache on disk does not know when a fake kernel has changed.
    with torch._inductor.config.patch(force_disable_caches=True):
        for run in (step, torch.compile(step, fullgraph=True)):
            leaf = weight.clone().requires_grad_()
            value = run(leaf, embeddings, labels)
            value.backward()
            results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(results[1], results[0])


@EVERY
def test_compiled_with_any_number_of_rows(function):
    """The first size compiles, the second compiles for any size, and no later one compiles again."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def step(embeddings, labels, ref_emb, ref_labels):
        square = function(embeddings, labels, epsilon=0.1)
        return (
            square
            + function(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels, reduction="none").sum()
        )

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    sizes = [(20, 30), (45, 50), (300, 260), (131, 140), (777, 513), (60, 19)]
    for n, m in sizes:
        embeddings, labels = make_batch(n, 5)
        ref_emb, ref_labels = make_batch(m, 5)
        results = []
        for run in (step, compiled):
            leaves = [embeddings.clone().requires_grad_(), ref_emb.clone().requires_grad_()]
            value = run(leaves[0], labels, leaves[1], ref_labels)
            results.append((value, *torch.autograd.grad(value, leaves)))
        torch.testing.assert_close(results[1], results[0])
    assert counter.frame_count == 2


def test_compiled_module():
    embeddings, labels = make_batch(40, 8)
    for module in (dml_cuda.CircleLoss(), dml_cuda.MultiSimilarityLoss(epsilon=0.1)):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(embeddings, labels), module(embeddings, labels))


@EVERY
def test_second_derivative_points_to_the_reference(function):
    embeddings, labels = make_batch(20, 4, dtype=torch.float64)
    embeddings.requires_grad_()
    (gradient,) = torch.autograd.grad(function(embeddings, labels), embeddings, create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        gradient.square().sum().backward()
    value = function(embeddings, labels, backend="reference")
    (gradient,) = torch.autograd.grad(value, embeddings, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), embeddings)
    assert second.abs().max() > 0


@EVERY
@pytest.mark.parametrize("n", [40, 300])
def test_second_backward_of_one_graph(function, n):
    embeddings, labels = make_batch(n, 6)
    embeddings.requires_grad_()
    value = function(embeddings, labels, epsilon=0.1)
    (first,) = torch.autograd.grad(value, embeddings, retain_graph=True)
    (second,) = torch.autograd.grad(value, embeddings, torch.tensor(-3.0))
    torch.testing.assert_close(second, -3 * first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, embeddings)


@EVERY
def test_gradient_is_linear_in_the_upstream(function):
    embeddings, labels = make_batch(140, 6, dtype=torch.float64)
    upstream = torch.randn(2, 140, dtype=torch.float64)
    parts = [evaluate(function, embeddings, labels, reduction="none", upstream=u)[1] for u in upstream]
    # A column of a matrix: the upstream gradient need not be contiguous. An expanded one neither.
    whole = evaluate(function, embeddings, labels, reduction="none", upstream=upstream.T.contiguous().sum(1))[
        1
    ]
    torch.testing.assert_close(whole, parts[0] + parts[1])
    strided = upstream.T.contiguous()[:, 1]
    torch.testing.assert_close(
        evaluate(function, embeddings, labels, reduction="none", upstream=strided)[1], parts[1]
    )
    ones = evaluate(function, embeddings, labels, reduction="none", upstream=torch.ones(1).expand(140))[1]
    torch.testing.assert_close(ones, evaluate(function, embeddings, labels, reduction="sum")[1])
    zero = evaluate(function, embeddings, labels, reduction="none", upstream=torch.zeros(140))[1]
    assert (zero == 0).all()


@EVERY
def test_changing_the_inputs_before_backward_is_noticed(function):
    embeddings, labels = make_batch(20, 4)
    leaf = embeddings.clone().requires_grad_()
    shifted = leaf + 0
    value = function(shifted, labels)
    with torch.no_grad():
        shifted += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@EVERY
def test_without_gradient(function):
    embeddings, labels = make_batch(200, 6)
    expected = function(embeddings.clone().requires_grad_(), labels, epsilon=0.1)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            value = function(embeddings.clone().requires_grad_(), labels, epsilon=0.1)
        assert not value.requires_grad
        assert torch.equal(value, expected.detach())
    assert not function(embeddings, labels).requires_grad


def test_nothing_is_cached_without_gradient():
    inputs = forward_arguments("multi_similarity", 300)
    with_tiles, without = (OPS.pair_loss(*inputs[:-1], save)[1].numel() for save in (True, False))
    assert with_tiles > without + 300 * 300 / 2 * 4


def test_the_list_of_laws():
    """Kernels, Python and the tests know the same losses, with the same numbers of parameters."""
    assert {name: len(loss.params()) for name, loss in LOSSES.items()}.items() <= _C.laws.items()


def test_a_law_that_is_not_in_the_list():
    inputs = list(forward_arguments("circle", 8))
    inputs[6] = "cicle"
    with pytest.raises(ValueError, match=r"law: expected one of multi_similarity, circle, .*; got .cicle."):
        OPS.pair_loss(*inputs)
    inputs[6:8] = "circle", [1.0]
    with pytest.raises(ValueError, match="params: expected 3 numbers for circle, got 1"):
        OPS.pair_loss(*inputs)


@pytest.mark.parametrize("name", LOSSES)
def test_undivided(name):
    """Parts and units, for who divides them elsewhere: the same loss and the same gradient."""
    inputs = forward_arguments(name, 40, dtype=torch.float64)
    value, _ = OPS.pair_loss(*inputs)
    parts, _ = OPS.pair_loss(*inputs[:-2], False, True)
    assert parts.shape == (4,)
    total = parts[0] / parts[2].detach().clamp(min=1) + parts[1] / parts[3].detach().clamp(min=1)
    torch.testing.assert_close(total, value)
    expected, found = (torch.autograd.grad(x, inputs[0])[0] for x in (value, total))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mine_self", [True, False])
def test_a_row_among_the_references(mine_self):
    """Without mining with it, a row's own copy is no pair at all: as if the references were the rows."""
    embeddings, labels = make_batch(30, 6, dtype=torch.float64)
    own = torch.arange(30)
    law = "multi_similarity", LOSSES["multi_similarity"].params()
    rule = 0.1, "cosine", "none"
    square, _ = OPS.pair_loss(embeddings, labels, None, None, None, None, *law, *rule, True, True, False)
    arguments = embeddings, labels, embeddings, labels, own, None, *law, *rule, mine_self, True, False
    value, _ = OPS.pair_loss(*arguments)
    if mine_self:
        assert (value <= square + 1e-12).all()  # the copy is the easiest positive: never the hardest
        assert not torch.equal(value, torch.zeros_like(value))
    else:
        torch.testing.assert_close(value, square)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"saved": lambda saved: saved[:-1]}, "saved: expected the"),
        ({"saved": lambda saved: saved.float()}, "saved: expected the"),
        ({"grad_loss": lambda grad: torch.ones(3)}, "grad_loss: expected 1 elements"),
    ],
)
def test_backward_of_something_else(change, message):
    inputs = forward_arguments("circle", 30)
    with torch.no_grad():
        loss, saved = OPS.pair_loss(*inputs)
    given = {"grad_loss": torch.ones_like(loss), "saved": saved}
    for name, other in change.items():
        given[name] = other(given[name])
    options = *inputs[6:8], *inputs[9:11], True, True, False
    with pytest.raises(ValueError, match=message):
        OPS.pair_loss_backward(given["grad_loss"], *inputs[:6], given["saved"], *options)
