"""The same bits every time, on any number of threads: no result depends on who was faster."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases.accuracy import evaluate
from cases.data import make_batch, make_labels
from cases.losses import EVERY_LOSS

from dml_cuda._ops.arguments import OpOptions

THREADS = (1, 2, 3, 7, 16)  # more than there are cores, too


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


COUNT_THREADS = """
import os, sys, torch, dml_cuda
torch.set_num_threads(1)
embeddings, labels = torch.randn(1300, 24), torch.arange(1300) // 4
counts = []
for threads in map(int, sys.argv[1:]):
    torch.set_num_threads(threads)
    dml_cuda.functional.multi_similarity_loss(embeddings, labels)
    counts.append(len(os.listdir("/proc/self/task")))
print(*(count - counts[0] + 1 for count in counts))
"""


def test_the_kernels_use_every_thread():
    """Otherwise the tests below compare one thread with itself. In a fresh process the loss starts them."""
    command = [sys.executable, "-c", COUNT_THREADS, *map(str, THREADS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert tuple(map(int, done.stdout.split())) == THREADS


def results(function, **options):
    """Square batches of few and of many tiles, one that ends in a sliver, and a rectangular one."""
    generator = torch.random.get_rng_state()
    torch.manual_seed(1)
    found = []
    for rows, dim in ((40, 200), (300, 24), (1300, 150)):
        found += evaluate(function, *make_batch(rows, dim), reduction="none", **options)[:2]
    rectangle = {"ref_emb": torch.randn(700, 24), "ref_labels": make_labels(700)}
    found += evaluate(function, *make_batch(1300, 24), **rectangle, **options)
    torch.random.set_rng_state(generator)
    return found


@EVERY_LOSS
@pytest.mark.parametrize("options", [{}, {"epsilon": 0.1}, {"similarity": "euclidean"}], ids=str)
def test_bitwise_on_any_number_of_threads(loss, options):
    torch.set_num_threads(1)
    alone = results(loss.function, **options)
    for threads in THREADS:
        torch.set_num_threads(threads)
        for k, (value, expected) in enumerate(zip(results(loss.function, **options), alone, strict=True)):
            assert torch.equal(value, expected), f"{threads} threads, result {k}"


@EVERY_LOSS
def test_every_instruction_set(loss, instruction_set):
    torch.set_num_threads(1)
    alone = results(loss.function, epsilon=0.1)
    torch.set_num_threads(3)
    for value, expected in zip(results(loss.function, epsilon=0.1), alone, strict=True):
        assert torch.equal(value, expected)


@EVERY_LOSS
def test_saved_or_recomputed(loss):
    """Backward sees the same similarities whether they were kept from forward or are computed again."""
    embeddings, labels = make_batch(700, 33)
    batch = (embeddings, labels, None, None, None, None, None)
    gradients = []
    for save in (True, False):
        arguments = *batch, *OpOptions(loss.name, loss.params(), 0.1, save_for_backward=save)
        value, saved = torch.ops.dml_cuda.pair_loss(*arguments)
        backward = torch.ops.dml_cuda.pair_loss_backward
        gradients.append(backward(*arguments, torch.ones_like(value), saved, True, False, False)[0])
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


@EVERY_LOSS
def test_other_threads_in_backward(loss):
    """What forward saved does not depend on the number of threads: backward may run with another."""
    embeddings, labels = make_batch(1300, 24)
    gradients = []
    for forward, backward in ((1, 1), (1, 3), (3, 1), (2, 16)):
        torch.set_num_threads(forward)
        leaf = embeddings.clone().requires_grad_()
        value = loss.function(leaf, labels, epsilon=0.1)
        torch.set_num_threads(backward)
        gradients.append(torch.autograd.grad(value, leaf)[0])
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients[1:])


@EVERY_LOSS
def test_called_from_several_threads(loss):
    """Losses computed side by side, as data-parallel code on one machine does, do not disturb each other."""
    embeddings, labels = make_batch(400, 16)

    def gradient(_):
        return evaluate(loss.function, embeddings, labels, epsilon=0.1)[1]

    alone = gradient(0)
    with ThreadPoolExecutor(4) as pool:
        for together in pool.map(gradient, range(12)):
            assert torch.equal(together, alone)
