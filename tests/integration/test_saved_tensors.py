"""What autograd keeps of a loss: unpacked once, by any hook, and by compiled autograd."""

import pytest
import torch
from cases.heads import HEADS
from cases.losses import LOSSES
from torch.utils.checkpoint import checkpoint

import dml_cuda

PAIR_LOSSES = {loss.name: loss.module for loss in LOSSES.values()}
TRIPLET_LOSSES = {
    "TripletMarginLoss": dml_cuda.TripletMarginLoss,
    "TripletMarginLoss, all listed": lambda: _Listed(dml_cuda.TripletMarginLoss()),
    "MarginLoss": lambda: dml_cuda.MarginLoss(learn_beta=True),
}
HEAD_LOSSES = {name: lambda head=head: head.make(4, 6) for name, head in HEADS.items()}
EVERY = pytest.mark.parametrize(
    "make",
    {**PAIR_LOSSES, **TRIPLET_LOSSES, **HEAD_LOSSES}.values(),
    ids={**PAIR_LOSSES, **TRIPLET_LOSSES, **HEAD_LOSSES},
)


class _Listed(torch.nn.Module):
    """A loss of all its triplets as lists."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, x, labels):
        return self.loss(x, labels, tuple(dml_cuda.TripletMarginMiner(9.0)(x, labels)))


def batch():
    random = torch.Generator().manual_seed(1)
    return torch.randn(16, 6, generator=random), torch.arange(16) % 4


def network():
    torch.manual_seed(0)
    return torch.nn.Linear(6, 6)


def gradients(loss_fn, run):
    """The gradients of a network and of the loss's parameters."""
    model = network()
    x, labels = batch()
    parameters = [*model.parameters(), *loss_fn.parameters()]
    run(lambda points: loss_fn(model(points), labels), x)
    return [p.grad for p in parameters]


def plain(forward, x):
    forward(x).backward()


def same(make, run):
    results = []
    for how in (plain, run):
        torch.manual_seed(0)
        results.append(gradients(make(), how))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one)


@EVERY
def test_checkpoint(make):
    same(make, lambda forward, x: checkpoint(forward, x, use_reentrant=False).backward())


@EVERY
def test_hooks_unpack_each_tensor_once(make):
    def run(forward, x):
        unpacked = []

        def unpack(packed):
            key, tensor = packed
            unpacked.append(key)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(lambda x: (object(), x.clone()), unpack):
            loss = forward(x)
        loss.backward()
        assert unpacked
        assert len(unpacked) == len(set(unpacked))

    same(make, run)


@EVERY
def test_offloading(make):
    def run(forward, x):
        with torch.autograd.graph.save_on_cpu():
            loss = forward(x)
        loss.backward()

    same(make, run)


@pytest.mark.long
@EVERY
@pytest.mark.slow(60)
def test_compiled_autograd(make):
    def run(forward, x):
        loss = forward(x)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
            loss.backward()

    same(make, run)


def test_compiled_autograd_again():
    """The graph of other options is another graph; that of the same is used again."""
    x, labels = batch()

    def gradient(compiled, **options):
        leaf = x.clone().requires_grad_()
        loss = dml_cuda.MultiSimilarityLoss(**options)(leaf, labels)
        if not compiled:
            loss.backward()
        else:
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
                loss.backward()
        return leaf.grad

    for options in ({}, {"alpha": 3.0}, {}, {"epsilon": 0.1}, {"reduction": "sum"}, {"similarity": "dot"}):
        torch.testing.assert_close(gradient(True, **options), gradient(False, **options))


def test_compiled_autograd_with_references():
    x, labels = batch()
    refs = torch.randn(9, 6)
    grads = []
    for compiled in (False, True):
        leaves = [x.clone().requires_grad_(), refs.clone().requires_grad_()]
        loss = dml_cuda.CircleLoss()(leaves[0], labels, None, leaves[1], torch.arange(9) % 4)
        if compiled:
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
                loss.backward()
        else:
            loss.backward()
        grads.append([leaf.grad for leaf in leaves])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("make", PAIR_LOSSES.values(), ids=PAIR_LOSSES)
def test_torch_func_of_the_op(make):
    """As of the op itself, without the module around it."""
    x, labels = batch()
    call = make().call

    def loss(points):
        return torch.ops.dml_cuda.pair_loss(
            points, labels, *[None] * 5, *call.op_options._replace(save_for_backward=True)
        )[0]

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
