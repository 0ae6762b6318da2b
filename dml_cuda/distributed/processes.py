"""The processes of a group, and what they tell each other.

Rows may be of different number on different processes, and none. Sums are made in the order of the processes,
so that every process gets the same bits.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")

# Their names until PyTorch 2.12, and since.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def total(rows: Sequence[int], before: int | None = None) -> int:
    """How many rows all processes have, or those ``before`` a process."""
    return sum(rows[:before])


class Processes:
    """The processes of a group; one alone where there is no group.

    Attributes:
        group: of torch.distributed, or ``None`` for all processes.
        size, rank: how many they are, and which of them this is.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None) -> None:
        self.group = group
        there = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size(group) if there else 1
        self.rank = dist.get_rank(group) if there else 0
        if self.rank < 0:
            raise ValueError("group: expected a group that this process belongs to")
        if self.size > 1 and torch.jit.is_tracing():
            raise RuntimeError(
                "torch.jit.trace cannot record what several processes tell each other: trace the loss inside "
                "of DistributedLoss"
            )

    def _word_device(self) -> torch.device:
        """Where a few numbers travel: without waiting for a GPU where the group has a backend for CPUs."""
        on_cpu = any(part.startswith("cpu:") for part in dist.get_backend_config(self.group).split(","))
        return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())

    def gather_equal(self, own: Tensor) -> Tensor:
        """``[size, ...]`` of a tensor that has the same shape on every process."""
        if self.size == 1:
            return own[None]
        everyone = own.new_empty(self.size * own.numel())
        _all_gather(everyone, own.contiguous().view(-1), group=self.group)
        return everyone.view(self.size, *own.shape)

    def agree(
        self, prepare: Callable[[], tuple[Result, dict[str, int]]]
    ) -> tuple[Result, dict[str, list[int]]]:
        """What ``prepare`` returns: a result, which stays here, and words, of which all processes get all.

        Where it raises on one process, it raises on all: its own error there, on the others a RuntimeError
        that repeats it. So none waits for another that has given up.
        """
        if self.size == 1:
            result, words = prepare()
            return result, {name: [word] for name, word in words.items()}
        error = result = None
        words: dict[str, int] = {}
        try:
            result, words = prepare()
        except Exception as raised:
            error = raised
        numbers = torch.zeros(_MOST_WORDS + 1, dtype=torch.long, device=self._word_device())
        numbers[: len(words) + 1] = torch.tensor([error is not None, *words.values()], device=numbers.device)
        failed, *columns = self.gather_equal(numbers).T.tolist()
        if any(failed):
            self._raise(error)
        return result, dict(zip(words, columns, strict=False))

    def _raise(self, error: Exception | None) -> None:
        messages: list[str | None] = [None] * self.size
        own = None if error is None else f"{type(error).__name__}: {error}"
        dist.all_gather_object(messages, own, group=self.group)
        if error is not None:
            raise error
        rank, message = next((k, text) for k, text in enumerate(messages) if text is not None)
        raise RuntimeError(f"process {rank} of {self.size} raised {message}")

    def gather_rows(self, own: Tensor, rows: Sequence[int]) -> Tensor:
        """``[sum(rows), ...]`` all rows in the order of the processes; ``own`` ``[rows[rank], ...]``."""
        own = own.detach()
        most = max(rows)
        if most == 0:
            return own
        if min(rows) == most:
            return self.gather_equal(own).flatten(0, 1)
        everyone = self.gather_equal(padded(own, most))
        return torch.cat([part[:count] for part, count in zip(everyone, rows, strict=True)])

    def sum_to_owners(self, everyone: Tensor, rows: Sequence[int]) -> Tensor:
        """``[rows[rank], ...]`` the sum over the processes of what each has for this one's rows.

        ``everyone`` ``[sum(rows), ...]``. The way back of :meth:`gather_rows`. Short types are summed in
        float32.
        """
        most = max(rows)
        if most == 0 or self.size == 1:
            return everyone
        dtype = everyone.dtype
        everyone = everyone if dtype == torch.float64 else everyone.float()
        if min(rows) < most:
            everyone = torch.cat([padded(part, most) for part in everyone.split(list(rows))])
        own = everyone.new_empty(most, *everyone.shape[1:])
        _reduce_scatter(own, everyone.contiguous(), group=self.group)
        return own[: rows[self.rank]].to(dtype)

    def sum(self, own: Tensor) -> Tensor:
        """The sum over the processes of a few numbers."""
        return own if self.size == 1 else self.gather_equal(own).sum(0)

    def global_rank(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


_MOST_WORDS = 12


def padded(x: Tensor, rows: int) -> Tensor:
    """``[rows, ...]``, zeros after those of ``x``."""
    if x.shape[0] == rows:
        return x
    return torch.cat([x, x.new_zeros(rows - x.shape[0], *x.shape[1:])])


class GatherRows(torch.autograd.Function):
    """:meth:`Processes.gather_rows`; backward, :meth:`Processes.sum_to_owners`.

    As with every collective operation here, what comes back on each process is the gradient of the sum of all
    processes' results.
    """

    @staticmethod
    def forward(own, processes, rows):
        return processes.gather_rows(own, rows)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.where = inputs[1:]

    @staticmethod
    def backward(ctx, grad):
        return SumToOwners.apply(grad, *ctx.where), None, None


class SumToOwners(torch.autograd.Function):
    """The gradient of :class:`GatherRows`, and it of this."""

    @staticmethod
    def forward(everyone, processes, rows):
        return processes.sum_to_owners(everyone, rows)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.where = inputs[1:]

    @staticmethod
    def backward(ctx, grad):
        return GatherRows.apply(grad, *ctx.where), None, None


class Sum(torch.autograd.Function):
    """:meth:`Processes.sum`, whose gradient is of the same kind."""

    @staticmethod
    def forward(own, processes):
        return processes.sum(own)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.processes = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return Sum.apply(grad, ctx.processes), None


def gathered(own: Tensor, processes: Processes, rows: Sequence[int]) -> Tensor:
    """:class:`GatherRows`, which is nothing where there is one process."""
    return own if processes.size == 1 else GatherRows.apply(own, processes, rows)


def summed(own: Tensor, processes: Processes) -> Tensor:
    """:class:`Sum`, which is nothing where there is one process."""
    return own if processes.size == 1 else Sum.apply(own, processes)
