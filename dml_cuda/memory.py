"""Cross-batch memory: a loss of each batch against a queue of recent embeddings."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._inputs.checks import check_batch, check_count
from ._inputs.indices import index_lists, listed_pairs
from .distributed import DistributedLoss
from .losses._pair import PairLoss
from .losses._ranking import RankingLoss
from .losses._triplet import TripletLoss, to_triplets
from .losses.margin import MarginLoss
from .miners.mined import Mined
from .miners.mined_pairs import mined_pairs
from .miners.pairs import Miner, MultiSimilarityMiner


def _applies_rules(loss: object) -> bool:
    """Whether a loss applies mining rules and their ``num_valid_refs``, which skips empty queue slots."""
    loss = getattr(loss, "_orig_mod", loss)  # the module that torch.compile wraps
    if isinstance(loss, DistributedLoss):
        return True
    for kind in (PairLoss, RankingLoss, TripletLoss, MarginLoss):
        if isinstance(loss, kind) and type(loss).forward is kind.forward:
            return True
    is_fused = getattr(loss, "is_fused", None)  # the adapters of dml_cuda.pml
    return is_fused is not None and is_fused()


class CrossBatchMemory(nn.Module):
    """Compares each batch with a queue of the latest embeddings, which includes the batch itself.

    Wang et al., *Cross-Batch Memory for Embedding Learning*, CVPR 2020. The results are those of
    pytorch-metric-learning's class: the batch enters the queue first, a miner compares the batch with the
    whole queue, and a row is not paired with its own copy. With a miner and a loss of dml_cuda no indices and
    no batch x queue matrix are materialised.

    Args:
        loss: a module called as ``loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)``: one of
            dml_cuda, or any pair loss of pytorch-metric-learning. With
            :class:`dml_cuda.distributed.DistributedLoss` the batches of all processes enter every process's
            queue in the same order, so the queue equals that of one process with the whole batch.
        embedding_size: D.
        memory_size: capacity of the queue, in embeddings; at least a batch.
        miner: called as ``miner(embeddings, labels, ref_emb, ref_labels)``; ``None`` for every pair, or if
            the loss mines by its ``epsilon``.

    Attributes:
        embedding_memory: ``[memory_size, D]`` buffer, in the dtype of the latest embeddings.
        label_memory: ``[memory_size]`` int64 buffer.
        position: int64 scalar buffer, the slot of the next embedding.
        count: int64 scalar buffer, how many embeddings the queue holds.

    All state is in buffers, so ``state_dict`` saves it, and one compiled or captured graph serves while the
    queue fills up. A ``state_dict`` of pytorch-metric-learning's class loads too. It lacks a write position:
    non-zero rows count as filled, and writing to a full queue starts at its first slot.

    ``loss``, ``miner``, ``embedding_size`` and ``memory_size`` can be set. A new ``memory_size`` keeps the
    latest embeddings, a new ``embedding_size`` none.

    >>> memory = CrossBatchMemory(MultiSimilarityLoss(), 128, 4096, MultiSimilarityMiner(0.1))
    >>> loss = memory(embeddings, labels)
    """

    loss: Callable[..., Any]
    miner: Callable[..., Any] | None
    embedding_memory: Tensor
    label_memory: Tensor
    position: Tensor
    count: Tensor

    def __init__(
        self,
        loss: Callable[..., Any],
        embedding_size: int,
        memory_size: int = 1024,
        miner: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        check_count("embedding_size", embedding_size)
        check_count("memory_size", memory_size)
        self.loss = loss
        self.miner = miner
        self._check_epsilon()
        self.register_buffer("embedding_memory", torch.zeros(memory_size, embedding_size))
        self.register_buffer("label_memory", torch.zeros(memory_size, dtype=torch.long))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self._leave_inference_mode()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "loss" and not callable(value):
            raise TypeError(f"loss: expected a module or a function, got {type(value).__name__}")
        if name == "miner" and not (value is None or callable(value)):
            raise TypeError(f"miner: expected a module, a function or None, got {type(value).__name__}")
        if name in ("loss", "miner") and not isinstance(value, nn.Module):
            self._modules.pop(name, None)  # PyTorch accepts only modules under this name otherwise
        super().__setattr__(name, value)

    @property
    def embedding_size(self) -> int:
        return self.embedding_memory.shape[1]

    @embedding_size.setter
    def embedding_size(self, size: int) -> None:
        check_count("embedding_size", size)
        if size != self.embedding_size:
            self.embedding_memory = self.embedding_memory.new_zeros(self.memory_size, size)
            self.reset_queue()

    def _leave_inference_mode(self) -> None:
        """Replaces buffers that were made in inference mode: later training steps write to the queue."""
        if torch.compiler.is_compiling():
            return
        with torch.inference_mode(False):
            for name, buffer in self._buffers.items():
                if buffer.is_inference():
                    setattr(self, name, buffer.clone())

    @property
    def memory_size(self) -> int:
        return self.embedding_memory.shape[0]

    @memory_size.setter
    def memory_size(self, size: int) -> None:
        check_count("memory_size", size)
        self._leave_inference_mode()
        kept = min(int(self.count), size)
        latest = (self.position - kept + torch.arange(kept, device=self.position.device)) % self.memory_size
        for name in ("embedding_memory", "label_memory"):
            old = getattr(self, name)
            new = old.new_zeros(size, *old.shape[1:])
            new[:kept] = old[latest]
            setattr(self, name, new)
        self.count.fill_(kept)
        self.position.fill_(kept % size)
        self._leave_inference_mode()

    def reset_queue(self) -> None:
        """Empties the queue."""
        self._leave_inference_mode()
        for buffer in (self.embedding_memory, self.label_memory, self.position, self.count):
            buffer.zero_()

    @property
    def queue_idx(self) -> int:
        """The slot of the next embedding; synchronises with the device."""
        return int(self.position)

    @property
    def has_been_filled(self) -> bool:
        """Whether the queue is full; synchronises with the device."""
        return int(self.count) == self.memory_size

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: object = None,
        enqueue_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch against the queue.

        Args:
            embeddings: ``[N, D]``, N at most ``memory_size``.
            labels: ``[N]`` integers.
            indices_tuple: additional pairs or triplets; anchors are rows of the batch, positives and
                negatives are slots of the queue.
            enqueue_mask: ``[N]`` bool. Marked rows enter the queue, and only the unmarked ones have a loss
                (keys and queries of two encoders, say). Not together with ``indices_tuple``.
        """

        def check() -> tuple[Tensor, ...]:
            return self._check(embeddings, labels, indices_tuple, enqueue_mask)

        # The rows of all processes, and which of them are this one's.
        whole, local = self.loss.gather(check) if self._is_distributed else (check(), slice(None))
        self._move_to(embeddings)
        labels = whole[1][local]
        if enqueue_mask is None:
            slots = self._enqueue(*whole)[local]
        else:
            self._enqueue(*(x[whole[2]] for x in whole[:2]))
            queries = ~whole[2][local]
            embeddings, labels, slots = embeddings[queries], labels[queries], None
        # Losses that do not know num_valid_refs get a slice, which synchronises.
        filled = self.memory_size if _applies_rules(self.loss) else int(self.count)
        # A copy, since the queue may change before the backward pass of this loss.
        ref_emb, ref_labels = self.embedding_memory[:filled].clone(), self.label_memory[:filled].clone()
        pairs = self._pairs(embeddings, labels, ref_emb, ref_labels, slots)
        if indices_tuple is not None:
            pairs, extra = tuple(pairs), index_lists(indices_tuple)
            extra_pairs = listed_pairs(extra, embeddings, ref_emb, check_range=False)
            if len(pairs) == 3:
                as_listed = (*extra_pairs[:2], extra_pairs[3])
                extra_pairs = to_triplets(extra_pairs) if len(extra) == 4 else as_listed
            pairs = tuple(torch.cat(lists) for lists in zip(pairs, extra_pairs, strict=True))
        loss = self.loss.against if self._is_distributed else self.loss
        return loss(embeddings, labels, pairs, ref_emb, ref_labels)

    @property
    def _is_distributed(self) -> bool:
        return isinstance(self.loss, DistributedLoss)

    def _check(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: object, enqueue_mask: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The embeddings, labels and mask (if given), validated and on one device."""
        self._check_epsilon()
        labels, _ = check_batch(embeddings, labels, None, None)
        dim = self.embedding_size
        if embeddings.shape[1] != dim:
            raise ValueError(f"embeddings: expected embedding_size={dim} columns, got {embeddings.shape[1]}")
        if indices_tuple is not None and self._is_distributed:
            raise ValueError("indices_tuple: expected None with DistributedLoss, got indices")
        if enqueue_mask is None:
            return embeddings, labels
        self._check_mask(enqueue_mask, embeddings, indices_tuple)
        return embeddings, labels, enqueue_mask.to(embeddings.device)

    if TYPE_CHECKING:  # nn.Module's gives Any
        __call__ = forward

    def _check_epsilon(self) -> None:
        loss = self.loss.loss if self._is_distributed else self.loss
        epsilon = loss.epsilon if isinstance(loss, PairLoss) else None
        if None in (epsilon, self.miner) or getattr(self.miner, "epsilon", None) == epsilon:
            return
        kind = type(self.miner).__name__
        raise ValueError(f"miner: expected None as the loss mines by its epsilon={epsilon}, got {kind}")

    def _move_to(self, embeddings: Tensor) -> None:
        self._leave_inference_mode()
        device, dtype = embeddings.device, embeddings.dtype
        if self.embedding_memory.dtype != dtype or self.embedding_memory.device != device:
            with torch.inference_mode(False):  # later training steps write to the queue
                self.embedding_memory = self.embedding_memory.to(device, dtype)
                self.label_memory = self.label_memory.to(device)
                self.position, self.count = self.position.to(device), self.count.to(device)

    def _load_from_state_dict(self, state_dict, prefix, *arguments) -> None:
        self._leave_inference_mode()
        queue = state_dict.get(prefix + "embedding_memory")
        if queue is not None and queue.dtype != self.embedding_memory.dtype:
            self.embedding_memory = self.embedding_memory.to(queue.dtype)
        if queue is not None and queue.ndim == 2 and prefix + "count" not in state_dict:
            filled = queue.detach().ne(0).any(1).nonzero()
            count = filled[-1, 0] + 1 if len(filled) else torch.zeros((), dtype=torch.long)
            state_dict[prefix + "count"] = count
            state_dict[prefix + "position"] = count % len(queue)
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._leave_inference_mode()

    def _check_mask(self, mask: Tensor, embeddings: Tensor, indices_tuple: object) -> None:
        if indices_tuple is not None:
            raise ValueError("indices_tuple and enqueue_mask: expected one of the two, got both")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != embeddings.shape[:1]:
            got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"enqueue_mask: expected bool of shape [{embeddings.shape[0]}], got {got}")

    def _enqueue(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Writes the rows to the queue; returns their slots ``[N]``."""
        rows = embeddings.shape[0]
        if rows > self.memory_size:
            raise ValueError(f"embeddings: expected at most memory_size={self.memory_size} rows, got {rows}")
        slots = (self.position + torch.arange(rows, device=labels.device)) % self.memory_size
        self.embedding_memory.index_copy_(0, slots, embeddings.detach())
        self.label_memory.index_copy_(0, slots, labels.to(self.label_memory.dtype))
        self.position.add_(rows).remainder_(self.memory_size)
        self.count.add_(rows).clamp_(max=self.memory_size)
        return slots

    def _pairs(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor, slots: Tensor | None
    ) -> Mined | tuple[Tensor, ...]:
        """The pairs or triplets that count, without those of a row and its own copy in ``slots`` ``[N]``."""
        batch = embeddings, labels, ref_emb, ref_labels
        count = self.count.clone()
        masks = {"self_index": slots, "num_valid_refs": count}
        if self.miner is None:
            return mined_pairs(*batch, epsilon=None, similarity="cosine", **masks)
        # Miners get the queue itself, not the copy, so that remembering the batch takes no memory.
        queue, queue_labels = self.embedding_memory, self.label_memory
        if getattr(type(self.miner), "forward", None) in (Miner.forward, MultiSimilarityMiner.forward):
            mined = self.miner.mine(embeddings, labels, queue, queue_labels, count)
        else:  # miners that do not know num_valid_refs must not see empty slots
            queue, queue_labels = queue[: int(count)], queue_labels[: int(count)]
            mined = self.miner(embeddings, labels, queue, queue_labels)
        if isinstance(mined, Mined) and mined.rule_applies(embeddings, queue):
            return mined.for_batch(*batch, **masks)
        lists = tuple(mined)
        if slots is not None:
            is_other = slots[lists[0].long()] != lists[1]
            filtered = 3 if len(lists) == 3 else 2  # whole triplets, but of pairs the positives only
            lists = (*(index[is_other] for index in lists[:filtered]), *lists[filtered:])
        return lists

    def extra_repr(self) -> str:
        return f"embedding_size={self.embedding_size}, memory_size={self.memory_size}"
