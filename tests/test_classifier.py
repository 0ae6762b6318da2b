"""Class-level circle loss: the paper's formula on the cosines with the weights of the classes."""

import copy
import json
import math
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from accuracy import assert_as_accurate

from dml_cuda import CircleClassifierLoss, CircleLoss, MultiSimilarityMiner


def paper(embeddings, weight, labels, m, gamma, detach):
    """Equations 6 to 8 of the paper, row by row, float64: one positive s_p and all other classes s_n."""
    unit = [torch.nn.functional.normalize(x, dim=1) for x in (embeddings, weight.T)]
    s = unit[0] @ unit[1].T
    rows = []
    for i, label in enumerate(labels.tolist()):
        others = torch.arange(s.shape[1]) != label
        s_p, s_n = s[i, label], s[i, others]
        alpha_p, alpha_n = torch.relu(1 + m - s_p), torch.relu(s_n + m)
        if detach:
            alpha_p, alpha_n = alpha_p.detach(), alpha_n.detach()
        # log(1 + exp(z_p) * sum exp(z_n)), its exponents drawn together
        exponents = gamma * alpha_n * (s_n - m) - gamma * alpha_p * (s_p - (1 - m))
        rows.append(torch.logaddexp(torch.logsumexp(exponents, 0), exponents.new_zeros(())))
    return torch.stack(rows)


def evaluate(head, embeddings, labels, dtype):
    head = copy.deepcopy(head).to(dtype)
    leaf = embeddings.to(dtype).requires_grad_()
    value = head(leaf, labels)
    gradients = torch.autograd.grad(value, [leaf, head.W], torch.ones_like(value))
    return [value.detach(), *gradients]


def check_against_the_paper(head, embeddings, labels, *arguments):
    leaves = embeddings.double().requires_grad_(), head.W.detach().double().requires_grad_()
    rows = paper(*leaves, labels, *arguments)
    truth = [rows.detach().mean(), *torch.autograd.grad(rows.mean(), leaves)]
    in_double = evaluate(head, embeddings, labels, torch.float64)
    for found, expected in zip(in_double, truth, strict=True):
        close = 1e-12 * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=close)
    head.backend = "reference"
    plain = evaluate(head, embeddings, labels, torch.float32)
    head.backend = "fused"
    fused = evaluate(head, embeddings, labels, torch.float32)
    for what, f, p, t in zip(("loss", "gradient", "gradient to W"), fused, plain, truth, strict=True):
        assert_as_accurate(what, f, p, t)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize(("m", "gamma"), [(0.25, 256.0), (0.4, 80.0)])
@pytest.mark.parametrize(("n", "classes", "dim"), [(1, 2, 3), (40, 10, 16), (33, 257, 31), (5, 1000, 8)])
def test_the_papers_formula(detach, m, gamma, n, classes, dim):
    head = CircleClassifierLoss(classes, dim, m, gamma, detach_weights=detach)
    labels = torch.randint(0, classes, (n,))
    embeddings = head.W.detach().T[labels] + torch.randn(n, dim)  # some rows easy, some hard
    check_against_the_paper(head, embeddings, labels, m, gamma, detach)


def test_the_papers_formula_at_100_000_classes():
    head = CircleClassifierLoss(100_000, 24)
    labels = torch.tensor([0, 99_999, 5, 5, 65_536, 7, 31_000, 99_998])
    embeddings = head.W.detach().T[labels] + torch.randn(8, 24)
    check_against_the_paper(head, embeddings, labels, 0.25, 256.0, True)


def test_weight():
    head = CircleClassifierLoss(num_classes=10, embedding_size=4)
    assert head.W.shape == (4, 10)
    assert list(head.state_dict()) == ["W"]
    assert [name for name, _ in head.named_parameters()] == ["W"]
    assert repr(head).startswith("CircleClassifierLoss(\n  num_classes=10, embedding_size=4\n")
    assert CircleClassifierLoss(1000, 100).W.std().item() == pytest.approx(1, rel=0.02)


def test_logits():
    head = CircleClassifierLoss(10, 4, gamma=64.0)
    embeddings = torch.randn(7, 4)
    logits = head.get_logits(embeddings)
    assert logits.shape == (7, 10)
    for i in range(7):
        for c in range(10):
            x, w = embeddings[i].double(), head.W[:, c].detach().double()
            cosine = (x @ w / (x.norm() * w.norm())).item()
            assert logits[i, c].item() == pytest.approx(64 * cosine, abs=1e-4)
    assert torch.equal(head.get_logits(3 * head.W.detach().T).argmax(1), torch.arange(10))


def test_a_row_to_be_ignored():
    """A label that is no class gives no loss and no gradient."""
    head = CircleClassifierLoss(10, 4, reduction="none")
    embeddings, labels = torch.randn(6, 4, requires_grad=True), torch.tensor([0, -1, 3, 10, -100, 9])
    losses = head(embeddings, labels)
    losses.sum().backward()
    ignored = torch.tensor([False, True, False, True, True, False])
    assert (losses[ignored] == 0).all()
    assert (embeddings.grad[ignored] == 0).all()
    assert (losses[~ignored] > 0).all()


def test_options():
    embeddings, labels = torch.randn(20, 4), torch.randint(0, 10, (20,))
    base = CircleClassifierLoss(10, 4)
    named = CircleClassifierLoss(10, 4, margin=0.4, gamma=80)
    for head in (base, named, CircleClassifierLoss(10, 4, m=0.4, gamma=80, reduction="sum")):
        head.load_state_dict(base.state_dict())
    plain = CircleClassifierLoss(10, 4, 0.4, 80.0, backend="reference")
    plain.load_state_dict(base.state_dict())
    torch.testing.assert_close(named(embeddings, labels), plain(embeddings, labels))
    assert base(embeddings, labels) != named(embeddings, labels)
    with pytest.raises(ValueError, match=r"^margin: .*m=0\.3 and margin=0\.4"):
        CircleClassifierLoss(10, 4, m=0.3, margin=0.4)
    for arguments, error in (((0, 4), ValueError), ((10, 4.0), TypeError), ((10, 4, "m"), TypeError)):
        with pytest.raises(error, match=r"^(num_classes|embedding_size|m): expected"):
            CircleClassifierLoss(*arguments)
    with pytest.raises(ValueError, match=r"^labels: expected 20"):
        base(embeddings, labels[:3])


def test_options_are_attributes():
    embeddings, labels = torch.randn(20, 4), torch.randint(0, 10, (20,))
    head = CircleClassifierLoss(10, 4)
    changes = {"m": 0.4, "gamma": 80.0, "detach_weights": False, "reduction": "sum", "backend": "reference"}
    for name, value in changes.items():
        assert getattr(head, name) != value
        setattr(head, name, value)
        assert getattr(head, name) == value
    assert head.margin == 0.4
    made = CircleClassifierLoss(10, 4, **changes)
    made.load_state_dict(head.state_dict())
    assert torch.equal(head(embeddings, labels), made(embeddings, labels))
    for name, wrong in (("gamma", 0), ("m", "x"), ("margin", "x"), ("reduction", "most"), ("backend", None)):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
            setattr(head, name, wrong)


def test_sizes_of_any_integer_type():
    head = CircleClassifierLoss(np.int64(10), np.int32(4))
    assert head.W.shape == (4, 10)
    for sizes in ((True, 4), (np.float64(10), 4), (10, np.int64(0))):
        with pytest.raises((TypeError, ValueError), match=r"^(num_classes|embedding_size): expected"):
            CircleClassifierLoss(*sizes)


def test_errors_name_what_was_passed():
    head, labels = CircleClassifierLoss(10, 4), torch.zeros(6, dtype=torch.long)
    for embeddings, says in (
        (torch.randn(6, 5), "embeddings: expected embedding_size=4 columns, got 5"),
        (torch.randn(6, 4).double(), "embeddings: expected torch.float32 as W has, got torch.float64"),
        (torch.randn(6, 4).to("meta"), "embeddings: expected on cpu as W is, got on meta"),
        (torch.randn(4), "embeddings: expected shape [rows, D], got [4]"),
        ([[1.0] * 4] * 6, "embeddings: expected a floating-point tensor of shape [rows, D], got list"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{re.escape(says)}"):
            head(embeddings, labels)


def test_ignored_rows_in_each_reduction():
    """As the docstring says: they count in "mean" and "mean_valid", not in "mean_nonzero"."""
    head = CircleClassifierLoss(10, 4)
    embeddings, labels = torch.randn(8, 4), torch.tensor([1, 2, 3, -1, -1, 12, 4, 5])
    total = CircleClassifierLoss(10, 4, reduction="sum")
    total.load_state_dict(head.state_dict())
    for reduction, rows in (("mean", 8), ("mean_valid", 8), ("mean_nonzero", 5)):
        head.reduction = reduction
        torch.testing.assert_close(head(embeddings, labels), total(embeddings, labels) / rows)


@pytest.mark.parametrize("reduction", ["mean", "mean_nonzero", "sum", "none"])
def test_indices_weigh_the_rows(reduction):
    """As pytorch-metric-learning's classification losses have it: by how often a row is listed."""
    lmu = pytest.importorskip("pytorch_metric_learning.utils.loss_and_miner_utils")
    head = CircleClassifierLoss(10, 4, gamma=8, reduction=reduction)
    rows = CircleClassifierLoss(10, 4, gamma=8, reduction="none")
    rows.load_state_dict(head.state_dict())
    embeddings, labels = torch.randn(20, 4, requires_grad=True), torch.arange(20) // 2
    empty = torch.tensor([])
    triplets = tuple(torch.randint(0, 18, (30,)) for _ in range(3))
    for given in (MultiSimilarityMiner(0.1)(embeddings, labels), triplets, (empty,) * 4):
        value = head(embeddings, labels, given)
        lists = tuple(index.long() for index in given)
        losses = rows(embeddings, labels) * lmu.convert_to_weights(lists, labels, torch.float32)
        expected = {
            "mean": losses.mean(),
            "mean_nonzero": losses.sum() / (losses != 0).sum(),
            "sum": losses.sum(),
            "none": losses,
        }[reduction]
        torch.testing.assert_close(value, expected)
        assert value.requires_grad


def test_in_multiple_losses():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    head, pair_loss = CircleClassifierLoss(10, 4), CircleLoss()
    embeddings, labels = torch.randn(20, 4), torch.arange(20) // 2
    both = losses.MultipleLosses([head, pair_loss])
    torch.testing.assert_close(
        both(embeddings, labels), head(embeddings, labels) + pair_loss(embeddings, labels)
    )
    pairs = MultiSimilarityMiner(0.1)(embeddings, labels)
    expected = head(embeddings, labels, pairs) + pair_loss(embeddings, labels, pairs)
    torch.testing.assert_close(both(embeddings, labels, pairs), expected)


def test_schedule_compiles():
    head, (embeddings, labels) = CircleClassifierLoss(10, 4), (torch.randn(20, 4), torch.arange(20) // 2)
    compiled = torch.compile(head, fullgraph=True, dynamic=True, backend="aot_eager")
    for k in range(10):
        head.gamma, head.m = 64.0 + k, 0.2 + k / 40
        torch.testing.assert_close(compiled(embeddings, labels), head(embeddings, labels))


def test_copies():
    head = CircleClassifierLoss(10, 4)
    embeddings, labels = torch.randn(20, 4), torch.randint(0, 10, (20,))
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(other(embeddings, labels), head(embeddings, labels))
    other.load_state_dict(CircleClassifierLoss(10, 4).state_dict())
    assert not torch.equal(other(embeddings, labels), head(embeddings, labels))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """A layer's short embeddings meet weights in float32; the loss is computed in float32."""
    head = CircleClassifierLoss(10, 4)
    embeddings, labels = torch.randn(20, 4).to(dtype).requires_grad_(), torch.randint(0, 10, (20,))
    with torch.autocast("cpu", torch.bfloat16):
        value = head(embeddings, labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, head(embeddings.float(), labels))
    value.backward()
    assert embeddings.grad.dtype == dtype
    assert head.W.grad.dtype == torch.float32
    with pytest.raises(TypeError, match=r"^embeddings: expected torch\.float32 as W has, got torch\.\w+"):
        head(embeddings, labels)


def test_compiled():
    head = CircleClassifierLoss(10, 4)
    embeddings, labels = torch.randn(20, 4), torch.randint(0, 10, (20,))
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    results = []
    for run in (head, compiled):
        head.zero_grad()
        value = run(embeddings, labels)
        value.backward()
        results.append((value.detach(), head.W.grad))
    torch.testing.assert_close(results[1], results[0])


def test_learns():
    labels = torch.arange(60) % 6
    points = torch.randn(6, 8)[labels] + 0.5 * torch.randn(60, 8)
    head = CircleClassifierLoss(6, 8)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(80):
        optimizer.zero_grad()
        head(points, labels).backward()
        optimizer.step()
    assert (head.get_logits(points).argmax(1) == labels).float().mean() > 0.95
    assert math.isfinite(head(points, labels).item())


# Peak resident memory is a number of the whole process: this one gets its own.
MEASURE = """
import json, resource
import torch
from dml_cuda import CircleClassifierLoss

def measure(rows, classes):
    head = CircleClassifierLoss(classes, 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    leaf = torch.randn(rows, 8, requires_grad=True)
    head(leaf, torch.randint(0, classes, (rows,))).backward()
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return added, head.W.grad.abs().max().item()

measure(64, 256)  # the libraries' own buffers and threads
added, gradient = measure(1500, 100_000)
print(json.dumps({"added": added, "gradient": gradient}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts other units elsewhere")
def test_the_logits_are_never_stored():
    """1500 x 100,000 of them would take 572 MiB."""
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    measured = json.loads(run.stdout)
    assert measured["gradient"] > 0
    assert measured["added"] < 128 * 2**20, measured
