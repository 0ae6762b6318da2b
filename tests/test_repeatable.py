"""The same bits every time for one number of threads: no result depends on which thread was faster."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accuracy import FUNCTIONS, evaluate
from data import make_batch, make_labels

from dml_cuda import functional

EVERY = pytest.mark.parametrize("function", [getattr(functional, name) for name in FUNCTIONS.values()])


def results(function, epsilon):
    """A square batch of many tiles, and a rectangular one."""
    generator = torch.random.get_rng_state()
    torch.manual_seed(1)
    embeddings, labels = make_batch(1300, 24)
    ref_emb, ref_labels = torch.randn(700, 24), make_labels(700)
    torch.random.set_rng_state(generator)
    square = evaluate(function, embeddings, labels, epsilon=epsilon, reduction="none")
    rectangle = {"ref_emb": ref_emb, "ref_labels": ref_labels}
    return [*square[:2], *evaluate(function, embeddings, labels, epsilon=epsilon, **rectangle)]


@EVERY
@pytest.mark.parametrize("epsilon", [None, 0.1])
def test_bitwise(function, epsilon, instruction_set):
    first = None
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        once = results(function, epsilon)
        for again in (results(function, epsilon), results(function, epsilon)):
            assert all(torch.equal(a, o) for a, o in zip(again, once, strict=True)), f"{threads} threads"
        first = first or once
        for value, before in zip(once, first, strict=True):
            close = 1e-5 * before.abs().max().item()
            torch.testing.assert_close(value, before, rtol=0, atol=close)


@EVERY
def test_saved_or_recomputed(function):
    """Backward sees the same similarities whether they were kept from forward or are computed again."""
    embeddings, labels = make_batch(700, 33)
    params = [2.0, 50.0, 0.5] if function is functional.multi_similarity_loss else [0.4, 80.0, 1.0]
    name = "multi_similarity" if function is functional.multi_similarity_loss else "circle"
    gradients = []
    for save in (True, False):
        arguments = (embeddings, labels, None, None, None, None, name, params, 0.1, True, "mean", save)
        loss, *saved = torch.ops.dml_cuda.pair_loss(*arguments)
        backward = torch.ops.dml_cuda.pair_loss_backward
        gradients.append(
            backward(torch.ones_like(loss), *arguments[:6], *saved, name, params, True, "mean", True, False)[
                0
            ]
        )
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


@EVERY
def test_other_threads_in_backward(function):
    """What forward saved does not depend on the number of threads: backward may run with another."""
    embeddings, labels = make_batch(1300, 24)
    gradients = []
    for forward, backward in ((1, 1), (1, 3), (3, 1), (2, 1)):
        torch.set_num_threads(forward)
        leaf = embeddings.clone().requires_grad_()
        value = function(leaf, labels, epsilon=0.1)
        torch.set_num_threads(backward)
        gradients.append(torch.autograd.grad(value, leaf)[0])
    for gradient in gradients[1:]:
        close = 1e-5 * gradients[0].abs().max().item()
        torch.testing.assert_close(gradient, gradients[0], rtol=0, atol=close)


@EVERY
def test_called_from_several_threads(function):
    """Losses computed side by side, as data-parallel code on one machine does, do not disturb each other."""
    embeddings, labels = make_batch(400, 16)

    def gradient(_):
        return evaluate(function, embeddings, labels, epsilon=0.1)[1]

    alone = gradient(0)
    with ThreadPoolExecutor(4) as pool:
        for together in pool.map(gradient, range(12)):
            assert torch.equal(together, alone)
