"""Class-level losses: PML's results, the papers' formulas in float64, labels, options and memory."""

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
from cases.accuracy import assert_as_accurate
from cases.heads import EVERY_HEAD, HEADS, evaluate, make_rows, parameter
from cases.losses import REDUCTIONS
from oracle import dense
from oracle.pairs import brute_force

import dml_cuda
from dml_cuda import CircleClassifierLoss, CircleLoss, MultiSimilarityMiner
from dml_cuda._ops import centers
from dml_cuda._ops.arguments import OpOptions
from dml_cuda.losses import proxy_anchor

SIZES = [(1, 2, 3), (40, 10, 16), (33, 257, 31), (5, 1000, 8), (300, 130, 65)]
CASES = [
    pytest.param(head, case, id=f"{head.name}-{'-'.join(f'{k}={v}' for k, v in case.items()) or 'defaults'}")
    for head in HEADS.values()
    for case in head.cases
]
WITH_PML = [case for case in CASES if case.values[0].pml]


def pml_twin(module, **options):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    sizes = {"num_classes": module.num_classes, "embedding_size": module.embedding_size}
    return getattr(losses, type(module).__name__)(**sizes, **options)


def in_reverse(module, embeddings, labels):
    """Value and gradients of PML's head, its sums over dimensions taken from the last."""
    module = copy.deepcopy(module)
    weight = next(module.parameters())
    dim = weight.shape.index(embeddings.shape[1])
    weight.data = weight.data.flip(dim)
    value, grad, grad_weight = evaluate(module, embeddings.flip(1), labels)
    return [value, grad.flip(1), grad_weight.flip(dim)]


def listed_rows(n):
    """Triplets and pairs, some rows more often than others."""
    lists = [torch.randint(0, n, (3 * n,)) for _ in range(4)]
    return lists[:3], lists


# ---- results ---------------------------------------------------------------------------------------------


@pytest.mark.check
@pytest.mark.parametrize(("head", "options"), WITH_PML)
@pytest.mark.parametrize(("n", "classes", "dim"), SIZES)
def test_pmls_results(head, options, n, classes, dim):
    """In float64 PML's; in float32 as near to them as PML's own, or our reference, in float32."""
    ours = head.make(classes, dim, **options)
    theirs = pml_twin(ours, **options)
    ours.load_state_dict(theirs.state_dict())
    embeddings, labels = make_rows(ours, n)
    wide = copy.deepcopy(theirs).double()
    truth = evaluate(wide, embeddings.double(), labels)
    truth.append(wide.get_logits(embeddings.double()).detach())
    found = evaluate(copy.deepcopy(ours).double(), embeddings.double(), labels)
    found.append(copy.deepcopy(ours).double().get_logits(embeddings.double()).detach())
    for f, t in zip(found, truth, strict=True):
        # PML's cross entropy is a difference of numbers of the size of the scale.
        torch.testing.assert_close(f, t, rtol=1e-9, atol=1e-13)
    plain = head.make(classes, dim, **options, backend="reference")
    plain.load_state_dict(theirs.state_dict())
    references = [evaluate(module, embeddings, labels) for module in (theirs, plain)]
    if n == 1:  # how near one row is to its class decides how far rounding goes: PML's in another order too
        references.append(in_reverse(theirs, embeddings, labels))
    for i, what in enumerate(("loss", "gradient", "gradient to the weights")):
        least_exact = max(references, key=lambda r, i=i: (r[i].double() - found[i]).abs().max())
        assert_as_accurate(what, evaluate(ours, embeddings, labels)[i], least_exact[i], found[i])


@pytest.mark.parametrize(("head", "options"), WITH_PML)
def test_pmls_weights_of_listed_rows(head, options):
    ours = head.make(12, 8, **options).double()
    theirs = pml_twin(ours, **options).double()
    theirs.load_state_dict(ours.state_dict())
    embeddings, labels = make_rows(ours, 30)
    for indices in listed_rows(30):
        expected = evaluate(theirs, embeddings, labels, tuple(indices))
        for f, e in zip(evaluate(ours, embeddings, labels, indices), expected, strict=True):
            torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-13)
    empty = (torch.zeros(0, dtype=torch.long),) * 3
    torch.testing.assert_close(ours(embeddings, labels, empty), ours(embeddings, labels))


@EVERY_HEAD
def test_checkpoints(head):
    """The state dict is PML's, both ways; the weights are contiguous, for ever, and so is their gradient."""
    ours = head.make(10, 6)
    names = {"SoftTripleLoss": "fc", "ProxyAnchorLoss": "proxies", "ProxyNCALoss": "proxies"}
    name = names.get(head.name, "W")
    assert list(ours.state_dict()) == [name]
    assert [n for n, _ in ours.named_parameters()] == [name]
    if head.pml:
        torch.manual_seed(3)
        theirs = pml_twin(ours)
        torch.manual_seed(3)
        again = head.make(10, 6)
        assert torch.equal(parameter(again), getattr(theirs, name))  # drawn alike
        ours.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
        assert torch.equal(parameter(ours), getattr(theirs, name))
    embeddings, labels = make_rows(ours, 20)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(embeddings, labels), ours(embeddings, labels))
        other(embeddings, labels).backward()
        assert parameter(other).is_contiguous()
        assert parameter(other).grad.is_contiguous()
        torch.optim.Adam(other.parameters()).step()
        assert parameter(other).is_contiguous()
    assert parameter(other.double()).is_contiguous()


def paper(embeddings, weight, labels, m, gamma, detach):
    """Circle loss, equations 6 to 8, row by row, float64: one positive s_p and all other classes s_n."""
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


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize(("n", "classes", "dim"), [*SIZES[:4], (8, 100_000, 24)])
def test_circle_is_the_papers(detach, n, classes, dim):
    module = dml_cuda.CircleClassifierLoss(classes, dim, detach_weights=detach)
    labels = torch.randint(0, classes, (n,))
    embeddings = module.W.detach().T[labels] + torch.randn(n, dim)  # some rows easy, some hard
    leaves = embeddings.double().requires_grad_(), module.W.detach().double().requires_grad_()
    rows = paper(*leaves, labels, 0.25, 256.0, detach)
    truth = [rows.detach().mean(), *torch.autograd.grad(rows.mean(), leaves)]
    wide = evaluate(copy.deepcopy(module).double(), embeddings.double(), labels)
    for found, expected in zip(wide, truth, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * expected.abs().max().item())
    fused = evaluate(module, embeddings, labels)
    module.backend = "reference"
    plain = evaluate(module, embeddings, labels)
    for what, f, p, t in zip(("loss", "gradient", "gradient to W"), fused, plain, truth, strict=True):
        assert_as_accurate(what, f, p, t)


FORMULAS = {
    "margin_softmax": [
        {"scale": 64.0, "margin": 0.35, "cosine": 1.0, "sine": 0.0},
        {"scale": 20.0, "margin": 0.0, "cosine": math.cos(0.5), "sine": math.sin(0.5)},
        {"scale": 20.0, "margin": 0.1, "cosine": math.cos(2.0), "sine": math.sin(2.0)},
    ],
    "proxy_anchor": [{"margin": 0.1, "alpha": 32.0}],
}


@pytest.mark.parametrize("reduction", ["mean", "mean_nonzero", "sum", "none"])
@pytest.mark.parametrize(
    ("formula", "params"),
    [pytest.param(formula, p, id=formula) for formula, cases in FORMULAS.items() for p in cases],
)
def test_formulas(formula, params, reduction, instruction_set):
    """Against the truth on any labels: several positives in a row, none, mined or not, with itself."""
    for n, m, epsilon in ((33, 70, None), (70, 33, 0.1), (40, None, 0.1)):
        x, labels = torch.randn(n, 9).double(), torch.randint(0, 8, (n,))
        y, of_y = (None, None) if m is None else (torch.randn(m, 9).double(), torch.randint(0, 8, (m,)))
        how = {"epsilon": epsilon, "reduction": reduction}
        truth = brute_force(formula, x, labels, ref_emb=y, ref_labels=of_y, **how, **params)
        leaves = [p.requires_grad_() for p in (x, y) if p is not None]
        options = OpOptions(
            formula, list(params.values()), epsilon, "cosine", reduction, save_for_backward=True
        )
        value, _ = torch.ops.dml_cuda.pair_loss(x, labels, y, of_y, None, None, None, *options)
        expected = truth.losses if reduction == "none" else truth.loss
        np.testing.assert_allclose(value.detach().numpy(), expected, rtol=1e-9, atol=1e-12)
        gradients = torch.autograd.grad(value.sum(), leaves)
        for found, of in zip(gradients, (truth.grad_emb, truth.grad_ref), strict=False):
            np.testing.assert_allclose(found.numpy(), of, rtol=1e-8, atol=1e-11)


# ---- sub-centres, and angles that are multiplied -----------------------------------------------------------


@pytest.mark.parametrize("margin", [28.6, 120.0])
@pytest.mark.parametrize(
    ("n", "classes", "dim", "k"), [(7, 5, 4, 1), (33, 40, 9, 3), (20, 300, 8, 10), (6, 1, 4, 2)]
)
def test_sub_centers_in_blocks(monkeypatch, n, classes, dim, k, margin):
    """Blocks of any size give the paper's loss, and the dense reference."""
    module = dml_cuda.SubCenterArcFaceLoss(classes, dim, margin=margin, sub_centers=k)
    embeddings, labels = make_rows(module, n)
    labels[0] = -1
    wide = copy.deepcopy(module).double()
    leaves = embeddings.double().requires_grad_(), wide.W.detach().clone().requires_grad_()
    value = dense.sub_center_arc_face(*leaves, labels, k, margin, 64).mean()
    truth = [value.detach(), *torch.autograd.grad(value, leaves)]
    module.backend = "reference"
    plain = evaluate(module, embeddings, labels)
    module.backend = "fused"
    for block in (1 << 19, n * k * 7, 1):
        monkeypatch.setattr(centers, "_BLOCK", block)
        for f, t in zip(evaluate(wide, embeddings.double(), labels), truth, strict=True):
            torch.testing.assert_close(f, t, rtol=1e-9, atol=1e-12)
        for f, p, t in zip(evaluate(module, embeddings, labels), plain, truth, strict=True):
            assert_as_accurate("sub-centres", f, p, t)


def test_sub_centers_as_an_op():
    embeddings, weights = (torch.randn(n, 4, requires_grad=True) for n in (6, 15))
    arguments = embeddings, weights, torch.arange(6) % 5, None, 3, "sub_centers", [64.0, 0.9, 0.4], 30
    torch.library.opcheck(torch.ops.dml_cuda.center_softmax.default, arguments)


@pytest.mark.parametrize("threshold", [20, 75, 120])
def test_outliers_are_pmls(threshold):
    """By class, then by place; the dominant centres too, but where a class has no row."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    ours = dml_cuda.SubCenterArcFaceLoss(9, 5)
    theirs = losses.SubCenterArcFaceLoss(num_classes=9, embedding_size=5)
    theirs.load_state_dict(ours.state_dict())
    embeddings, labels = make_rows(ours, 80, spread=2.0)
    labels[labels == 4] = 5
    wanted, centers_wanted = theirs.get_outliers(embeddings, labels, threshold)
    outliers, dominant = ours.get_outliers(embeddings, labels, threshold)
    assert outliers.tolist() == wanted.tolist()
    some = torch.arange(9) != 4
    assert torch.equal(dominant[:, some], centers_wanted[:, some])
    assert (dominant[:, 4] == 0).all()
    assert torch.equal(
        ours.get_outliers(embeddings, labels, threshold, return_dominant_centers=False), outliers
    )
    ignored = ours.get_outliers(embeddings, torch.full_like(labels, -1), threshold)[0]
    assert ignored.tolist() == []


@pytest.mark.parametrize("margin", [1, 2, 3, 4, 7])
def test_sphere_face_is_the_papers(margin):
    module = dml_cuda.SphereFaceLoss(30, 6, margin=margin, scale=2).double()
    embeddings, labels = make_rows(module, 60, spread=2.0)
    labels[0] = -1
    leaves = embeddings.clone().requires_grad_(), module.W.detach().clone().requires_grad_()
    value = dense.sphere_face(*leaves, labels, margin, 2).mean()
    truth = [value.detach(), *torch.autograd.grad(value, leaves)]
    for found, expected in zip(evaluate(module, embeddings, labels), truth, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    zero = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    module(zero, torch.tensor([0, 1])).backward()
    assert zero.grad.isfinite().all()
    for wrong, error in ((0, ValueError), (2.5, TypeError), (torch.tensor(2), TypeError)):
        with pytest.raises(error, match="margin: expected"):
            dml_cuda.SphereFaceLoss(3, 2, margin=wrong)


# ---- SoftTriple ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.1, 0.005])
@pytest.mark.parametrize("tau", [0.0, 0.2])
@pytest.mark.parametrize(
    ("n", "classes", "dim", "per_class"), [(7, 5, 4, 1), (33, 40, 9, 3), (20, 300, 8, 10)]
)
def test_soft_triple_in_blocks(monkeypatch, n, classes, dim, per_class, tau, gamma):
    """Blocks of any size give the dense reference."""
    make = {"centers_per_class": per_class, "tau": tau, "gamma": gamma}
    module = dml_cuda.SoftTripleLoss(classes, dim, **make)
    embeddings, labels = make_rows(module, n)
    labels[0] = -1
    wide = copy.deepcopy(module).double()
    wide.backend = "reference"
    truth = evaluate(wide, embeddings.double(), labels)
    module.backend = "reference"
    plain = evaluate(module, embeddings, labels)
    module.backend = wide.backend = "fused"
    for block in (1 << 19, n * per_class * 7, 1):
        monkeypatch.setattr(centers, "_BLOCK", block)
        for f, t in zip(evaluate(wide, embeddings.double(), labels), truth, strict=True):
            torch.testing.assert_close(f, t, rtol=1e-9, atol=1e-12)
        for f, p, t in zip(evaluate(module, embeddings, labels), plain, truth, strict=True):
            assert_as_accurate("SoftTriple", f, p, t)


def test_soft_triple_as_an_op():
    embeddings, weights = (torch.randn(n, 4, requires_grad=True) for n in (6, 15))
    params = torch.tensor([20.0, 0.1, 0.01], dtype=torch.float64, requires_grad=True)
    for learned, numbers in ((None, params.tolist()), (params, [])):
        arguments = embeddings, weights, torch.arange(6) % 5, learned, 3, "soft_triple", numbers, 30
        torch.library.opcheck(torch.ops.dml_cuda.center_softmax.default, arguments)
    torch.library.opcheck(torch.ops.dml_cuda.center_spread.default, (weights, 3))


def test_the_regulariser_is_the_papers():
    module = dml_cuda.SoftTripleLoss(3, 5, centers_per_class=4, tau=0.2)
    embeddings, labels = make_rows(module, 6)
    added = module(embeddings, labels)
    module.tau = 0
    added = added - module(embeddings, labels)
    w = torch.nn.functional.normalize(module.fc.detach().T.double(), dim=1).view(3, 4, 5)
    pairs = [(2 - 2 * w[c, s] @ w[c, t]).sqrt() for c in range(3) for t in range(4) for s in range(t)]
    torch.testing.assert_close(added.double(), 0.2 * sum(pairs) / (3 * 4 * 3), rtol=1e-5, atol=0)


def test_merged_centers():
    module = dml_cuda.SoftTripleLoss(3, 2, centers_per_class=4)
    angles = torch.tensor([[0.0, 1, 2, 3], [0, 0.05, 0.1, 2], [1, 1, 1, 1]])
    rows = torch.stack([angles.cos(), angles.sin()], 2).view(-1, 2) * torch.rand(12, 1).add(0.5)
    module.fc.data.copy_(rows.T)
    assert module.merged_centers(0.06).tolist() == [4, 2, 1]  # 0, 0.05 and 0.1 in a chain
    assert module.merged_centers(0.04).tolist() == [4, 4, 1]
    assert module.merged_centers(1.1).tolist() == [1, 2, 1]
    with pytest.raises(ValueError, match=r"^threshold: expected 0 or more"):
        module.merged_centers(-1)


def test_the_regulariser_merges_centres():
    torch.manual_seed(0)
    module = dml_cuda.SoftTripleLoss(4, 8, centers_per_class=5, tau=1.0)
    embeddings, labels = make_rows(module, 64)
    before = module(embeddings, labels).item()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        module(embeddings, labels).backward()
        optimizer.step()
    assert module(embeddings, labels).item() < before
    assert module.merged_centers(0.3).float().mean() < 2.5


# ---- labels ----------------------------------------------------------------------------------------------


@EVERY_HEAD
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_rows_to_leave_out(head, reduction):
    """A negative label gives no loss and no gradient, and no pushing either."""
    module = head.make(10, 4, reduction=reduction)
    embeddings, labels = make_rows(module, 9)
    labels[[1, 4]], labels[8] = -1, -100
    left = labels >= 0
    loss, grad, grad_weight = evaluate(module, embeddings, labels)
    assert (grad[~left] == 0).all()
    expected, of_rows, of_weight = evaluate(module, embeddings[left], labels[left])
    if reduction == "mean" and head.name != "ProxyAnchorLoss":  # over all rows
        expected, of_rows, of_weight = (6 / 9 * x for x in (expected, of_rows, of_weight))
    if reduction == "none" and head.name != "ProxyAnchorLoss":
        assert (loss[~left] == 0).all()
        loss = loss[left]
    for found, truth in zip((loss, grad[left], grad_weight), (expected, of_rows, of_weight), strict=True):
        torch.testing.assert_close(found, truth)
    weighted = module(embeddings, labels, (torch.arange(9),) * 3)
    torch.testing.assert_close(weighted, module(embeddings, labels))


@EVERY_HEAD
def test_labels_that_are_no_class(head):
    module = head.make(10, 4)
    with pytest.raises(ValueError, match=r"^labels: expected classes below num_classes=10 .* got 10, 77$"):
        module(torch.randn(4, 4), torch.tensor([10, 0, 77, -1]))
    for dtype in (torch.uint8, torch.int32):
        module(torch.randn(4, 4), torch.arange(4, dtype=dtype))


@EVERY_HEAD
@pytest.mark.parametrize("n", [0, 1])
def test_next_to_nothing(head, n):
    for classes in (1, 2):
        module = head.make(classes, 3)
        embeddings, labels = make_rows(module, n)
        loss, grad, grad_weight = evaluate(module, embeddings, labels)
        assert all(torch.isfinite(x).all() for x in (loss, grad, grad_weight))
    assert module.get_logits(embeddings).shape == (n, classes)
    zeros = evaluate(module, torch.zeros(3, 3), torch.tensor([0, 1, 1]))
    assert torch.isfinite(zeros[0])
    assert (zeros[1] == 0).all()


@EVERY_HEAD
def test_not_a_number(head):
    module = head.make(300, 4)
    embeddings, labels = make_rows(module, 20)
    embeddings[7, 2] = math.nan
    loss, grad, _ = evaluate(module, embeddings, labels)
    assert torch.isnan(loss)
    assert torch.isnan(grad[7]).any()
    embeddings[7, 2] = 1
    parameter(module).data[1, 1] = math.inf
    assert torch.isnan(evaluate(module, embeddings, labels)[0])


# ---- options, dtypes, compilers --------------------------------------------------------------------------


@EVERY_HEAD
def test_options(head):
    module = head.make(10, 4)
    embeddings, labels = make_rows(module, 20)
    text = repr(module)
    assert text.startswith(f"{head.name}(num_classes=10, embedding_size=4, ")
    assert "reduction='mean'" in text
    names = module.formula.parameters
    for name in names:
        assert f"{name}=" in text
        value = getattr(module, name)
        with pytest.raises((TypeError, ValueError), match=rf"^{name}: expected"):
            setattr(module, name, math.nan)
        setattr(module, name, value)
    before = module(embeddings, labels)
    module.reduction = "sum"
    assert module(embeddings, labels) > before
    other = copy.deepcopy(module)
    other.backend = "reference"
    torch.testing.assert_close(module(embeddings, labels), other(embeddings, labels))
    for arguments, error in (((0, 4), ValueError), ((10, 4.0), TypeError)):
        with pytest.raises(error, match=r"^(num_classes|embedding_size): expected"):
            head.make(*arguments)
    with pytest.raises(TypeError, match="epsilon"):
        head.make(10, 4, epsilon=0.1)
    with pytest.raises(ValueError, match=r"^labels: expected 20"):
        module(embeddings, labels[:3])
    with pytest.raises(ValueError, match=r"^embeddings: expected embedding_size=4 columns, got 5"):
        module(torch.randn(3, 5), labels[:3])


@EVERY_HEAD
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_types(head, dtype):
    """A layer's short embeddings meet weights in float32 under autocast; all in a short type is as exact."""
    module = head.make(10, 4)
    embeddings, labels = make_rows(module, 20)
    embeddings = embeddings.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        value, grad, grad_weight = evaluate(module, embeddings, labels)
    assert value.dtype == grad_weight.dtype == torch.float32
    assert grad.dtype == dtype
    torch.testing.assert_close(value, module(embeddings.float(), labels))
    short = copy.deepcopy(module).to(dtype)
    value, grad, grad_weight = evaluate(short, embeddings, labels)
    assert value.dtype == grad.dtype == grad_weight.dtype == dtype
    truth = evaluate(copy.deepcopy(short).double(), embeddings.double(), labels)
    for found, t in zip((value, grad, grad_weight), truth, strict=True):
        scale = t.abs().max().item()
        torch.testing.assert_close(found.double(), t, rtol=0, atol=torch.finfo(dtype).eps * scale)


COLUMN_SIZES = [(5, 17, 3), (40, 130, 33), (9, 1000, 64), (130, 70, 151), (3, 2, 2), (3, 2, 1), (3, 1, 2)]


@pytest.mark.parametrize(("n", "classes", "dim"), COLUMN_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "euclidean_raw"])
def test_columns_are_rows_to_the_bit(n, classes, dim, dtype, similarity, instruction_set):
    """References that are the columns of a matrix [D, C], in order or not, with a limit or not; so too with
    rows that are columns. Their gradient is laid out as they are, and has no holes."""
    columns = torch.randn(dim, classes).to(dtype)
    rows, labels = torch.randn(n, dim).to(dtype), torch.arange(n) % classes
    options = OpOptions("multi_similarity", [2.0, 5.0, 0.5], None, similarity, save_for_backward=True)
    for order in (torch.arange(classes), torch.randperm(classes)):
        for limit in (None, torch.tensor(max(classes - 3, 1)), torch.tensor(0)):
            results = []
            for points, refs in (
                (rows, columns.T.contiguous()),
                (rows, columns.T),
                (rows.T.contiguous().T, columns.T),
            ):
                leaves = [points.detach().requires_grad_(), refs.detach().requires_grad_()]
                batch = leaves[0], labels, leaves[1], order, None, limit, None
                value, _ = torch.ops.dml_cuda.pair_loss(*batch, *options)
                gradients = torch.autograd.grad(value, leaves)
                for gradient, leaf in zip(gradients, leaves, strict=True):
                    assert gradient.stride() == leaf.stride() or 1 in leaf.shape
                results.append((value, *gradients))
            for other in results[1:]:
                for a, b in zip(other, results[0], strict=True):
                    assert torch.equal(a, b)


def test_columns_as_an_op():
    """The fake kernel lays gradients out as the real one does."""
    for rows, refs in ((torch.randn(6, 4), torch.randn(4, 15).T), (torch.randn(4, 6).T, torch.randn(15, 4))):
        options = OpOptions("circle", [0.4, 80.0, 1.0], None, save_for_backward=True)
        leaves = [x.detach().requires_grad_() for x in (rows, refs)]
        arguments = leaves[0], torch.arange(6), leaves[1], torch.arange(15), None, None, None, *options
        torch.library.opcheck(torch.ops.dml_cuda.pair_loss.default, arguments)


def test_columns_that_are_not_finite():
    weight = torch.full((4, 9), math.inf, requires_grad=True)
    rows = torch.randn(3, 4, requires_grad=True)
    value = dml_cuda.CircleLoss()(rows, torch.arange(3), ref_emb=weight.T, ref_labels=torch.arange(9))
    gradients = torch.autograd.grad(value, [rows, weight])
    assert all(x.isnan().all() and x.is_contiguous() for x in gradients)


@EVERY_HEAD
def test_finite_differences(head):
    for rows in (6, 150):
        module = head.make(5, 3, **dict(head.smooth)).double()
        embeddings, labels = make_rows(module, rows)
        labels[0] = -1
        name = module.weight

        def loss(x, weight, module=module, labels=labels, name=name):
            return torch.func.functional_call(module, {name: weight}, (x, labels))

        leaves = embeddings[:, :].requires_grad_(), parameter(module).detach().clone().requires_grad_()
        torch.autograd.gradcheck(loss, leaves, fast_mode=rows > 10)


@EVERY_HEAD
def test_compiled(head):
    module = head.make(10, 4)
    embeddings, labels = make_rows(module, 20)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for found, expected in zip(
        evaluate(compiled, embeddings, labels), evaluate(module, embeddings, labels), strict=True
    ):
        torch.testing.assert_close(found, expected)


@EVERY_HEAD
def test_learns(head):
    labels = torch.arange(60) % 6
    points = torch.randn(6, 8)[labels] + 0.5 * torch.randn(60, 8)
    module = head.make(6, 8)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for _ in range(80):
        optimizer.zero_grad()
        module(points, labels).backward()
        optimizer.step()
    logits = module.get_logits(points) * (-1 if head.name == "ProxyNCALoss" else 1)  # there distances
    assert (logits.argmax(1) == labels).float().mean() > 0.95


@EVERY_HEAD
def test_any_number_of_threads(head):
    """The same to the bit, but for heads whose products are ATen's."""
    module = head.make(700, 20)
    embeddings, labels = make_rows(module, 300)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(evaluate(module, embeddings, labels))
    for a, b in zip(*results, strict=True):
        if head.name in ("SoftTripleLoss", "SubCenterArcFaceLoss"):
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b)


# ---- as others see them ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("head", "options"), WITH_PML)
def test_adapters(head, options):
    """The classes of dml_cuda.pml: PML's, computed here; reducers, regularisers and miners go on working."""
    reducers = pytest.importorskip("pytorch_metric_learning.reducers")
    regularizers = pytest.importorskip("pytorch_metric_learning.regularizers")
    from dml_cuda import pml

    theirs = pml_twin(head.make(12, 8, **options), **options, weight_regularizer=regularizers.LpRegularizer())
    sizes = {"num_classes": 12, "embedding_size": 8}
    ours = getattr(pml, head.name)(**sizes, **options, weight_regularizer=regularizers.LpRegularizer())
    assert ours.is_fused()
    assert isinstance(ours, type(theirs))
    ours.load_state_dict(theirs.state_dict())
    embeddings, labels = make_rows(head.make(12, 8, **options), 40)
    for module in (theirs, ours):
        module.double()
    for indices in (None, *map(tuple, listed_rows(40))):
        results = [evaluate(module, embeddings.double(), labels, indices) for module in (ours, theirs)]
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    if head.name == "ProxyAnchorLoss":
        return
    makers = getattr(pml, head.name), type(theirs)
    values = []
    for make in makers:
        module = make(**sizes, **options, reducer=reducers.ThresholdReducer(low=0.1)).double()
        module.load_state_dict(theirs.state_dict())
        values.append(module(embeddings.double(), labels))
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-12)


@EVERY_HEAD
def test_pair_weights(head):
    """What the loss makes of each row and class, is dL/ds."""
    module = head.make(10, 4).double()
    embeddings, labels = make_rows(module, 20)
    labels[3] = -1
    found = dml_cuda.functional.pair_weights(module, embeddings, labels)
    assert (labels[found.pos_anchors] >= 0).all() or head.name == "ProxyAnchorLoss"
    module.backend = "reference"
    _, grad, _ = evaluate(module, embeddings, labels)
    rows, _, columns, _ = (x.detach() for x in module.pairs(embeddings, labels))
    weights = rows.new_zeros(len(rows), len(columns))
    weights.index_put_((found.pos_anchors, found.positives), found.pos_weights, accumulate=True)
    weights.index_put_((found.neg_anchors, found.negatives), found.neg_weights, accumulate=True)
    if head.name == "ProxyAnchorLoss":
        rows, columns, weights, grad = columns, rows, weights.T, grad[labels >= 0]
    leaf = rows.clone().requires_grad_()
    unit = [torch.nn.functional.normalize(x, dim=1) for x in (leaf, columns)]
    (expected,) = torch.autograd.grad((unit[0] @ unit[1].T * weights).sum(), leaf)
    if head.name == "SphereFaceLoss":  # the length of a row counts besides
        along = torch.nn.functional.normalize(embeddings, dim=1)
        grad = grad - (grad * along).sum(1, keepdim=True) * along
    torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weighted_proxies_some_at_a_time(reduction, monkeypatch):
    module = dml_cuda.ProxyAnchorLoss(12, 8, reduction=reduction).double()
    embeddings, labels = make_rows(module, 40)
    rows = (torch.randint(40, (90,)),) * 3
    whole = evaluate(module, embeddings.double(), labels, rows)
    monkeypatch.setattr(proxy_anchor, "_BLOCK", 200)  # five proxies, five, and two
    for found, expected in zip(evaluate(module, embeddings.double(), labels, rows), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


# ---- circle, of which pytorch-metric-learning has no class-level loss ------------------------------------


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
        (torch.randn(6, 4).to("meta"), "embeddings: expected device cpu as W has, got meta"),
        (torch.randn(4), "embeddings: expected shape [rows, D], got [4]"),
        ([[1.0] * 4] * 6, "embeddings: expected a floating-point tensor of shape [rows, D], got list"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{re.escape(says)}"):
            head(embeddings, labels)


def test_ignored_rows_in_each_reduction():
    """As the docstring says: they count in "mean", not in "mean_valid" and "mean_nonzero"."""
    head = CircleClassifierLoss(10, 4)
    embeddings, labels = torch.randn(8, 4), torch.tensor([1, 2, 3, -1, -1, -7, 4, 5])
    total = CircleClassifierLoss(10, 4, reduction="sum")
    total.load_state_dict(head.state_dict())
    for reduction, rows in (("mean", 8), ("mean_valid", 5), ("mean_nonzero", 5)):
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
    torch._dynamo.reset()  # the limit of graphs counts those of the other heads
    head, (embeddings, labels) = CircleClassifierLoss(10, 4), (torch.randn(20, 4), torch.arange(20) // 2)
    compiled = torch.compile(head, fullgraph=True, dynamic=True, backend="aot_eager")
    for k in range(10):
        head.gamma, head.m = 64.0 + k, 0.2 + k / 40
        torch.testing.assert_close(compiled(embeddings, labels), head(embeddings, labels))


# Peak resident memory is a number of the whole process: this one gets its own.
MEASURE = """
import json, resource, sys
import torch
import dml_cuda

def measure(name, rows, classes, dim, **options):
    head = getattr(dml_cuda, name)(classes, dim, **options)
    leaf = torch.randn(rows, dim, requires_grad=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    head(leaf, torch.randint(0, classes, (rows,))).backward()
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    weight = next(head.parameters())
    return added - weight.numel() * 4, weight.grad.abs().max().item()

name, options = sys.argv[1], json.loads(sys.argv[2])
measure(name, 64, 256, 8, **options)  # the libraries' own buffers and threads
added, gradient = measure(name, 1500, 100_000, 32, **options)
print(json.dumps({"added": added, "gradient": gradient}))
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts other units elsewhere")
@pytest.mark.parametrize("name", ["NormalizedSoftmaxLoss", "ProxyAnchorLoss", "SoftTripleLoss"])
def test_the_logits_are_never_stored(name):
    """1500 x 100,000 of them would take 572 MiB: beyond the gradient of the weights 64 MB do."""
    options = json.dumps({"centers_per_class": 3, "tau": 0.2} if name == "SoftTripleLoss" else {})
    command = [sys.executable, "-c", MEASURE, name, options]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(run.stdout)
    assert measured["gradient"] > 0
    assert measured["added"] < 64e6, measured
