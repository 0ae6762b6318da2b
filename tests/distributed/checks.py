"""Checks that several processes run together, each as ``distributed_checks.py RANK SIZE FOLDER``.

Every process makes the same whole batch, keeps its share of it, and compares what comes out with what one
process makes of the whole. test_distributed.py starts them, once for each number of processes.
"""

import contextlib
import datetime
import itertools
import json
import os
import sys
import traceback
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
import torch.distributed as dist
from cases import heads
from cases.accuracy import assert_as_accurate
from cases.data import make_batch, make_labels
from cases.losses import LOSSES, REDUCTIONS, by_name
from cases.ranking import RANKINGS
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dml_cuda
from dml_cuda import CircleClassifierLoss, CrossBatchMemory, MultiSimilarityLoss, MultiSimilarityMiner
from dml_cuda.distributed import DistributedLoss

TIMEOUT = datetime.timedelta(seconds=60)  # of one collective operation
DIM = 7
MODES = ("gather", "ring")
SIZES = (2, 3, 4)
EVEN = {2: (12, 12), 3: (8, 8, 8), 4: (6, 6, 6, 6)}
# Rows of each process: very unequal, and none.
UNEVEN = {2: (17, 5), 3: (9, 0, 14), 4: (1, 13, 0, 7)}
EMPTY = {2: (0, 9), 3: (0, 0, 5), 4: (0, 0, 0, 0)}
LARGE = {2: (300, 70), 3: (150, 0, 210), 4: (131, 90, 1, 140)}  # tiles of more than one block
BAD = torch.zeros(3)


def rank():
    return dist.get_rank()


def layouts():
    """Everything is tried with three processes; with two and four, whose steps are the same in another
    number, what is hardest."""
    size = dist.get_world_size()
    return tuple(layout[size] for layout in ((EVEN, UNEVEN, EMPTY) if size == 3 else (UNEVEN, EMPTY)))


def reductions(rows):
    return REDUCTIONS if rows == UNEVEN[3] else ("mean_nonzero", "none")


def trials(rows):
    """Of each type how often: float32, and that all is repeatable, where three processes' rows are
    unequal."""
    return {torch.float64: 2, torch.float32: 2} if rows == UNEVEN[3] else {torch.float64: 1}


def share(x, rows):
    """This process's rows of the whole."""
    return x.split(list(rows))[rank()]


def whole_batch(rows, dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    return make_batch(sum(rows), DIM, dtype=dtype, **options)


def evaluate(loss, embeddings, labels, upstream=None, refs=None, **options):
    """The loss and its gradients by the embeddings and by refs."""
    leaves = [embeddings.detach().clone().requires_grad_()]
    if refs is not None:
        leaves.append(refs.detach().clone().requires_grad_())
        options["ref_emb"] = leaves[1]
    value = loss(leaves[0], labels, **options)
    scale = torch.ones_like(value) if upstream is None else upstream.to(value)
    return value.detach(), *torch.autograd.grad(value, leaves, scale)


def close(found, expected, what, tolerance=1e-12):
    assert found.dtype == expected.dtype, what
    assert found.shape == expected.shape, (what, found.shape, expected.shape)
    assert torch.isfinite(expected).all(), what
    largest = expected.abs().max().item() if expected.numel() else 0.0
    error = (found - expected).abs().max().item() if expected.numel() else 0.0
    assert error <= tolerance * max(largest, 1.0), f"{what}: {error:.3g} of {largest:.3g}"


def same_everywhere(value):
    everyone = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, value)
    assert all(torch.equal(other, value) for other in everyone), everyone


def as_one_process(make, mode, rows, each, dtypes=(torch.float64, torch.float32), **batch):
    """Value and gradient of the loss that ``make()`` makes, against one process with the whole batch."""
    embeddings, labels = whole_batch(rows, **batch)
    upstream = torch.randn(len(labels), dtype=torch.float64) if each else None
    truth = evaluate(make(), embeddings, labels, upstream)
    for dtype in dtypes:
        points = embeddings.to(dtype)
        own = None if upstream is None else share(upstream, rows)
        value, gradient = evaluate(
            DistributedLoss(make(), mode=mode), share(points, rows), share(labels, rows), own
        )
        wanted = [share(x, rows) for x in truth] if each else [truth[0], share(truth[1], rows)]
        if not each:  # of the sum of the processes' values, which DistributedDataParallel averages
            same_everywhere(value)
            gradient = gradient / dist.get_world_size()
        if dtype == torch.float64:
            close(value, wanted[0], "loss")
            close(gradient, wanted[1], "gradient")
            continue
        one = evaluate(make(), points, labels, upstream)
        for what, found, peer, exact in zip(("loss", "gradient"), (value, gradient), one, truth, strict=True):
            if each or what == "gradient":
                peer, exact = share(peer, rows), share(exact, rows)
            if len(exact) if exact.ndim else True:
                assert_as_accurate(what, found, peer, exact, steps=32)


def every_reduction(name, epsilon, mode):
    loss = LOSSES[name]
    for rows in layouts():
        for reduction in reductions(rows):
            make = partial(loss.module, epsilon=epsilon, reduction=reduction)
            as_one_process(make, mode, rows, reduction == "none", dtypes=trials(rows))


def every_similarity(name, mode):
    loss = LOSSES[name]
    for similarity in ("dot", "euclidean", "euclidean_raw"):
        make = partial(loss.module, **loss.smooth, epsilon=0.3, **by_name(similarity))
        rows = UNEVEN[dist.get_world_size()]
        as_one_process(make, mode, rows, False, dtypes=trials(rows))


def large(mode):
    """More rows than a tile has, classes of every size."""
    rows = LARGE[dist.get_world_size()]
    for name, loss in LOSSES.items():
        for epsilon in (None, 0.1):
            make = partial(loss.module, epsilon=epsilon)
            kind = "unequal" if name == "nt_xent" else "few"
            as_one_process(make, mode, rows, False, dtypes=(torch.float64,), kind=kind)


def other_columns(mode):
    """Each process with its share of the columns too."""
    size = dist.get_world_size()
    rows, refs = UNEVEN[size], EVEN[size][::-1]
    for name, loss in LOSSES.items():
        for epsilon in (None, 0.1):
            embeddings, labels = whole_batch(rows)
            columns, ref_labels = whole_batch(refs, seed=1)
            make = partial(loss.module, epsilon=epsilon)
            one = evaluate(make(), embeddings, labels, refs=columns, ref_labels=ref_labels)
            value, *gradients = evaluate(
                DistributedLoss(make(), mode=mode),
                share(embeddings, rows),
                share(labels, rows),
                refs=share(columns, refs),
                ref_labels=share(ref_labels, refs),
            )
            close(value, one[0], name)
            for found, expected, of in zip(gradients, one[1:], (rows, refs), strict=True):
                close(found / size, share(expected, of), name)


def short_types(mode):
    """float16 and bfloat16: each share's gradient is rounded once, their sum again."""
    rows = UNEVEN[dist.get_world_size()]
    for dtype in (torch.float16, torch.bfloat16):
        embeddings, labels = whole_batch(rows, dtype)
        make = partial(MultiSimilarityLoss, epsilon=0.1)
        value, gradient = evaluate(make(), embeddings.double(), labels)
        own = evaluate(DistributedLoss(make(), mode=mode), share(embeddings, rows), share(labels, rows))
        assert own[0].dtype == own[1].dtype == dtype
        steps = 4 * torch.finfo(dtype).eps
        close(own[0].double(), value, dtype, steps)
        close(own[1].double() / len(rows), share(gradient, rows), dtype, steps * gradient.abs().max().item())


def one_label_each(mode):
    """No positives at all; and positives on one process only, of labels that no other has."""
    rows = EVEN[dist.get_world_size()]
    for reduction in ("mean", "mean_nonzero", "mean_valid"):
        for name, loss in LOSSES.items():
            embeddings, _ = whole_batch(rows)
            for labels in (
                torch.arange(len(embeddings)),
                torch.cat([torch.full((n,), k) for k, n in enumerate(rows)]),
                torch.zeros(len(embeddings), dtype=torch.long),
            ):
                make = partial(loss.module, epsilon=0.1, reduction=reduction)
                one = evaluate(make(), embeddings, labels)
                own = evaluate(
                    DistributedLoss(make(), mode=mode), share(embeddings, rows), share(labels, rows).int()
                )
                close(own[0], one[0], name)
                close(own[1] / len(rows), share(one[1], rows), name)


def the_reference_backend():
    for loss in LOSSES.values():
        for reduction in REDUCTIONS:
            make = partial(loss.module, epsilon=0.1, reduction=reduction, backend="reference")
            rows = UNEVEN[dist.get_world_size()]
            as_one_process(make, "gather", rows, reduction == "none", dtypes=(torch.float64,))


def second_derivatives_of_the_reference():
    rows = UNEVEN[dist.get_world_size()]
    embeddings, labels = whole_batch(rows)
    smooth = {"beta": 5.0, "backend": "reference"}

    def squared(loss, x, y):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf, y), leaf, create_graph=True)
        # On several processes the gradient is that of the sum of all values.
        return torch.autograd.grad(gradient.square().sum(), leaf)[0]

    expected = squared(MultiSimilarityLoss(**smooth), embeddings, labels)
    found = squared(
        DistributedLoss(MultiSimilarityLoss(**smooth)), share(embeddings, rows), share(labels, rows)
    )
    close(found / len(rows) ** 2, share(expected, rows), "second derivative", 1e-10)


def second_derivatives_of_the_kernels(mode):
    """There are none: an error says so on every process, where a gradient penalty would do nothing."""
    rows = UNEVEN[dist.get_world_size()]
    embeddings, labels = (share(x, rows) for x in whole_batch(rows))
    columns = share(whole_batch(rows, seed=1)[0], rows)
    for refs in ({}, {"ref_emb": columns.requires_grad_(), "ref_labels": labels}):
        leaf = embeddings.clone().requires_grad_()
        loss = DistributedLoss(MultiSimilarityLoss(), mode=mode)(leaf, labels, **refs)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        penalty = gradient.square().sum()
        raised(partial(torch.autograd.grad, penalty, leaf), RuntimeError, "no second derivative")


def gradients(value, leaves):
    """Of the sum of the processes' values, as the average of them makes it that of one."""
    found = torch.autograd.grad(value, leaves, torch.ones_like(value))
    return [gradient / (dist.get_world_size() if value.ndim == 0 else 1) for gradient in found]


def total(gradient):
    gradient = gradient.clone()
    dist.all_reduce(gradient)
    return gradient


def learned_parameters(mode):
    """Summed over the processes, their gradients are those of one process; factors of rows beside them."""
    rows = layouts()[0]
    embeddings, labels = whole_batch(rows)
    weights = torch.rand(len(labels), dtype=torch.float64)
    for name in FEW_FORMULAS:
        loss = LOSSES[name]

        def made(loss=loss):
            values = {key: torch.tensor(float(loss.defaults[key])).double() for key in loss.learnable}
            return loss.module(**{key: torch.nn.Parameter(value) for key, value in values.items()})

        whole, part = made(), made()
        x = embeddings.clone().requires_grad_()
        truth = whole(x, labels, row_weights=weights)
        expected = torch.autograd.grad(truth, [x, *whole.parameters()])
        own = share(embeddings, rows).clone().requires_grad_()
        value = DistributedLoss(part, mode=mode)(own, share(labels, rows), row_weights=share(weights, rows))
        close(value.detach(), truth.detach(), name)
        found = gradients(value, [own, *part.parameters()])
        close(found[0], share(expected[0], rows), name)
        for gradient, one in zip(found[1:], expected[1:], strict=True):
            close(total(gradient), one, f"{name}: a parameter")


def two_towers(mode):
    """Pairs are matched by their place in the whole batch."""
    rows = layouts()[0]
    a, _ = whole_batch(rows, seed=1)
    b, labels = whole_batch(rows, seed=2)
    negatives, own_negatives = torch.randn(2 * len(a), DIM).double(), torch.randn(len(a), 3, DIM).double()
    twice = [2 * n for n in rows]
    for reduction in ("mean", "sum", "none"):
        losses = {
            "CLIP": (dml_cuda.CLIPLoss(reduction=reduction), {}),
            "CLIP, labels": (dml_cuda.CLIPLoss(reduction=reduction), {"labels": (labels, rows)}),
            "SigLIP": (dml_cuda.SigLIPLoss(reduction=reduction), {}),
            "InfoNCE": (dml_cuda.InfoNCELoss(reduction=reduction), {}),
            "InfoNCE, negatives": (
                dml_cuda.InfoNCELoss(in_batch_negatives=True, reduction=reduction),
                {"negatives": (negatives, twice)},
            ),
            "InfoNCE, paired": (
                dml_cuda.InfoNCELoss(negative_mode="paired", reduction=reduction),
                {"negatives": (own_negatives, rows)},
            ),
        }
        for name, (loss, more) in losses.items():
            x, y = (points.clone().requires_grad_() for points in (a, b))
            truth = loss(x, y, **{key: value for key, (value, _) in more.items()})
            expected = torch.autograd.grad(truth, [x, y], torch.ones_like(truth))
            own = [share(points, rows).clone().requires_grad_() for points in (a, b)]
            value = DistributedLoss(loss, mode=mode)(
                *own, **{key: share(whole, sizes) for key, (whole, sizes) in more.items()}
            )
            wanted = truth.detach() if truth.ndim == 0 else share(truth.detach(), rows)
            close(value.detach(), wanted, f"{name}, {reduction}")
            for gradient, one in zip(gradients(value, own), expected, strict=True):
                close(gradient, share(one, rows), f"{name}, {reduction}: gradient")


def miners(mode):
    """The rule of a miner: of the loss, of the wrapper, and as its result."""
    rows = UNEVEN[dist.get_world_size()]
    embeddings, labels = whole_batch(rows)
    miner = MultiSimilarityMiner(0.1)
    one = evaluate(MultiSimilarityLoss(epsilon=0.1), embeddings, labels)
    points, own = share(embeddings, rows), share(labels, rows)
    wrapped = evaluate(DistributedLoss(MultiSimilarityLoss(), mode=mode, miner=miner), points, own)

    def mined(x, y):
        return DistributedLoss(MultiSimilarityLoss(), mode=mode)(x, y, miner(x, y))

    for found in (wrapped, evaluate(mined, points, own)):
        close(found[0], one[0], "loss")
        close(found[1] / len(rows), share(one[1], rows), "gradient")


def repeatable(mode):
    """To the bit, forward and backward."""
    rows = LARGE[dist.get_world_size()]
    embeddings, labels = whole_batch(rows, torch.float32)
    for loss in LOSSES.values():
        module = DistributedLoss(loss.module(epsilon=0.1), mode=mode)
        first, second = (evaluate(module, share(embeddings, rows), share(labels, rows)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), loss.name


def infinite(mode):
    """NaN on one process is NaN for all, as on one process."""
    rows = EVEN[dist.get_world_size()]
    embeddings, labels = whole_batch(rows)
    embeddings[1, 2] = float("nan")
    value, gradient = evaluate(
        DistributedLoss(MultiSimilarityLoss(epsilon=0.1), mode=mode),
        share(embeddings, rows),
        share(labels, rows),
    )
    assert value.isnan()
    assert gradient.isnan().all()


def partly_differentiable(mode):
    """Only the first process wants a gradient; the others take part in making it."""
    rows = UNEVEN[dist.get_world_size()]
    embeddings, labels = whole_batch(rows)
    loss = MultiSimilarityLoss(epsilon=0.1)
    expected = share(evaluate(loss, embeddings, labels)[1], rows)
    own = share(embeddings, rows).clone().requires_grad_(rank() == 0)
    value = DistributedLoss(loss, mode=mode)(own, share(labels, rows))
    value.backward()
    if rank() == 0:
        close(own.grad / len(rows), expected, "gradient")
    else:
        assert own.grad is None
    with torch.no_grad():
        assert not DistributedLoss(loss, mode=mode)(own, share(labels, rows)).requires_grad


def a_group_of_some(mode):
    """The processes but the first are a group of their own."""
    group = dist.new_group(list(range(1, dist.get_world_size())), timeout=TIMEOUT)
    if rank() == 0:
        return
    rows = UNEVEN[dist.get_world_size()][1:]
    embeddings, labels = whole_batch(rows)
    loss = MultiSimilarityLoss(epsilon=0.1)
    one = evaluate(loss, embeddings, labels)
    own = (x.split(list(rows))[rank() - 1] for x in (embeddings, labels))
    found = evaluate(DistributedLoss(loss, group, mode), *own)
    close(found[0], one[0], "loss")
    close(found[1] / len(rows), one[1].split(list(rows))[rank() - 1], "gradient")


# ---- training ---------------------------------------------------------------------------------------------


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, DIM)).double()


def train(model, loss, inputs, labels, steps=3, around=contextlib.nullcontext):
    """The losses and the weights after some steps; ``around()`` is a context for the forward pass."""
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    values = []
    for _ in range(steps):
        with around():
            value = loss(model(inputs), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.detach())
    return [torch.stack(values), *(p.detach() for p in model.parameters())]


def inputs_and_labels(rows):
    torch.manual_seed(4)
    return torch.randn(sum(rows), 5, dtype=torch.float64), make_labels(sum(rows))


def training_steps(mode):
    """DistributedDataParallel's steps are those of one process; so they are with its network compiled."""
    rows = UNEVEN[dist.get_world_size()]
    whole = inputs_and_labels(rows)
    own = [share(x, rows) for x in whole]
    loss = MultiSimilarityLoss(epsilon=0.1)
    expected = train(network(), loss, *whole)
    models = [
        DistributedDataParallel(network()),
        torch.compile(DistributedDataParallel(network()), backend="aot_eager"),
    ]
    for model in models:
        found = train(model, DistributedLoss(loss, mode=mode), *own)
        for a, b in zip(found, expected, strict=True):
            close(a, b, "weights", 1e-11)


def sharded(model):
    """A network whose parameters FSDP2 shards; what comes out of it is whole, and its gradient averaged."""
    from torch.distributed.device_mesh import init_device_mesh  # not in a PyTorch without processes
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sharded_training_steps(mode):
    """So are those of FSDP2, and two batches of which the first is not synchronised."""
    rows = UNEVEN[dist.get_world_size()]
    whole = inputs_and_labels(rows)
    own = [share(x, rows) for x in whole]
    loss = MultiSimilarityLoss(epsilon=0.1)
    expected = train(network(), loss, *whole)
    values, *weights = train(sharded(network()), DistributedLoss(loss, mode=mode), *own)
    close(values, expected[0], "losses", 1e-11)
    for a, b in zip(weights, expected[1:], strict=True):
        close(a.full_tensor(), b, "weights", 1e-11)

    one, model = network(), sharded(network())
    for k in range(2):
        loss(one(whole[0] + k), whole[1]).backward()
        model.set_requires_gradient_sync(k == 1)
        DistributedLoss(loss, mode=mode)(model(own[0] + k), own[1]).backward()
    for a, b in zip(model.parameters(), one.parameters(), strict=True):
        close(a.grad.full_tensor(), b.grad, "gradient")


def a_compiled_step():
    """A step compiled whole: the loss breaks the graph, and nothing else."""
    rows = EVEN[dist.get_world_size()]
    inputs, labels = (share(x, rows) for x in inputs_and_labels(rows))
    layer, loss = nn.Linear(5, DIM).double(), DistributedLoss(MultiSimilarityLoss(epsilon=0.1))

    def step(x, y):
        return 2 * loss(layer(x), y)

    results = []
    for run in (step, torch.compile(step, backend="aot_eager")):
        layer.zero_grad()
        value = run(inputs, labels)
        value.backward()
        results.append((value.detach(), layer.weight.grad.clone()))
    close(results[1][0], results[0][0], "loss")
    close(results[1][1], results[0][1], "gradient")


def accumulation(mode):
    """Two batches, the first without synchronising: the gradient of the sum of their losses."""
    rows = UNEVEN[dist.get_world_size()]
    inputs, labels = inputs_and_labels(rows)
    batches = [(inputs, labels), (inputs.flip(0) + 1, labels.flip(0))]
    loss = MultiSimilarityLoss(epsilon=0.1)
    one = network()
    for x, y in batches:
        loss(one(x), y).backward()
    model = DistributedDataParallel(network())
    for k, (x, y) in enumerate(batches):
        with model.no_sync() if k == 0 else contextlib.nullcontext():
            DistributedLoss(loss, mode=mode)(model(share(x, rows)), share(y, rows)).backward()
    for a, b in zip(model.parameters(), one.parameters(), strict=True):
        close(a.grad, b.grad, "gradient")


def autocast(mode):
    rows = UNEVEN[dist.get_world_size()]
    inputs, labels = inputs_and_labels(rows)
    loss, context = MultiSimilarityLoss(epsilon=0.1), partial(torch.autocast, "cpu", torch.bfloat16)
    expected = train(network().float(), loss, inputs.float(), labels, 1, context)
    model = DistributedDataParallel(network().float())
    own = share(inputs, rows).float(), share(labels, rows)
    found = train(model, DistributedLoss(loss, mode=mode), *own, 1, context)
    assert found[0].dtype == torch.float32
    close(found[0], expected[0], "loss", 1e-5)


def against_one_process(names, double, single=None):
    """What several processes found beside what one did, ``(found, peer)`` for each type."""
    for k, (found, truth) in enumerate(zip(*double, strict=True)):
        close(found, truth, names[k])
    if single is not None:
        for k, (found, peer, truth) in enumerate(zip(*single, double[1], strict=True)):
            if truth.numel():
                assert_as_accurate(names[k], found, peer, truth, steps=32)


def head_as_one_process(head, rows, reduction, labels_of):
    """Value and gradients, that of the classes' weights averaged by DistributedDataParallel; float64 against
    one process, float32 as accurate as one process in float32. Both twice, where :func:`trials` says so."""
    size, each = dist.get_world_size(), reduction == "none"
    more = {"tau": 0.2} if head.name == "SoftTripleLoss" else {}
    embeddings, labels = whole_batch(rows)
    labels = labels_of(labels)
    torch.manual_seed(5)
    weights = torch.randn_like(next(head.make(9, DIM, **more).parameters()), dtype=torch.float64)
    results = []
    for dtype, times in trials(rows).items():
        one, own = (head.make(9, DIM, reduction=reduction, **more).to(dtype) for _ in range(2))
        with torch.no_grad():
            for p in (*one.parameters(), *own.parameters()):
                p.copy_(weights)
        peer = heads.evaluate(one, embeddings.to(dtype), labels)
        if each:
            peer = [share(x, rows) for x in peer[:2]] + [peer[2] / size]
        else:
            peer[1] = share(peer[1], rows) * size
        model = DistributedDataParallel(DistributedLoss(own))
        x = share(embeddings, rows).to(dtype, copy=True).requires_grad_()
        found = []
        for _ in range(times):
            x.grad, next(own.parameters()).grad = None, None
            value = model(x, share(labels, rows))
            value.backward(torch.ones_like(value))
            found.append([value.detach(), x.grad, next(own.parameters()).grad.clone()])
        assert all(torch.equal(a, b) for a, b in zip(found[0], found[-1], strict=True)), "not repeatable"
        results.append((found[0], peer))
    against_one_process(("loss", "gradient", "weights"), *results)


def class_level(head):
    reductions = [r for r in REDUCTIONS if (head.name, r) != ("ProxyAnchorLoss", "none")]

    def some_left_out(labels):
        labels[::5] = -1
        return labels

    for rows, reduction in itertools.product(layouts(), reductions):
        head_as_one_process(head, rows, reduction, some_left_out)
    rows = UNEVEN[dist.get_world_size()]
    of_rank = torch.cat([torch.full((n,), k) for k, n in enumerate(rows)])
    for labels in (of_rank, torch.zeros_like(of_rank), torch.full_like(of_rank, -1)):
        head_as_one_process(head, rows, "mean", lambda _, labels=labels: labels)


TRIPLET_MINERS = {
    "all": None,
    "batch-hard": dml_cuda.BatchHardMiner(),
    "semi-hard": dml_cuda.TripletMarginMiner(type_of_triplets="semihard"),
    "easy and semi-hard": dml_cuda.BatchEasyHardMiner("easy", "semihard"),
    "drawn": dml_cuda.DistanceWeightedMiner(),
}


def triplets_as_one_process(miner, make, rows, reduction, labels_of):
    """As head_as_one_process: gradients by the rows, and by a boundary that is learnt. Draws are those of one
    process."""
    size, each = dist.get_world_size(), reduction == "none"
    embeddings, labels = whole_batch(rows)
    labels = labels_of(labels)
    results = []
    for dtype, times in trials(rows).items():
        one, own = (make(reduction=reduction).to(dtype) for _ in range(2))
        leaf = embeddings.to(dtype, copy=True).requires_grad_()
        torch.manual_seed(7)
        value = one(leaf, labels, None if miner is None else miner(leaf, labels))
        value.backward(torch.ones_like(value))
        # Where there is no row there may be no gradient.
        by_beta = [torch.zeros_like(p) if p.grad is None else p.grad for p in one.parameters()]
        peer = [value.detach(), leaf.grad, *(grad / (size if each else 1) for grad in by_beta)]
        peer[1] = share(peer[1], rows) * (1 if each else size)
        if each:
            peer[0] = share(peer[0], rows)
        module = DistributedLoss(own, miner=miner)
        learns = any(p.requires_grad for p in own.parameters())
        module = DistributedDataParallel(module) if learns else module
        x = share(embeddings, rows).to(dtype, copy=True).requires_grad_()
        found = []
        for _ in range(times):
            for p in (x, *own.parameters()):
                p.grad = None
            torch.manual_seed(7 if rank() == 0 else 8)
            value = module(x, share(labels, rows))
            value.backward(torch.ones_like(value))
            # Where nobody has a row DistributedDataParallel may leave no gradient.
            by_beta = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in own.parameters()]
            found.append([value.detach(), x.grad, *by_beta])
        assert all(torch.equal(a, b) for a, b in zip(found[0], found[-1], strict=True)), "not repeatable"
        results.append((found[0], peer))
    against_one_process(("loss", "gradient", "beta"), *results)


def triplets(miner, make):
    miner = TRIPLET_MINERS[miner]
    for rows, reduction in itertools.product(layouts(), REDUCTIONS):
        triplets_as_one_process(miner, make, rows, reduction, lambda labels: labels)
    rows = UNEVEN[dist.get_world_size()]
    of_rank = torch.cat([torch.full((n,), k) for k, n in enumerate(rows)])
    for labels in (of_rank, torch.zeros_like(of_rank), torch.arange(len(of_rank))):
        triplets_as_one_process(miner, make, rows, "mean", lambda _, labels=labels: labels)


def margin_per_class(**options):
    margins = torch.linspace(0.05, 0.3, 40, dtype=torch.float64)
    return dml_cuda.TripletMarginLoss(margin=torch.nn.Parameter(margins), **options)


def triplets_of_other_columns():
    """Each process with its share of the columns; and what the wrapper is given as found."""
    size = dist.get_world_size()
    rows, refs = UNEVEN[size], EVEN[size][::-1]
    embeddings, labels = whole_batch(rows)
    columns, ref_labels = whole_batch(refs, seed=1)
    one = evaluate(dml_cuda.TripletMarginLoss(), embeddings, labels, refs=columns, ref_labels=ref_labels)
    value, *gradients = evaluate(
        DistributedLoss(dml_cuda.TripletMarginLoss()),
        share(embeddings, rows),
        share(labels, rows),
        refs=share(columns, refs),
        ref_labels=share(ref_labels, refs),
    )
    close(value, one[0], "loss")
    for found, expected, of in zip(gradients, one[1:], (rows, refs), strict=True):
        close(found / size, share(expected, of), "gradient")

    def mined(x, y):
        return DistributedLoss(dml_cuda.TripletMarginLoss())(x, y, dml_cuda.BatchHardMiner()(x, y))

    leaf = embeddings.clone().requires_grad_()
    pairs = dml_cuda.BatchHardMiner()(leaf, labels)
    close(
        evaluate(mined, share(embeddings, rows), share(labels, rows))[0],
        dml_cuda.TripletMarginLoss()(leaf, labels, pairs).detach(),
        "loss",
    )


def triplets_that_are_refused():
    rows = EVEN[dist.get_world_size()]
    embeddings, labels = (share(x, rows) for x in whole_batch(rows))
    for options, says in (({"swap": True}, "swap"), ({"triplets_per_anchor": 3}, "triplets_per_anchor")):
        module = DistributedLoss(dml_cuda.TripletMarginLoss(**options))
        raised(partial(module, embeddings, labels), ValueError, "loss", says)
    ring = DistributedLoss(dml_cuda.TripletMarginLoss(), mode="ring")
    raised(lambda: ring(embeddings, labels), ValueError, "mode", "triplets")
    module = DistributedLoss(dml_cuda.TripletMarginLoss())
    raised(lambda: module(embeddings, labels, (labels,) * 3), ValueError, "indices_tuple", "lists")
    others = dml_cuda.BatchHardMiner()(embeddings.clone(), labels)
    raised(lambda: module(embeddings, labels, others), ValueError, "indices_tuple", "very")
    raised(lambda: DistributedLoss(dml_cuda.TripletMarginLoss(), miner=print), TypeError, "miner")


# ---- losses of ranks --------------------------------------------------------------------------------------


def rankings(name):
    loss = RANKINGS[name]
    for rows in layouts():
        for reduction in reductions(rows):
            make = partial(loss.module, reduction=reduction, **loss.smooth)
            as_one_process(make, "gather", rows, reduction == "none", dtypes=trials(rows))


def as_one_process_of_other_columns(make, name):
    """Each process with its share of the columns too, and factors of its rows; parameters may learn."""
    size = dist.get_world_size()
    rows, refs = UNEVEN[size], EVEN[size][::-1]
    embeddings, labels = whole_batch(rows)
    columns, ref_labels = whole_batch(refs, seed=1)
    weights = torch.rand(len(labels), dtype=torch.float64)
    whole, part = make(), make()
    x, y = (points.clone().requires_grad_() for points in (embeddings, columns))
    truth = whole(x, labels, None, y, ref_labels, weights)
    expected = torch.autograd.grad(truth, [x, y, *whole.parameters()])
    own = [share(x, rows).detach().requires_grad_(), share(y, refs).detach().requires_grad_()]
    value = DistributedLoss(part)(
        own[0], share(labels, rows), None, own[1], share(ref_labels, refs), share(weights, rows)
    )
    close(value.detach(), truth.detach(), name)
    found = gradients(value, [*own, *part.parameters()])
    close(found[0], share(expected[0], rows), name)
    close(found[1], share(expected[1], refs), name)
    for gradient, one in zip(found[2:], expected[2:], strict=True):
        close(total(gradient), one, f"{name}: a parameter")


def rankings_of_other_columns():
    """With a temperature that learns."""
    for name, loss in RANKINGS.items():

        def made(loss=loss):
            values = {key: torch.tensor(loss.smooth[key]).double() for key in loss.learnable}
            return loss.module(**{key: torch.nn.Parameter(value) for key, value in values.items()})

        as_one_process_of_other_columns(made, name)


def rankings_that_are_refused():
    embeddings, labels = whole_batch(UNEVEN[dist.get_world_size()])
    for loss in RANKINGS.values():
        module = DistributedLoss(loss.module(), mode="ring")
        raised(lambda module=module: module(embeddings, labels), ValueError, "mode", "ranking")


COMPOSED = {"lifted_structure": dml_cuda.LiftedStructureLoss, "ranked_list": dml_cuda.RankedListLoss}


def composed(name):
    for rows in layouts():
        for reduction in reductions(rows):
            make = partial(COMPOSED[name], reduction=reduction)
            as_one_process(make, "gather", rows, reduction == "none", dtypes=trials(rows))


def composed_of_other_columns():
    for name, make in COMPOSED.items():
        as_one_process_of_other_columns(make, name)


def composed_that_are_refused():
    embeddings, labels = whole_batch(UNEVEN[dist.get_world_size()])
    for make in COMPOSED.values():
        module = DistributedLoss(make(), mode="ring")
        raised(lambda module=module: module(embeddings, labels), ValueError, "mode")


OF_TRIPLETS = [
    (dml_cuda.TripletMarginLoss(), None),
    (dml_cuda.TripletMarginLoss(), dml_cuda.BatchHardMiner()),
]


def memory(mode):
    """The queue of every process is that of one process with the whole batch, as are loss and gradient."""
    size = dist.get_world_size()
    for loss, miner in (
        (MultiSimilarityLoss(epsilon=0.1), None),
        (MultiSimilarityLoss(), MultiSimilarityMiner(0.1)),
        (LOSSES["contrastive"].module(pos_margin=0.9, neg_margin=0.2), None),
        (LOSSES["nt_xent"].module(), None),
        *([] if mode == "ring" else OF_TRIPLETS),
        *([] if mode == "ring" else [(RANKINGS["smooth_ap"].module(temperature=0.2), None)]),
    ):
        for masked in (False, True):
            one = CrossBatchMemory(loss, DIM, 40, miner)
            own = CrossBatchMemory(DistributedLoss(loss, mode=mode), DIM, 40, miner)
            for step, rows in enumerate((*layouts(), EVEN[size])):
                embeddings, labels = whole_batch(rows, seed=step)
                mask = torch.arange(len(labels)) % 3 == 0
                masks = ({"enqueue_mask": m} if masked else {} for m in (mask, share(mask, rows)))
                expected = evaluate(one, embeddings, labels, **next(masks))
                found = evaluate(own, share(embeddings, rows), share(labels, rows), **next(masks))
                close(found[0], expected[0], "loss")
                close(found[1] / size, share(expected[1], rows), "gradient")
                for name, buffer in one.named_buffers():
                    assert torch.equal(own.get_buffer(name), buffer), name


# ---- what is refused --------------------------------------------------------------------------------------


def raised(call, type_, *words):
    with pytest.raises(type_) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def bad_input_on_one(mode):
    """The last process is given what cannot be: it says so, and so do all others."""
    last = dist.get_world_size() - 1
    rows = EVEN[last + 1]
    embeddings, labels = (share(x, rows) for x in whole_batch(rows))
    module = DistributedLoss(MultiSimilarityLoss(), mode=mode)
    bank = CrossBatchMemory(module, DIM)
    head = DistributedLoss(CircleClassifierLoss(9, DIM).double(), mode=mode)
    of_triplets = DistributedLoss(dml_cuda.TripletMarginLoss())
    for bad, error, words in (
        (lambda: module(BAD, labels), ValueError, ("embeddings", "[3]")),
        (lambda: module(embeddings, labels[1:]), ValueError, ("labels",)),
        (lambda: module(embeddings, None), ValueError, ("labels",)),
        (lambda: module(embeddings, labels, (labels,) * 3), ValueError, ("indices_tuple", "lists")),
        (lambda: bank(embeddings[:, 1:], labels), ValueError, ("embedding_size=7",)),
        (lambda: head(embeddings, labels + 9), ValueError, ("labels", "num_classes=9")),
        (
            lambda: of_triplets(embeddings, labels, (labels,) * 3),
            ValueError,
            ("indices_tuple", "lists cannot"),
        ),
    ):
        if rank() == last:
            raised(bad, error, *words)
        else:
            right = {"embedding_size=7": bank, "num_classes=9": head, "lists cannot": of_triplets}.get(
                words[-1], module
            )
            raised(partial(right, embeddings, labels), RuntimeError, f"process {last} of {last + 1}", *words)
    assert module(embeddings, labels).isfinite()  # and they go on


def what_must_be_the_same(mode):
    last = rank() == dist.get_world_size() - 1
    rows = EVEN[dist.get_world_size()]
    embeddings, labels = (share(x, rows) for x in whole_batch(rows))
    module = DistributedLoss(MultiSimilarityLoss(), mode=mode)
    other = DistributedLoss(MultiSimilarityLoss(base=0.3), mode=mode)
    columns = {"ref_emb": embeddings, "ref_labels": labels}

    def without_graph():
        with torch.no_grad() if last else contextlib.nullcontext():
            module(embeddings, labels)

    raised(lambda: (other if last else module)(embeddings, labels), ValueError, "options")
    raised(lambda: module(embeddings.float() if last else embeddings, labels), ValueError, "dtype")
    raised(lambda: module(embeddings[:, 1:] if last else embeddings, labels), ValueError, "columns")
    raised(lambda: module(embeddings, labels, **(columns if last else {})), ValueError, "ref_emb")
    raised(without_graph, ValueError, "no_grad")
    modes = dict(zip(MODES, reversed(MODES), strict=True))
    another = DistributedLoss(MultiSimilarityLoss(), mode=modes[mode])
    raised(lambda: (another if last else module)(embeddings, labels), ValueError, "mode", "same on every")
    bank = CrossBatchMemory(module, DIM, 64)
    mask = {"enqueue_mask": labels == 0}
    raised(lambda: bank(embeddings, labels, **(mask if last else {})), ValueError, "enqueue_mask")
    raised(lambda: CrossBatchMemory(module, DIM, 6)(embeddings, labels), ValueError, "memory_size=6")


def what_is_refused_everywhere(mode):
    rows = EVEN[dist.get_world_size()]
    embeddings, labels = (share(x, rows) for x in whole_batch(rows))
    miner = MultiSimilarityMiner(0.1)
    raised(lambda: DistributedLoss(nn.MSELoss()), TypeError, "loss", "MSELoss")
    raised(lambda: DistributedLoss(MultiSimilarityLoss(), mode="tree"), ValueError, "mode", "tree")
    raised(lambda: DistributedLoss(MultiSimilarityLoss(), miner=print), TypeError, "miner")
    twice = DistributedLoss(MultiSimilarityLoss(epsilon=0.1), mode=mode, miner=miner)
    raised(lambda: twice(embeddings, labels), ValueError, "miner")
    dot = DistributedLoss(MultiSimilarityLoss(similarity="dot"), mode=mode, miner=miner)
    raised(lambda: dot(embeddings, labels), ValueError, "miner", "similarity")
    module = DistributedLoss(MultiSimilarityLoss(), mode=mode)
    others = miner(embeddings.clone(), labels)
    raised(lambda: module(embeddings, labels, others), ValueError, "indices_tuple", "very")
    head = DistributedLoss(CircleClassifierLoss(9, DIM).double(), mode=mode)
    raised(lambda: head(embeddings, labels, (labels,) * 3), ValueError, "indices_tuple")
    if mode == "ring":
        plain = DistributedLoss(MultiSimilarityLoss(backend="reference"), mode=mode)
        raised(lambda: plain(embeddings, labels), ValueError, "ring", "reference")


def _table():
    checks = {}
    for mode in MODES:
        for name in LOSSES:
            for epsilon in (None, 0.1):
                key = f"{mode}: {name}, {'mined' if epsilon else 'all pairs'}"
                checks[key] = partial(every_reduction, name, epsilon, mode)
            checks[f"{mode}: {name}, other similarities"] = partial(every_similarity, name, mode)
        for check in (
            large,
            other_columns,
            short_types,
            one_label_each,
            second_derivatives_of_the_kernels,
            miners,
            repeatable,
            infinite,
            partly_differentiable,
            a_group_of_some,
            training_steps,
            sharded_training_steps,
            accumulation,
            autocast,
            memory,
            bad_input_on_one,
            what_must_be_the_same,
            what_is_refused_everywhere,
            learned_parameters,
            two_towers,
        ):
            checks[f"{mode}: {check.__name__}"] = partial(check, mode)
    for name, head in heads.HEADS.items():
        checks[name] = partial(class_level, head)
    for name in RANKINGS:
        checks[f"ranking: {name}"] = partial(rankings, name)
    for name in COMPOSED:
        checks[f"composed: {name}"] = partial(composed, name)
    for miner in TRIPLET_MINERS:
        checks[f"triplet margin, {miner}"] = partial(triplets, miner, dml_cuda.TripletMarginLoss)
        learnt = partial(dml_cuda.MarginLoss, nu=0.1, beta=1.0, learn_beta=True, num_classes=40)
        checks[f"margin, {miner}"] = partial(triplets, miner, learnt)
    checks["triplet margin per class"] = partial(triplets, "all", margin_per_class)
    for check in (
        triplets_of_other_columns,
        triplets_that_are_refused,
        rankings_of_other_columns,
        rankings_that_are_refused,
        composed_of_other_columns,
        composed_that_are_refused,
        the_reference_backend,
        second_derivatives_of_the_reference,
        a_compiled_step,
    ):
        checks[check.__name__] = check
    return checks


CHECKS = _table()
FEW_FORMULAS = ("multi_similarity", "contrastive", "nt_xent")  # of every kind one
# What depends on how many processes there are: who holds which rows, and when a block has gone around.
OF_ANY_SIZE = (large, other_columns, repeatable, memory, a_group_of_some)


def checks_of(size):
    """The names of the checks for so many processes: every formula with three, one of each kind with two, and
    with four, the least even number whose ring has a way between, what depends on the number."""
    few = [f"{mode}: {name}, " for mode in MODES for name in FEW_FORMULAS]
    others = [f"{mode}: {name}, " for mode in MODES for name in LOSSES if name not in FEW_FORMULAS]
    if size == 4:
        few += [f"{mode}: {check.__name__}" for mode in MODES for check in OF_ANY_SIZE]
        return [name for name in CHECKS if name.startswith(tuple(few))]
    return [name for name in CHECKS if size == 3 or not name.startswith(tuple(others))]


def main(rank_, size, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank_, world_size=size, timeout=TIMEOUT)
    results = {}
    only = os.environ.get("DML_CHECK", "")
    for name in checks_of(size):
        if only not in name:
            continue
        torch.manual_seed(0)
        try:
            CHECKS[name]()
        except BaseException:
            results[name] = traceback.format_exc()
            break  # the processes no longer do the same
        results[name] = ""
    Path(folder, f"{rank_}.json").write_text(json.dumps(results))
    # Without the interpreter's own end, at which a thread of gloo's that is still there aborts the process.
    os._exit(0)


if __name__ == "__main__":
    assert dml_cuda
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
