"""Every miner with every loss on batches that lack almost everything, as a process of its own.

    python degenerate_batches.py NUMBER OF

tries every OF-th case from NUMBER on, and writes the cases that fail. A crash names the last batch.
"""

import faulthandler
import itertools
import sys

import torch

import dml_cuda

DIM = 4
LABELS = {
    "one class": lambda n: torch.zeros(n),
    "all distinct": torch.arange,
    "pairs": lambda n: torch.arange(n) // 2,
}
SIZES, REFERENCES = (0, 1, 2, 5), (None, 0, 1, 3)


def batches():
    for n, (kind, labels_of), m in itertools.product(SIZES, LABELS.items(), REFERENCES):
        if n < 2 and m is None and kind != "one class":
            continue  # the same batch again
        random = torch.Generator().manual_seed(100 * n + (9 if m is None else m))
        x = torch.randn(n, DIM, generator=random, dtype=torch.float64)
        refs = [None, None]
        if m is not None:
            refs = [torch.randn(m, DIM, generator=random, dtype=torch.float64), labels_of(m).long()]
        yield f"{n} rows, {kind}, {'no' if m is None else m} references", (x, labels_of(n).long(), *refs)


def miners():
    """By name, each with whether it draws."""
    yield "no miner", None, False
    yield "MultiSimilarityMiner", dml_cuda.MultiSimilarityMiner(0.1), False
    yield "BatchHardMiner", dml_cuda.BatchHardMiner(collect_stats=True), False
    for positives, negatives in (
        ("easy", "semihard"),
        ("semihard", "hard"),
        ("all", "easy"),
        ("hard", "all"),
    ):
        miner = dml_cuda.BatchEasyHardMiner(positives, negatives, collect_stats=True)
        yield f"BatchEasyHardMiner {positives} {negatives}", miner, False
    for kind in ("all", "easy"):
        yield f"TripletMarginMiner {kind}", dml_cuda.TripletMarginMiner(0.2, kind, collect_stats=True), False
    yield "PairMarginMiner", dml_cuda.PairMarginMiner(collect_stats=True), False
    yield "DistanceWeightedMiner", dml_cuda.DistanceWeightedMiner(), True


def losses():
    """By name, a function of the options, and whether it draws."""
    for name in ("MultiSimilarityLoss", "ContrastiveLoss", "NTXentLoss", "SupConLoss", "CircleLoss"):
        yield name, getattr(dml_cuda, name), False
    for swap, smooth, number in itertools.product((False, True), (False, True), ("all", 1)):
        settings = {"swap": swap, "smooth_loss": smooth, "triplets_per_anchor": number}
        yield (
            f"TripletMarginLoss {settings}",
            lambda settings=settings, **options: dml_cuda.TripletMarginLoss(**settings, **options),
            number != "all",
        )
    yield "MarginLoss", dml_cuda.MarginLoss, False


def gradients(loss_fn, x, labels, refs, ref_labels, pairs):
    """The loss, and its gradient by the rows and by the references."""
    leaves = [p.clone().requires_grad_() for p in (x, refs) if p is not None]
    value = loss_fn(leaves[0], labels, pairs, *([leaves[1], ref_labels] if refs is not None else []))
    upstream = torch.ones_like(value)
    return [
        value.detach(),
        *torch.autograd.grad(value, leaves, upstream, allow_unused=True, materialize_grads=True),
    ]


def mined(miner, listed, x, labels, refs, ref_labels):
    if miner is None:
        return None
    pairs = miner(x, labels) if refs is None else miner(x, labels, refs, ref_labels)
    counts = miner.num_pos_pairs, miner.num_neg_pairs, miner.num_triplets
    lists = list(pairs)
    expected = (0, 0, len(lists[0])) if len(lists) == 3 else (len(lists[0]), len(lists[2]), 0)
    assert counts == expected, f"counted {counts}, listed {expected}"
    return (
        tuple(lists) if listed else miner(x, labels) if refs is None else miner(x, labels, refs, ref_labels)
    )


def check(batch, miner, miner_draws, listed, make, loss_draws, reduction):
    torch.manual_seed(0)
    pairs = mined(miner, listed, *batch)
    found = gradients(make(reduction=reduction), *batch, pairs)
    assert all(bool(x.isfinite().all()) for x in found), f"found {found}"
    rows = batch[0].shape[0]
    assert found[0].shape == ((rows,) if reduction == "none" else ()), f"shape {list(found[0].shape)}"
    if loss_draws or (miner_draws and not listed):
        return
    expected = gradients(make(reduction=reduction, backend="reference"), *batch, pairs)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9), f"found {one}, the reference {other}"


def main(number, of):
    faulthandler.enable()
    failed = []
    cases = itertools.product(batches(), miners(), (False, True), losses(), ("mean", "mean_nonzero", "none"))
    last = None
    for (name, batch), (mining, miner, miner_draws), listed, (
        loss,
        make,
        loss_draws,
    ), reduction in itertools.islice(cases, number, None, of):
        if miner is None and listed:
            continue
        if name != last:
            print(name, flush=True)
            last = name
        case = f"{name}: {mining}{', listed' if listed else ''}; {loss}, {reduction}"
        try:
            check(batch, miner, miner_draws, listed, make, loss_draws, reduction)
        except Exception as error:
            failed.append(f"{case}: {type(error).__name__}: {error}")
    print("\n".join(failed[:200]), file=sys.stderr)
    print(len(failed), "failed", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
