"""Cross-batch memory: a batch against the embeddings of the batches before it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._inputs.checks import check_batch, check_count
from ._inputs.indices import listed_pairs
from .distributed import DistributedLoss
from .losses._pair import PairLoss
from .losses._triplet import TripletLoss, to_triplets
from .losses.margin import MarginLoss
from .miners.mined import Mined
from .miners.mined_pairs import mined_pairs
from .miners.pairs import Miner, MultiSimilarityMiner


def _takes_rules(loss: object) -> bool:
    """Whether a loss applies the rule of mined pairs, and so leaves out the places that are still empty."""
    loss = getattr(loss, "_orig_mod", loss)  # what torch.compile wraps
    if isinstance(loss, DistributedLoss):
        return True
    for kind in (PairLoss, TripletLoss, MarginLoss):
        if isinstance(loss, kind) and type(loss).forward is kind.forward:
            return True
    is_fused = getattr(loss, "is_fused", None)  # the adapters of dml_cuda.pml
    return is_fused is not None and is_fused()


class CrossBatchMemory(nn.Module):
    """Pairs each batch with a queue of the latest embeddings, the batch itself among them.

    Wang et al., *Cross-Batch Memory for Embedding Learning*, CVPR 2020. The results are those of
    pytorch-metric-learning's class: the batch enters the queue first, a miner compares the batch with the
    whole queue, and the pair of a row with its own copy does not count. With a miner and a loss of dml_cuda
    no pair is listed and no batch x queue matrix is stored.

    Args:
        loss: a module called as ``loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)``: one of
            dml_cuda, or any pair loss of pytorch-metric-learning. With
            :class:`dml_cuda.distributed.DistributedLoss` the batches of all processes enter every process's
            queue, in the same order everywhere: the memory is that of one process with the whole batch.
        embedding_size: D.
        memory_size: how many embeddings the queue holds; at least a batch.
        miner: called as ``miner(embeddings, labels, ref_emb, ref_labels)``, or ``None`` for every pair (or
            for a loss that mines by its ``epsilon``).

    Attributes:
        embedding_memory: ``[memory_size, D]`` buffer, in the dtype of the latest embeddings.
        label_memory: ``[memory_size]`` int64 buffer.
        position: int64 buffer, one number: where the next batch goes.
        count: int64 buffer, one number: how many embeddings the queue holds.

    All state is in buffers, so it travels with ``state_dict``, and a compiled or captured step needs no
    other graph as the queue fills up. A ``state_dict`` of pytorch-metric-learning's class loads too: it does
    not say where the queue stands, so the places that hold numbers count as filled, and a full queue goes
    on at its first.

    ``loss``, ``miner``, ``embedding_size`` and ``memory_size`` can be set. Another ``memory_size`` keeps the
    latest embeddings, another ``embedding_size`` none.

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

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "loss" and not callable(value):
            raise TypeError(f"loss: expected a module or a function, got {type(value).__name__}")
        if name == "miner" and not (value is None or callable(value)):
            raise TypeError(f"miner: expected a module, a function or None, got {type(value).__name__}")
        if name in ("loss", "miner") and not isinstance(value, nn.Module):
            self._modules.pop(name, None)  # where PyTorch takes nothing but modules
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

    @property
    def memory_size(self) -> int:
        return self.embedding_memory.shape[0]

    @memory_size.setter
    def memory_size(self, size: int) -> None:
        check_count("memory_size", size)
        kept = min(int(self.count), size)
        latest = (self.position - kept + torch.arange(kept, device=self.position.device)) % self.memory_size
        for name in ("embedding_memory", "label_memory"):
            old = getattr(self, name)
            new = old.new_zeros(size, *old.shape[1:])
            new[:kept] = old[latest]
            setattr(self, name, new)
        self.count.fill_(kept)
        self.position.fill_(kept % size)

    def reset_queue(self) -> None:
        """Empties the queue."""
        for buffer in (self.embedding_memory, self.label_memory, self.position, self.count):
            buffer.zero_()

    @property
    def queue_idx(self) -> int:
        """Where the next batch goes; waits for the device."""
        return int(self.position)

    @property
    def has_been_filled(self) -> bool:
        """Whether the queue has wrapped around; waits for the device."""
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
            indices_tuple: pairs or triplets that count besides; their anchors are rows of the batch, the
                others places in the queue.
            enqueue_mask: ``[N]`` bool. The rows marked enter the queue, and only the others have a loss
                (queries and keys of two encoders, say). Not together with ``indices_tuple``.
        """

        def check() -> tuple[Tensor, ...]:
            return self._check(embeddings, labels, indices_tuple, enqueue_mask)

        whole, own = self.loss.gather(check) if self._is_distributed else (check(), slice(None))
        self._move_to(embeddings)
        labels = whole[1][own]
        if enqueue_mask is None:
            places = self._enqueue(*whole)[own]
        else:
            self._enqueue(*(x[whole[2]] for x in whole[:2]))
            others = ~whole[2][own]
            embeddings, labels, places = embeddings[others], labels[others], None
        # Who does not know of the count gets the filled part; to know it a GPU must be waited for.
        filled = self.memory_size if _takes_rules(self.loss) else int(self.count)
        # A copy: the queue moves on, while the gradient of this loss may still be wanted.
        ref_emb, ref_labels = self.embedding_memory[:filled].clone(), self.label_memory[:filled].clone()
        pairs = self._pairs(embeddings, labels, ref_emb, ref_labels, places)
        if indices_tuple is not None:
            pairs, given = tuple(pairs), tuple(indices_tuple)
            more = listed_pairs(given, embeddings, ref_emb, check_range=False)
            if len(pairs) == 3:
                more = to_triplets(more) if len(given) == 4 else (*more[:2], more[3])
            pairs = tuple(torch.cat(lists) for lists in zip(pairs, more, strict=True))
        loss = self.loss.against if self._is_distributed else self.loss
        return loss(embeddings, labels, pairs, ref_emb, ref_labels)

    @property
    def _is_distributed(self) -> bool:
        return isinstance(self.loss, DistributedLoss)

    def _check(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: object, enqueue_mask: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The embeddings, the labels and the mask, if there is one, beside them."""
        self._check_epsilon()
        labels, _ = check_batch(embeddings, labels, None, None)
        dim = self.embedding_size
        if embeddings.shape[1] != dim:
            raise ValueError(f"embeddings: expected embedding_size={dim} columns, got {embeddings.shape[1]}")
        if indices_tuple is not None and self._is_distributed:
            raise ValueError("indices_tuple: expected None with a loss of several processes")
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
        raise ValueError(f"miner: expected None where the loss mines by its epsilon={epsilon}, got {kind}")

    def _move_to(self, embeddings: Tensor) -> None:
        device, dtype = embeddings.device, embeddings.dtype
        if self.embedding_memory.dtype != dtype or self.embedding_memory.device != device:
            with torch.inference_mode(False):  # the queue goes on afterwards
                self.embedding_memory = self.embedding_memory.to(device, dtype)
                self.label_memory = self.label_memory.to(device)
                self.position, self.count = self.position.to(device), self.count.to(device)

    def _load_from_state_dict(self, state_dict, prefix, *others) -> None:
        queue = state_dict.get(prefix + "embedding_memory")
        if queue is not None and queue.dtype != self.embedding_memory.dtype:
            self.embedding_memory = self.embedding_memory.to(queue.dtype)
        if queue is not None and queue.ndim == 2 and prefix + "count" not in state_dict:
            filled = queue.detach().ne(0).any(1).nonzero()
            count = filled[-1, 0] + 1 if len(filled) else torch.zeros((), dtype=torch.long)
            state_dict[prefix + "count"] = count
            state_dict[prefix + "position"] = count % len(queue)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _check_mask(self, mask: Tensor, embeddings: Tensor, indices_tuple: object) -> None:
        if indices_tuple is not None:
            raise ValueError("indices_tuple and enqueue_mask: expected one of the two, got both")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != embeddings.shape[:1]:
            got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"enqueue_mask: expected bool of shape [{embeddings.shape[0]}], got {got}")

    def _enqueue(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Writes the rows to the queue; returns their places ``[N]``."""
        rows = embeddings.shape[0]
        if rows > self.memory_size:
            raise ValueError(f"embeddings: expected at most memory_size={self.memory_size} rows, got {rows}")
        places = (self.position + torch.arange(rows, device=labels.device)) % self.memory_size
        self.embedding_memory.index_copy_(0, places, embeddings.detach())
        self.label_memory.index_copy_(0, places, labels.to(self.label_memory.dtype))
        self.position.add_(rows).remainder_(self.memory_size)
        self.count.add_(rows).clamp_(max=self.memory_size)
        return places

    def _pairs(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor, places: Tensor | None
    ) -> Mined | tuple[Tensor, ...]:
        """The pairs or triplets that count, without a row and its own copy, at ``places`` ``[N]``."""
        batch = embeddings, labels, ref_emb, ref_labels
        count = self.count.clone()
        own = {"self_index": places, "num_valid_refs": count}
        if self.miner is None:
            return mined_pairs(*batch, epsilon=None, similarity="cosine", **own)
        # Miners see the queue itself, not the copy: what they remember of it takes no memory.
        queue, queue_labels = self.embedding_memory, self.label_memory
        if getattr(type(self.miner), "forward", None) in (Miner.forward, MultiSimilarityMiner.forward):
            mined = self.miner.mine(embeddings, labels, queue, queue_labels, count)
        else:  # a miner of another kind must not see the places that are still empty
            queue, queue_labels = queue[: int(count)], queue_labels[: int(count)]
            mined = self.miner(embeddings, labels, queue, queue_labels)
        if isinstance(mined, Mined) and mined.rule_applies(embeddings, queue):
            return mined.for_batch(*batch, **own)
        lists = tuple(mined)
        if places is not None:
            others = places[lists[0].long()] != lists[1]
            with_positives = 3 if len(lists) == 3 else 2  # a triplet goes whole
            lists = (*(index[others] for index in lists[:with_positives]), *lists[with_positives:])
        return lists

    def extra_repr(self) -> str:
        return f"embedding_size={self.embedding_size}, memory_size={self.memory_size}"
