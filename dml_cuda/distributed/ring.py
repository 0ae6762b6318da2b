"""Rows against the columns of all processes, one block at a time; no process holds all columns.

The blocks go around: in every step each process computes with one block while the next is on its way from the
process before. So a process meets the blocks in the order of the ring, its own first: forward once for each
stage of the formula, and backward once more, when each block's gradient travels with it.

On GPUs there is no host synchronisation. A transfer starts, on NCCL's stream, when the computation launched
before it is done, and overlaps with the computation launched after it; waiting for it blocks the current
stream, not the host. Tensors that travel are held until the current stream waits for their transfer, so that
their memory is not reused earlier.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _C
from .._inputs.batch import Batch
from .._ops.arguments import OpBatch, OpOptions, precision_for
from .._ops.autograd import first_derivative
from .._ops.devices import has_kernel
from .._ops.evaluate import Call, device_of_params
from .processes import Processes, padded, total

_BLOCK, _GRADIENT = 1, 2  # tags of what is sent
# Bytes, of all blocks together, of what the first stage finds in them, which saves later stages work.
_MOST_FOUND = 64 << 20
_OPS = torch.ops.dml_cuda
_stages = _C.ring_stages


def check(call: Call, batch: Batch) -> None:
    """Raises an error for what only the gathering mode does."""
    if call.formula.ranks:
        raise ValueError(
            'mode: expected "gather" with a ranking loss, whose rows need all columns at once; got "ring"'
        )
    if call.options.backend == "reference":
        raise ValueError('mode: expected "gather" with backend="reference", got "ring"')
    if call.formula.composed:
        raise ValueError(f'mode: expected "gather" with the formula {call.formula.name}, got "ring"')
    device = batch.embeddings.device
    if not has_kernel(device):
        raise ValueError(f'mode: expected "gather" where there is no kernel for {device.type}, got "ring"')
    if device.type == "cuda" and not call.formula.on_cuda:
        raise ValueError(
            f'mode: expected "gather" with a formula that was loaded without CUDA kernels, got "ring" on '
            f"{device}"
        )


class _Transfer(NamedTuple):
    """A transfer under way, and the tensor that must stay until it is done."""

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

    def pass_on(self, sent: Tensor, tag: int) -> tuple[Tensor, _Transfer]:
        """Sends a tensor to the next process. Returns the tensor of the previous process, and the transfer to
        wait for before that is read or ``sent`` is written to."""
        if self.processes.size == 1 or sent.numel() == 0:
            return sent, _Transfer()
        received = torch.empty_like(sent)
        group = self.processes.group
        sides = (dist.isend, sent, self.next), (dist.irecv, received, self.previous)
        # NCCL goes by the current device.
        with torch.cuda.device(sent.device) if sent.is_cuda else contextlib.nullcontext():
            work = dist.batch_isend_irecv([dist.P2POp(*side, group=group, tag=tag) for side in sides])
        return received, _Transfer(work, sent)


class _Blocks(NamedTuple):
    """The columns of all processes; each process holds its own."""

    own: Tensor  # [largest, D], zeros after this process's columns
    labels: Tensor  # [M] of all
    counts: list[int]  # of each process
    self_index: Tensor | None  # [N] the column, of this process's, that a row is itself
    ring: _Ring

    def around(self, embeddings: Tensor, labels: Tensor) -> Iterator[tuple[int, OpBatch]]:
        """Each block as the references of these rows, with the process that owns it; the next one is on its
        way meanwhile."""
        block, following, transfer = self.own, self.own, _Transfer()
        size, rank = self.ring.processes.size, self.ring.processes.rank
        for step in range(size):
            transfer.wait()
            block, transfer = following, _Transfer()
            if step + 1 < size:
                following, transfer = self.ring.pass_on(block, _BLOCK)
            owner = (rank - step) % size
            columns = slice(total(self.counts, owner), total(self.counts, owner + 1))
            self_index = self.self_index if step == 0 else None
            block_labels = self.labels[columns]
            yield (
                owner,
                OpBatch(embeddings, labels, block[: self.counts[owner]], block_labels, self_index, None),
            )


def _counts_of_pairs(labels: Tensor, blocks: _Blocks) -> Tensor:
    """``[2, N]`` how many positives and negatives each row has."""
    ascending = blocks.labels.sort().values
    same = torch.searchsorted(ascending, labels, right=True) - torch.searchsorted(ascending, labels)
    self_pairs = 0 if blocks.self_index is None else 1
    return torch.stack([same - self_pairs, len(ascending) - same])


class _PairLoss(torch.autograd.Function):
    """``[4]`` parts and counts of this process's rows; or, with reduction "none", their losses ``[N]``. The
    other results are for backward: of the rows, and what was found in the block of each process.

    ``dynamic_params`` are those of the options, as an argument of their own because they may learn.
    """

    @staticmethod
    def forward(embeddings, refs, dynamic_params, labels, row_weights, blocks, options):
        pairs = _counts_of_pairs(labels, blocks)
        is_double = embeddings.dtype == torch.float64
        state = _OPS.pair_block_turn(*options, None, pairs, "start", is_double)
        found: dict[int, Tensor] = {}  # of each block
        for stage in _stages(embeddings.device.type, options.formula, options.epsilon is not None):
            size = 0
            for owner, batch in blocks.around(embeddings, labels):
                state, found[owner] = _OPS.pair_block(*batch, *options, state, stage, found.get(owner))
                size += found[owner].numel()
                if stage == "hardest" and size > _MOST_FOUND:
                    del found[owner]
            state = _OPS.pair_block_turn(*options, state, pairs, stage, is_double)
        losses, weights = _OPS.pair_block_rows(*options, state, pairs)
        if row_weights is not None:
            losses[:2] *= row_weights
        value = losses.double().sum(1).to(losses.dtype) if options.return_sums else losses[:2].sum(0)
        return value, weights, losses[:2].sum().isnan(), *(found[owner] for owner in range(len(found)))

    @staticmethod
    def setup_context(ctx, inputs, output):
        embeddings, refs, dynamic_params, labels, row_weights, blocks, options = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(embeddings, refs, dynamic_params, labels, row_weights, blocks.own, *output[1:])
        # Its own block is among the saved tensors, and must not be held twice.
        ctx.blocks, ctx.options = blocks._replace(own=None), options._replace(dynamic_params=None)
        ctx.is_square = refs is None

    @staticmethod
    def backward(ctx, grad, *_):
        saved = ctx.saved_tensors
        with torch.no_grad():
            grads = _PairLoss._gradients(ctx, grad, *saved)
        grads = [None if x is None else first_derivative(x, grad, *saved[:3]) for x in grads]
        return *grads, *(None,) * 4

    @staticmethod
    def _gradients(
        ctx, grad, embeddings, refs, dynamic_params, labels, row_weights, own, weights, has_nan, *kept
    ):
        blocks = ctx.blocks._replace(own=own)
        options, ring = ctx.options._replace(dynamic_params=dynamic_params), blocks.ring
        need_params, grad_params = ctx.needs_input_grad[2], None
        rows = embeddings.shape[0]
        grad_parts = (grad[:2, None] if options.return_sums else grad).expand(2, rows)
        grad_parts = grad_parts.to(weights.dtype).contiguous()
        if row_weights is not None:
            grad_parts = grad_parts * row_weights.to(weights.dtype)
        nan = torch.where(has_nan, float("nan"), 0.0).to(weights.dtype)
        grad_rows = torch.zeros_like(embeddings, dtype=weights.dtype)
        arriving, transfer = torch.zeros_like(own, dtype=weights.dtype), _Transfer()
        for owner, batch in blocks.around(embeddings, labels):
            is_own = owner == ring.processes.rank  # the first
            by_rows, by_block, by_params = _OPS.pair_block_backward(
                *batch, *options, grad_parts, weights, kept[owner], True, True, need_params, is_own
            )
            grad_rows += by_rows
            grad_params = by_params if is_own else grad_params + by_params
            transfer.wait()  # for the gradient of this block from the processes before
            arriving[: len(by_block)] += by_block.add_(nan)
            arriving, transfer = ring.pass_on(arriving, _GRADIENT)
        transfer.wait()
        home = arriving[: blocks.counts[ring.processes.rank]]
        grad_rows += nan
        by_refs = None
        if ctx.is_square:
            grad_rows.add_(home)
        else:
            by_refs = home.to(embeddings.dtype)
        return grad_rows.to(embeddings.dtype), by_refs, grad_params + nan if need_params else None


def compute(call: Call, batch: Batch, processes: Processes, rows: list[int], refs: list[int]) -> Tensor:
    """As ``_ops.evaluate.compute``, without the columns of all processes in one place."""
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
    options: OpOptions = call.op_options._replace(
        epsilon=batch.epsilon, mine_self_pair=False, precision=precision_for(batch.embeddings)
    )
    if call.learns:
        options = options.with_dynamic_params(device_of_params(batch.embeddings))
    rows = batch.labels, batch.row_weights
    points = batch.embeddings, batch.ref_emb
    return _PairLoss.apply(*points, options.dynamic_params, *rows, blocks, options)[0]
