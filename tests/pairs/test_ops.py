"""What PyTorch asks of an op: opcheck, gradcheck, torch.compile, and the rules of autograd."""

import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config
from cases.accuracy import evaluate
from cases.data import make_batch, make_labels
from cases.losses import EVERY_LOSS, LOSSES, REDUCTIONS, SIMILARITIES, by_name
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from dml_cuda import _C, functional
from dml_cuda._ops.arguments import OpBatch, OpOptions

pytestmark = pytest.mark.slow(50)

OPS = torch.ops.dml_cuda
EVERY = pytest.mark.parametrize("function", [loss.function for loss in LOSSES.values()], ids=LOSSES)


def forward_arguments(
    loss,
    n,
    *,
    m=None,
    self_index=None,
    num_valid_refs=None,
    dtype=torch.float32,
    epsilon=0.1,
    similarity="cosine",
    reduction="mean",
    return_sums=False,
    save=True,
):
    embeddings, labels = make_batch(n, 6, dtype=dtype)
    ref_emb = ref_labels = None
    if m is not None:
        ref_emb, ref_labels = torch.randn(m, 6).to(dtype).requires_grad_(), make_labels(m)
    batch = OpBatch(embeddings.requires_grad_(save), labels, ref_emb, ref_labels, self_index, num_valid_refs)
    options = OpOptions(loss, LOSSES[loss].params(similarity), epsilon, similarity, reduction)
    return *batch, *options._replace(return_sums=return_sums, save_for_backward=save)


def test_arguments_are_those_of_the_schema():
    """The same fields in the same order in C++ and in Python."""
    arguments = [argument.name for argument in OPS.pair_loss.default._schema.arguments]
    assert arguments == [*OpBatch._fields, *OpOptions._fields]
    for name in ("pair_loss_backward", "pair_block", "pair_block_backward"):
        schema = getattr(OPS, name).default._schema.arguments
        assert [argument.name for argument in schema[: len(arguments)]] == arguments
    for name in ("pair_block_turn", "pair_block_rows"):
        schema = getattr(OPS, name).default._schema.arguments
        assert [argument.name for argument in schema[: len(OpOptions._fields)]] == [*OpOptions._fields]


FORWARD_CASES = {
    "square": {"loss": "multi_similarity", "n": 140},
    "rectangular": {"loss": "circle", "n": 10, "m": 130, "reduction": "none", "epsilon": None},
    "own among the references": {"loss": "circle", "n": 4, "m": 9, "self_index": torch.tensor([0, -1, 8, 3])},
    "some of the references": {"loss": "circle", "n": 4, "m": 300, "num_valid_refs": torch.tensor(150)},
    "half": {"loss": "multi_similarity", "n": 9, "dtype": torch.float16, "reduction": "mean_nonzero"},
    "double, nothing saved": {"loss": "circle", "n": 130, "dtype": torch.float64, "save": False},
    "empty": {"loss": "multi_similarity", "n": 0, "reduction": "none"},
    "parts": {"loss": "contrastive", "n": 20, "similarity": "euclidean", "return_sums": True},
    **{
        f"{name}, distances": {"loss": name, "n": 20, "m": 30, "similarity": "euclidean_raw"}
        for name in LOSSES
    },
}


@pytest.mark.check
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
        ("parts", (True, False)),
        ("nt_xent, distances", (True, True)),
    ],
)
def test_opcheck_backward(name, need):
    inputs = forward_arguments(**FORWARD_CASES[name])
    with torch.no_grad():
        loss, saved = OPS.pair_loss(*inputs)
    batch = [None if x is None else x.detach() for x in inputs[:7]]
    arguments = *batch, *inputs[7:], torch.ones_like(loss), saved, *need, False
    # It has no derivative of its own, so what is left to check is its schema and its fake.
    names = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OPS.pair_loss_backward.default, arguments, test_utils=names)


class Recorder(TorchDispatchMode):
    """The options of each op on pairs that runs."""

    def __init__(self):
        super().__init__()
        self.options = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("dml_cuda::")
        if name in ("pair_loss", "pair_loss_backward"):
            self.options[name] = OpOptions(*args[7:19])
        return function(*args, **(kwargs or {}))


def test_backward_gets_the_options_of_forward():
    embeddings, labels = make_batch(20, 6, dtype=torch.float64)
    params = LOSSES["nt_xent"].params()
    options = OpOptions("nt_xent", params, 0.2, "dot", "sum", False, True, False, "tf32", True)
    options = options._replace(dynamic_params=torch.tensor([*params, 0.2], dtype=torch.float64))
    with Recorder() as seen:
        leaf = embeddings.clone().requires_grad_()
        OPS.pair_loss(leaf, labels, None, None, None, None, None, *options)[0].sum().backward()
    for found in seen.options.values():
        assert torch.equal(found.dynamic_params, options.dynamic_params)
        assert found._replace(dynamic_params=None) == options._replace(dynamic_params=None)
    assert len(seen.options) == 2


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_a_compiled_graph_keeps_its_precision(precision, monkeypatch):
    """It is a constant of both graphs: a later change of torch's setting cannot mix them up."""
    torch._dynamo.reset()
    monkeypatch.setattr("dml_cuda._ops.evaluate.precision_for", lambda _: precision)
    seen = {}

    def record(module, _):
        for node in module.graph.nodes:
            if "dml_cuda" in str(node.target):
                seen[node.target.name()] = OpOptions(*node.args[7:19]).precision
        return make_boxed_func(module.forward)

    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    embeddings, labels = make_batch(20, 6)
    torch.compile(functional.circle_loss, fullgraph=True, backend=backend)(
        embeddings.requires_grad_(), labels
    ).backward()
    assert seen == {"dml_cuda::pair_loss": precision, "dml_cuda::pair_loss_backward": precision}


def test_dynamic_params_replace_the_numbers():
    embeddings, labels = make_batch(20, 6)
    batch = embeddings, labels, None, None, None, None, None
    for epsilon in (None, 0.1):
        options = OpOptions("circle", [0.25, 64.0, 1.0], epsilon)
        expected = OPS.pair_loss(*batch, *options)[0]
        assert torch.equal(OPS.pair_loss(*batch, *options.with_dynamic_params())[0], expected)


@EVERY_LOSS
@pytest.mark.parametrize("epsilon", [None, 0.1])
def test_opcheck_of_blocks(loss, epsilon):
    """A block of columns after the other, as they go around a ring of processes."""
    embeddings, labels = make_batch(20, 6)
    options = OpOptions(loss.name, loss.params(), epsilon, mine_self_pair=False)
    blocks = [(embeddings, labels, torch.arange(20)), (torch.randn(30, 6), make_labels(30), None)]
    every = torch.cat([columns for _, columns, _ in blocks])
    positives = (labels[:, None] == every).sum(1)
    pairs = torch.stack([positives - 1, len(every) - positives])
    names = ("test_schema", "test_autograd_registration", "test_faketensor")

    def run(name, *arguments):
        op = getattr(OPS, name).default
        torch.library.opcheck(op, arguments, test_utils=names)
        return op(*arguments)

    state = run("pair_block_turn", *options, None, pairs, "start", False)
    for stage in _C.ring_stages("cpu", loss.name, epsilon is not None):
        kept = []
        for block in blocks:
            state, found = run("pair_block", embeddings, labels, *block, None, None, *options, state, stage)
            kept.append(found)
        state = run("pair_block_turn", *options, state, pairs, stage, False)
    losses, weights = run("pair_block_rows", *options, state, pairs)
    refs = torch.cat([points for points, *_ in blocks])
    whole_batch = embeddings, labels, refs, every, torch.arange(20), None, None
    whole, _ = OPS.pair_loss(*whole_batch, *options._replace(return_sums=True))
    torch.testing.assert_close(losses.sum(1), whole)
    grad_parts = torch.ones(2, 20)
    for block, found in zip(blocks, kept, strict=True):
        batch = embeddings, labels, *block, None, None
        run("pair_block_backward", *batch, *options, grad_parts, weights, found, True, False, False, False)


def test_block_ops_called_directly():
    pairs = torch.zeros(2, 4, dtype=torch.long)
    options = OpOptions("circle", LOSSES["circle"].params(), mine_self_pair=False)
    with pytest.raises(ValueError, match=r"state.*start"):
        OPS.pair_block_turn(*options, None, pairs, "positives", False)
    with pytest.raises(ValueError, match=r"stage.*first"):
        OPS.pair_block_turn(*options, None, pairs, "first", False)
    state = OPS.pair_block_turn(*options, None, pairs, "start", False)
    with pytest.raises(ValueError, match=r"epsilon.*hardest"):
        OPS.pair_block_turn(*options, state, pairs, "hardest", False)
    with pytest.raises(ValueError, match=r"pairs.*\[2, N\]"):
        OPS.pair_block_turn(*options, None, pairs[:1], "start", False)
    with pytest.raises(ValueError, match=r"state.*\[16, 4\]"):
        OPS.pair_block_rows(*options, state[:3], pairs)
    points, labels = make_batch(4, 3)
    alone, block = (points, labels, *[None] * 5), (points, labels, points, labels, None, None, None)
    for says, batch, given in (
        ("ref_emb: expected a block", alone, options),
        ("num_valid_refs: expected none", (*block[:5], torch.tensor(2), None), options),
        ("mine_self_pair: expected false", block, options._replace(mine_self_pair=True)),
    ):
        with pytest.raises(ValueError, match=says):
            OPS.pair_block(*batch, *given, state, "both")


@EVERY_LOSS
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_gradients_by_finite_differences(loss, similarity):
    embeddings, labels = make_batch(9, 4, dtype=torch.float64)
    ref_labels = make_labels(11)
    points = [embeddings.requires_grad_(), torch.randn(11, 4, dtype=torch.float64, requires_grad=True)]
    for k, reduction in enumerate(REDUCTIONS):
        options = {"reduction": reduction, "backend": "fused", **by_name(similarity), **loss.smooth}
        options["epsilon"] = 0.3 if k % 2 else None

        def square(x, options=options):
            return loss.function(x, labels, **options)

        def rectangular(x, y, options=options):
            return loss.function(x, labels, ref_emb=y, ref_labels=ref_labels, **options)

        assert torch.autograd.gradcheck(square, points[:1])
        assert torch.autograd.gradcheck(rectangular, points)


@EVERY_LOSS
@pytest.mark.parametrize("reduction", ["mean", "mean_nonzero", "mean_valid"])
def test_sums_and_counts(loss, reduction):
    """With return_sums the loss is its parts and their counts; the gradient flows through the parts."""
    embeddings, labels = make_batch(60, 6, dtype=torch.float64)
    batch = embeddings, labels, None, None, None, None, None
    similarity = loss.similarity
    options = OpOptions(loss.name, loss.params(similarity), 0.1, similarity, reduction, return_sums=True)
    leaf = embeddings.clone().requires_grad_()
    sums, _ = OPS.pair_loss(leaf, *batch[1:], *options._replace(save_for_backward=True))
    parts, counts = sums[:2], sums[2:].detach()
    value = (parts / counts.clamp(min=1)).sum()
    whole = evaluate(loss.function, embeddings, labels, epsilon=0.1, reduction=reduction)
    torch.testing.assert_close(value.detach(), whole[0])
    torch.testing.assert_close(torch.autograd.grad(value, leaf)[0], whole[1])


@pytest.mark.long
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


@EVERY_LOSS
def test_compiled_module(loss):
    torch._dynamo.reset()
    embeddings, labels = make_batch(40, 8)
    for module in (loss.module(), loss.module(epsilon=0.1, **by_name("euclidean_raw"))):
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
    with_tiles, without = (
        OPS.pair_loss(*forward_arguments("multi_similarity", 300, save=save))[1].numel()
        for save in (True, False)
    )
    assert with_tiles > without + 300 * 300 / 2 * 4


@pytest.mark.check
def test_the_list_of_formulas():
    """Kernels, Python and the tests know the same losses, with the same numbers of parameters."""
    assert {name: len(loss.params()) for name, loss in LOSSES.items()}.items() <= _C.formulas.items()


def test_a_formula_that_is_not_in_the_list():
    inputs = list(forward_arguments("circle", 8))
    inputs[7] = "cicle"
    with pytest.raises(
        ValueError, match=r"formula: expected one of multi_similarity, circle, .*; got .cicle."
    ):
        OPS.pair_loss(*inputs)
    inputs[7:9] = "circle", [1.0]
    with pytest.raises(ValueError, match="params: expected 3 numbers for circle, got 1"):
        OPS.pair_loss(*inputs)


@pytest.mark.parametrize("name", LOSSES)
def test_sums_divided_afterwards(name):
    """Sums and counts, divided by the caller: the same loss and the same gradient."""
    inputs = forward_arguments(name, 40, dtype=torch.float64)
    value, _ = OPS.pair_loss(*inputs)
    options = OpOptions(*inputs[7:])._replace(return_sums=True)
    parts, _ = OPS.pair_loss(*inputs[:7], *options)
    assert parts.shape == (4,)
    total = parts[0] / parts[2].detach().clamp(min=1) + parts[1] / parts[3].detach().clamp(min=1)
    torch.testing.assert_close(total, value)
    expected, found = (torch.autograd.grad(x, inputs[0])[0] for x in (value, total))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mine_self_pair", [True, False])
def test_a_row_among_the_references(mine_self_pair):
    """Without mining with it, a row's own copy is no pair at all: as if the references were the rows."""
    embeddings, labels = make_batch(30, 6, dtype=torch.float64)
    params = LOSSES["multi_similarity"].params()
    options = OpOptions("multi_similarity", params, 0.1, "cosine", "none")
    square, _ = OPS.pair_loss(embeddings, labels, None, None, None, None, None, *options)
    batch = embeddings, labels, embeddings, labels, torch.arange(30), None, None
    value, _ = OPS.pair_loss(*batch, *options._replace(mine_self_pair=mine_self_pair))
    if mine_self_pair:
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
    with pytest.raises(ValueError, match=message):
        OPS.pair_loss_backward(*inputs, given["grad_loss"], given["saved"], True, False, False)
