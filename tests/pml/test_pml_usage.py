"""Code as pytorch-metric-learning's own documentation has it runs with only the import changed.

Each function below is such code, with the classes it would import as its first argument; it must give the
same losses and gradients with PML's classes, with ours, and with our adapters of PML's.
"""

from types import SimpleNamespace

import pytest
import torch

import dml_cuda

pml = pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")
from pytorch_metric_learning import losses, miners, reducers, samplers  # noqa: E402
from pytorch_metric_learning.utils import common_functions  # noqa: E402

import dml_cuda.pml  # noqa: E402

DIM = 8
PML = SimpleNamespace(
    MultiSimilarityLoss=losses.MultiSimilarityLoss,
    CircleLoss=losses.CircleLoss,
    MultiSimilarityMiner=miners.MultiSimilarityMiner,
    CrossBatchMemory=losses.CrossBatchMemory,
)
OURS = {
    "dml_cuda": dml_cuda,
    "dml_cuda.pml": SimpleNamespace(
        MultiSimilarityLoss=dml_cuda.pml.MultiSimilarityLoss,
        CircleLoss=dml_cuda.pml.CircleLoss,
        MultiSimilarityMiner=dml_cuda.pml.MultiSimilarityMiner,
        CrossBatchMemory=losses.CrossBatchMemory,
    ),
    "dml_cuda.pml with dml_cuda.CrossBatchMemory": SimpleNamespace(
        MultiSimilarityLoss=dml_cuda.pml.MultiSimilarityLoss,
        CircleLoss=dml_cuda.pml.CircleLoss,
        MultiSimilarityMiner=dml_cuda.pml.MultiSimilarityMiner,
        CrossBatchMemory=dml_cuda.CrossBatchMemory,
    ),
}


def data(seed, n=60, classes=10):
    """Points of a few classes, a model that embeds them, and an optimizer."""
    torch.manual_seed(seed)
    labels = torch.randint(0, classes, (n,))
    points = torch.randn(classes, 12)[labels] + torch.randn(n, 12)
    model = torch.nn.Linear(12, DIM)
    return points.double(), labels, model.double(), torch.optim.SGD(model.parameters(), lr=0.01)


def gradient_of(model):
    return model.weight.grad.clone()


def only_a_loss(classes, name, seed):
    points, labels, model, _ = data(seed)
    loss_func = getattr(classes, name)()
    loss = loss_func(model(points), labels)
    loss.backward()
    return [loss.detach(), gradient_of(model)]


def a_miner_and_a_loss(classes, name, seed):
    points, labels, model, optimizer = data(seed)
    miner = classes.MultiSimilarityMiner(epsilon=0.1)
    loss_func = getattr(classes, name)()
    results = []
    for _ in range(3):
        optimizer.zero_grad()
        embeddings = model(points)
        hard_pairs = miner(embeddings, labels)
        loss = loss_func(embeddings, labels, hard_pairs)
        loss.backward()
        counts = torch.tensor([miner.num_pos_pairs, miner.num_neg_pairs])
        results += [loss.detach(), gradient_of(model), counts]
        optimizer.step()
    return results


def references(classes, name, seed):
    """A loss, with and without a miner, on embeddings and other references."""
    points, labels, model, _ = data(seed, n=100)
    miner, loss_func = classes.MultiSimilarityMiner(), getattr(classes, name)()
    results = []
    for mined in (False, True):
        model.zero_grad()
        embeddings = model(points[:40])
        ref_emb, ref_labels = model(points[40:]), labels[40:]
        indices_tuple = miner(embeddings, labels[:40], ref_emb, ref_labels) if mined else None
        loss = loss_func(embeddings, labels[:40], indices_tuple, ref_emb, ref_labels)
        loss.backward()
        results += [loss.detach(), gradient_of(model)]
        keywords = {"ref_emb": ref_emb.detach(), "ref_labels": ref_labels}
        results.append(loss_func(embeddings.detach(), labels[:40], **keywords))
    return results


def cross_batch_memory(classes, name, seed):
    points, labels, model, optimizer = data(seed, n=200)
    miner = classes.MultiSimilarityMiner(0.1)
    loss_func = classes.CrossBatchMemory(getattr(classes, name)(), DIM, memory_size=100, miner=miner)
    results = []
    for batch in torch.arange(200).split(30):
        optimizer.zero_grad()
        loss = loss_func(model(points[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        results += [loss.detach(), gradient_of(model)]
    return results


def sampler(classes, name, seed):
    points, labels, model, optimizer = data(seed, n=120)
    common_functions.NUMPY_RANDOM.seed(seed)
    per_class = samplers.MPerClassSampler(labels, m=4, batch_size=32, length_before_new_iter=96)
    data_set = torch.utils.data.TensorDataset(points, labels)
    loader = torch.utils.data.DataLoader(data_set, batch_size=32, sampler=per_class)
    miner, loss_func = classes.MultiSimilarityMiner(), getattr(classes, name)()
    results = []
    for batch, batch_labels in loader:
        optimizer.zero_grad()
        embeddings = model(batch)
        loss = loss_func(embeddings, batch_labels, miner(embeddings, batch_labels))
        loss.backward()
        optimizer.step()
        results += [loss.detach(), gradient_of(model)]
    assert len(results) == 6
    return results


def mixed_with_cross_entropy(classes, name, seed):
    points, labels, model, _ = data(seed)
    head = torch.nn.Linear(DIM, 10).double()
    metric, cross_entropy = getattr(classes, name)(), torch.nn.CrossEntropyLoss()
    embeddings = model(points)
    loss = 0.1 * metric(embeddings, labels) + cross_entropy(head(embeddings), labels)
    loss.backward()
    return [loss.detach(), gradient_of(model), head.weight.grad]


def options(classes, name, seed):
    """Positional and by name, the values of the papers."""
    points, labels, model, _ = data(seed)
    loss_func = {
        "MultiSimilarityLoss": lambda: classes.MultiSimilarityLoss(2, 40, base=0.5),
        "CircleLoss": lambda: classes.CircleLoss(m=0.25, gamma=256),
    }[name]()
    loss = loss_func(model(points), labels, classes.MultiSimilarityMiner(epsilon=0.2)(model(points), labels))
    loss.backward()
    return [loss.detach(), gradient_of(model)]


USAGES = (
    only_a_loss,
    a_miner_and_a_loss,
    references,
    cross_batch_memory,
    sampler,
    mixed_with_cross_entropy,
    options,
)


@pytest.mark.parametrize("name", ["MultiSimilarityLoss", "CircleLoss"])
@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("usage", USAGES, ids=lambda usage: usage.__name__)
def test_only_the_import_changed(usage, ours, name):
    for seed in range(5):
        found, expected = (usage(classes, name, seed) for classes in (OURS[ours], PML))
        assert any(x.is_floating_point() and x.abs().max() > 0 for x in found)
        for f, e in zip(found, expected, strict=True):
            # PML's circle loss goes through torch's softplus, which takes exp(-20) = 2e-9 for 0.
            close = 1e-8 * e.abs().max().item()
            torch.testing.assert_close(f, e, rtol=0, atol=close)


def test_version_3_names():
    """margin for m, and the names of the pairs' fields."""
    points, labels, model, _ = data(0)
    embeddings = model(points)
    assert torch.equal(
        dml_cuda.CircleLoss(margin=0.25)(embeddings, labels), dml_cuda.CircleLoss(m=0.25)(embeddings, labels)
    )
    with pytest.raises(ValueError, match=r"^margin: .*m=0\.3 and margin=0\.25"):
        dml_cuda.CircleLoss(m=0.3, margin=0.25)
    pairs = dml_cuda.MultiSimilarityMiner()(embeddings, labels)
    fields = pairs.pos_anchors, pairs.positives, pairs.neg_anchors, pairs.negatives
    assert all(a is b for a, b in zip(fields, pairs, strict=True))


def test_reductions_by_reducer():
    """What PML does by a reducer, ours do by an option."""
    points, labels, model, _ = data(0)
    for reduction, reducer in (
        ("mean", reducers.MeanReducer()),
        ("sum", reducers.SumReducer()),
        ("mean_nonzero", reducers.AvgNonZeroReducer()),
    ):
        found = dml_cuda.CircleLoss(reduction=reduction)(model(points), labels)
        torch.testing.assert_close(found, losses.CircleLoss(reducer=reducer)(model(points), labels))
