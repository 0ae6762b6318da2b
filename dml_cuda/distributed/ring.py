"""Rows against the columns of all processes, a block at a time, none of which anybody keeps.

The blocks go around: in every step each process computes with one block while the next is on its way to it
from the process before. So a process meets the blocks in the order of the ring, its own first, forward once
for each stage of the formula, and backward once more, when each block's gradient travels with it.

On GPUs nothing here waits for the device. A transfer starts, on NCCL's stream, once the computation that was
launched before it is done, so it runs beside that which is launched after it; waiting for it makes the
current stream wait, not the host. Tensors that travel are held until the current stream waits for their
transfer, so that their memory is taken for nothing else before.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .._inputs.batch import Batch
from .._ops.devices import has_kernel
from .._ops.registration import stages
from ..losses._pair import Call
from .processes import Processes, padded, total

_BLOCK, _GRADIENT = 1, 2  # tags of what is sent
# What the first stage finds in blocks spares later ones work; of all of them together so much is kept.
_MOST_FOUND = 64 << 20
_OPS = torch.ops.dml_cuda


def check(call: Call, batch: Batch) -> None:
    """Raises an error for what only the gathering mode does."""
    if call.options.backend == "reference":
        raise ValueError('mode: expected "gather" with backend="reference", got "ring"')
    device = batch.embeddings.device
    if not has_kernel(device):
        raise ValueError(f'mode: expected "gather" where there is no kernel for {device.type}, got "ring"')
    if device.type == "cuda" and not call.formula.on_cuda:
        raise ValueError(
            f'mode: expected "gather" with a formula that was loaded without CUDA kernels, got "ring" on '
            f"{device}"
        )


class _Transfer(NamedTuple):
    """What is under way, and what must stay where it is until it is there."""

    works: Sequence[dist.Work] = ()
    sent: Tensor | None = None

    def wait(self) -> None:
        for work in self.works:
            work.wait()


class _Ring:
    """What travels around a ring: tensors of one shape."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        size, rank = processes.size, processes.rank
        self.next = processes.global_rank((rank + 1) % size)
        self.previous = processes.global_rank((rank - 1) % size)

    def pass_on(self, own: Tensor, tag: int) -> tuple[Tensor, _Transfer]:
        """Sends a tensor to the next process. Returns where that of the previous will be, and what to wait
        for until it is there and ``own`` may be written to."""
        if self.processes.size == 1 or own.numel() == 0:
            return own, _Transfer()
        received = torch.empty_like(own)
        group = self.processes.group
        sides = (dist.isend, own, self.next), (dist.irecv, received, self.previous)
        # NCCL goes by the current device.
        with torch.cuda.device(own.device) if own.is_cuda else contextlib.nullcontext():
            work = dist.batch_isend_irecv([dist.P2POp(*side, group=group, tag=tag) for side in sides])
        return received, _Transfer(work, own)


class _Blocks(NamedTuple):
    """The columns of all processes, of which each holds its own."""

    own: Tensor  # [largest, D], zeros after this process's columns
    labels: Tensor  # [M] of all
    counts: list[int]  # of each process
    self_index: Tensor | None  # [N] the column, of this process's, that a row is itself
    ring: _Ring

    def around(self) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor | None]]]:
        """Process, and columns, labels and self_index, of every block, the next on its way meanwhile."""
        block, following, transfer = self.own, self.own, _Transfer()
        size, rank = self.ring.processes.size, self.ring.processes.rank
        for step in range(size):
            transfer.wait()
            block, transfer = following, _Transfer()
            if step + 1 < size:
                following, transfer = self.ring.pass_on(block, _BLOCK)
            owner = (rank - step) % size
            columns = slice(total(self.counts, owner), total(self.counts, owner + 1))
            own = self.self_index if step == 0 else None
            yield owner, (block[: self.counts[owner]], self.labels[columns], own)


def _counts_of_pairs(labels: Tensor, blocks: _Blocks) -> Tensor:
    """``[2, N]`` how many positives and negatives each row has."""
    ascending = blocks.labels.sort().values
    same = torch.searchsorted(ascending, labels, right=True) - torch.searchsorted(ascending, labels)
    own = 0 if blocks.self_index is None else 1
    return torch.stack([same - own, len(ascending) - same])


class _PairLoss(torch.autograd.Function):
    """``[4]`` parts and counts of this process's rows; or, with reduction "none", their losses ``[N]``."""

    @staticmethod
    def forward(ctx, embeddings, refs, labels, blocks, call, epsilon):
        formula, params, reduction = call.formula.name, call.params, call.options.reduction
        pairs = _counts_of_pairs(labels, blocks)
        wide = embeddings.dtype == torch.float64
        state = _OPS.pair_block_turn(None, pairs, formula, params, epsilon, "start", wide)
        found: dict[int, Tensor] = {}  # of each block
        for stage in stages(formula, epsilon is not None, embeddings.device.type):
            size = 0
            for owner, block in blocks.around():
                how = formula, params, epsilon, call.similarity, reduction, stage, found.get(owner)
                state, found[owner] = _OPS.pair_block(state, embeddings, labels, *block, *how)
                size += found[owner].numel()
                if stage == "hardest" and size > _MOST_FOUND:
                    del found[owner]
            state = _OPS.pair_block_turn(state, pairs, formula, params, epsilon, stage, wide)
        losses, weights = _OPS.pair_block_rows(state, pairs, formula, params, epsilon is not None, reduction)
        ctx.save_for_backward(
            embeddings, labels, weights, losses[:2].sum().isnan(), blocks.own, *found.values()
        )
        # The block is saved above: what is kept of the others must not hold it.
        ctx.where, ctx.call = (blocks._replace(own=None), list(found)), call
        ctx.is_square = refs is None
        return losses[:2].sum(0) if reduction == "none" else losses.double().sum(1).to(losses.dtype)

    @staticmethod
    def backward(ctx, grad):
        embeddings, labels, weights, has_nan, own, *kept = ctx.saved_tensors
        blocks, owners = ctx.where
        blocks, kept = blocks._replace(own=own), dict(zip(owners, kept, strict=True))
        call, ring = ctx.call, blocks.ring
        rows = embeddings.shape[0]
        above = (grad if call.divide else grad[:2, None]).expand(2, rows)
        above = above.to(weights.dtype).contiguous()
        nan = torch.where(has_nan, float("nan"), 0.0).to(weights.dtype)
        how = call.formula.name, call.params, call.similarity, True, True
        grad_rows = torch.zeros_like(embeddings, dtype=weights.dtype)
        arriving, transfer = torch.zeros_like(own, dtype=weights.dtype), _Transfer()
        for owner, block in blocks.around():
            by_rows, by_block = _OPS.pair_block_backward(
                above, weights, kept[owner], embeddings, labels, *block, *how
            )
            grad_rows += by_rows
            transfer.wait()  # until what the processes before have added to this block's gradient is here
            arriving[: len(by_block)] += by_block.add_(nan)
            arriving, transfer = ring.pass_on(arriving, _GRADIENT)
        transfer.wait()
        home = arriving[: blocks.counts[ring.processes.rank]]
        grad_rows += nan
        dtype = embeddings.dtype
        if ctx.is_square:
            return grad_rows.add_(home).to(dtype), *(None,) * 5
        return grad_rows.to(dtype), home.to(dtype), *(None,) * 4


def compute(call: Call, batch: Batch, processes: Processes, rows: list[int], refs: list[int]) -> Tensor:
    """As losses.base.compute, without the columns of all processes in one place."""
    columns, counts, self_index = batch.ref_emb, refs, None
    labels = batch.ref_labels
    if columns is None:
        columns, counts, labels = batch.embeddings, rows, batch.labels
        self_index = torch.arange(len(columns), device=columns.device)
    blocks = _Blocks(
        padded(columns.detach(), max(counts)).contiguous(),
        processes.gather_rows(labels.long(), counts),
        counts,
        self_index,
        _Ring(processes),
    )
    return _PairLoss.apply(batch.embeddings, batch.ref_emb, batch.labels, blocks, call, batch.epsilon)
