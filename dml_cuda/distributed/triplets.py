"""Losses of triplets over several processes: each its own rows against the columns of all."""

import torch
from torch import Tensor

from .._ops.evaluate import in_wanted_dtype
from .._ops.triplets import Rows
from ..losses._triplet import TripletBatch, TripletLoss, triplet_batch
from ..miners.mined import Mined
from .processes import Processes, gathered, summed, total

# What csrc/core/triplets.h adds to a seed for each row.
_ROW = 0x9E3779B97F4A7C15


def share(
    loss: TripletLoss,
    embeddings: Tensor,
    labels: Tensor,
    indices_tuple: object,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
) -> TripletBatch:
    """This process's rows, and the rule by which triplets of the whole batch are selected."""
    if loss.call.swap:
        raise ValueError("loss: expected swap=False on several processes")
    if loss.call.per_anchor is not None:
        raise ValueError('loss: expected triplets_per_anchor="all" on several processes')
    if indices_tuple is not None and not isinstance(indices_tuple, Mined):
        raise ValueError(
            "indices_tuple: expected None or what a miner of dml_cuda found, got "
            f"{type(indices_tuple).__name__}: lists cannot name the rows of other processes"
        )
    batch = triplet_batch(loss.call, embeddings, labels, indices_tuple, ref_emb, ref_labels)
    if batch.selection is None:
        raise ValueError(
            "indices_tuple: expected what the kernel can select of these very embeddings, by the similarity "
            "of the loss: anything else would be listed, and lists cannot name the rows of other processes"
        )
    return batch


def _seed(seeds: list[int], first: int, device: torch.device) -> Tensor:
    """The first process's, for rows of which so many are before this process's own."""
    of_first_row = (seeds[0] + _ROW * first) % 2**64
    return torch.tensor([of_first_row - 2**64 * (of_first_row >= 2**63)], device=device)


def _with_all_columns(rows: Rows, processes: Processes, words: dict[str, list[int]]) -> Rows:
    count, device = words["rows"], rows.labels.device
    if rows.ref_emb is not None:
        return rows._replace(
            ref_emb=gathered(rows.ref_emb, processes, words["refs"]),
            ref_labels=processes.gather_rows(rows.ref_labels.long(), words["refs"]),
        )
    first = total(count, processes.rank)
    return rows._replace(
        ref_emb=gathered(rows.embeddings, processes, count),
        ref_labels=processes.gather_rows(rows.labels.long(), count),
        self_index=torch.arange(first, first + count[processes.rank], device=device),
    )


def compute(
    loss: TripletLoss, batch: TripletBatch, processes: Processes, words: dict[str, list[int]], same: bool
) -> Tensor:
    """The loss of the whole batch. ``same``: the columns are those of all processes already."""
    rows = batch.rows
    embeddings, ref_emb = rows.embeddings, rows.ref_emb
    # Where one process wants a gradient all must take part in making it.
    if any(words["emb_grad"]) and not embeddings.requires_grad:
        rows = rows._replace(embeddings=embeddings.detach().requires_grad_())
    if any(words["ref_grad"]) and not ref_emb.requires_grad and not same:
        rows = rows._replace(ref_emb=ref_emb.detach().requires_grad_())
    seed = batch.seed
    if seed is not None:
        seed = _seed(words["seed"], total(words["rows"], processes.rank), embeddings.device)
    if not same:
        rows = _with_all_columns(rows, processes, words)
    sums, counts, more = loss.row_parts(batch._replace(rows=rows, seed=seed))
    if loss.reduction == "none":
        return in_wanted_dtype(sums, embeddings)
    parts = [sums.double().sum(), *([] if more is None else [more.double().sum()])]
    totals = summed(torch.stack(parts), processes)
    value = loss.whole(totals[0], processes.sum(counts.sum(0)), None if more is None else totals[1])
    return in_wanted_dtype(value, embeddings)
