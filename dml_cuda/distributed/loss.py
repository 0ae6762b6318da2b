"""A loss of a batch that is spread over several processes."""

import zlib
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._inputs.batch import Batch, make_batch
from .._inputs.checks import check_choice
from .._ops.evaluate import Call, compute, in_wanted_dtype, validate
from ..losses._classifier import ClassifierLoss, RowHead
from ..losses._formula import divided, reduce, sums_and_counts
from ..losses._pair import PairLoss
from ..losses._ranking import RankingLoss
from ..losses._triplet import TripletLoss
from ..losses._two_towers import TwoTowerLoss
from ..losses.info_nce import InfoNCELoss, lse_batch
from ..losses.proxy_anchor import ProxyAnchorLoss
from ..miners.mined_pairs import MinedPairs
from ..miners.pairs import Miner, MultiSimilarityMiner
from . import ring, triplets
from .processes import Processes, gathered, summed, total

MODES = ("gather", "ring")
_TOWERS = TwoTowerLoss | InfoNCELoss  # losses of pairs that are given row by row

# What must be the same on every process, as the words of Processes.agree, and how to say that it is not.
_SAME = {
    "mode": "mode: expected the same on every process",
    "options": "loss: expected the same loss with the same options on every process",
    "dtype": "embeddings: expected one dtype on every process",
    "columns": "embeddings: expected as many columns on every process",
    "tensors": "enqueue_mask: expected on every process or on none",
    "references": "ref_emb: expected on every process or on none",
    "graph": "torch.no_grad: expected on every process or on none",
}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Share(NamedTuple):
    """This process's share of the batch, checked."""

    call: Call
    batch: Batch
    whole: bool = False  # whether its columns are all columns, the same on every process
    numbered: bool = False  # whether labels are the rows' numbers, to be counted over all processes
    proxies: bool = False  # whether the points of all processes are the columns of the proxies, not the rows


class DistributedLoss(nn.Module):
    r"""The loss of a batch that is spread over the processes of a group of torch.distributed.

    Each process passes its own embeddings and labels, as many as it has; none is fine. The value is that of
    one process with the rows of all, one after another in the order of the processes, and the same on every
    process. **After the averaging of DistributedDataParallel the gradient of the network is that of one
    process with the whole batch**, exactly: mining, reduction and counts of what is not 0 included. (What
    each process gets is the gradient of the sum of all processes' values; averaging makes it that of one.)

    With the rows :math:`R_p` of process :math:`p`, and for each row :math:`i` the sums :math:`l_{k,i}` and
    counts :math:`u_{k,i}` of the loss's parts over all columns (see :class:`dml_cuda.PairOptions`):

    .. math::
        L = \sum_k \frac{\sum_p \sum_{i \in R_p} l_{k,i}}{\sum_p \sum_{i \in R_p} u_{k,i}}

    Args:
        loss: a loss of pairs, of ranks, of triplets or of classes of dml_cuda. The weights of classes, and a
            beta that is learnt, belong in DistributedDataParallel, which makes their gradient that of one
            process too:
            ``DistributedDataParallel(DistributedLoss(head))``.
        group: the processes; ``None`` for all. Without torch.distributed there is one.
        mode: ``"gather"``: every process holds the embeddings of all while the loss is computed, N x D.
            ``"ring"``: blocks of embeddings are passed around, the next one on its way while the present one
            is computed; no process holds more than a few, so D times the largest share of the rows. The same
            result to rounding.
        miner: :class:`dml_cuda.MultiSimilarityMiner`, whose rule then applies to the whole batch, as the
            loss's own ``epsilon`` does; with a loss of triplets, a miner that it takes. Draws are those that
            the first process's seed makes of the whole batch.

    With ``reduction="none"`` the result is the losses of this process's rows, ``[N_p]``.

    Bad input on one process ends the call on all: there with the error itself, elsewhere with a RuntimeError
    that repeats it. The processes compare sizes and options before anything large travels; where the group
    has no backend for CPUs (``"nccl"`` alone, not ``"cpu:gloo,cuda:nccl"``), that waits for the GPU.

    >>> loss_fn = DistributedLoss(MultiSimilarityLoss(epsilon=0.1))
    >>> loss = loss_fn(network(images), labels)  # network: DistributedDataParallel
    """

    def __init__(
        self,
        loss: nn.Module,
        group: "dist.ProcessGroup | None" = None,
        mode: str = "gather",
        *,
        miner: MultiSimilarityMiner | None = None,
    ) -> None:
        super().__init__()
        _leave_uncompiled()
        if not (isinstance(loss, PairLoss | RankingLoss | TripletLoss | _TOWERS) or _is_class_level(loss)):
            raise TypeError(
                "loss: expected a loss of pairs, ranks, triplets, classes or two towers of dml_cuda, got "
                f"{type(loss).__name__}"
            )
        known = Miner if isinstance(loss, TripletLoss) else MultiSimilarityMiner
        if miner is not None and not isinstance(miner, known):
            raise TypeError(
                f"miner: expected {'a miner' if known is Miner else 'MultiSimilarityMiner'} of dml_cuda or "
                f"None, got {type(miner).__name__}"
            )
        if miner is not None and isinstance(loss, ClassifierLoss | RankingLoss | _TOWERS):
            raise ValueError("miner: expected None with a loss of ranks, of classes or of two towers")
        if isinstance(loss, ProxyAnchorLoss) and loss.reduction == "none":
            raise ValueError('loss: expected a reduction of ProxyAnchorLoss other than "none"')
        check_choice("mode", mode, MODES)
        self.loss = loss
        self.group = group
        self.mode = mode
        self.miner = miner

    def forward(self, *batch: Any, **named: Any) -> Tensor:
        """The loss of the whole batch. The arguments are those of the loss:

        Args:
            embeddings: ``[N_p, D]``, this process's rows.
            labels: ``[N_p]`` integers.
            indices_tuple: what a miner made of these rows: its rule then applies to the whole batch. Lists
                are refused, as they cannot name other processes' rows.
            ref_emb: ``[M_p, D]``, this process's share of other columns to pair the rows of all processes
                with; ``None`` pairs the rows among themselves.
            ref_labels: ``[M_p]`` integers, given exactly when ``ref_emb`` is.
            row_weights: ``[N_p]`` factors of these rows' losses.

        For a loss of two towers ``(a, b, labels=None, row_weights=None)``: pairs are matched by their place
        in the whole batch, and need no labels. For InfoNCELoss ``(query, positive, negatives=None,
        row_weights=None)``: the negatives of all processes, unless they are paired, are those of every query.
        """
        if isinstance(self.loss, TwoTowerLoss):
            return self._towers(*batch, **named)
        if isinstance(self.loss, InfoNCELoss):
            return self._queries(*batch, **named)
        return self._rows(*batch, **named)

    def _rows(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: object = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        row_weights: Tensor | None = None,
    ) -> Tensor:
        if isinstance(self.loss, ClassifierLoss):
            refused = indices_tuple, ref_emb, ref_labels
            return self._compute(lambda: self._rows_and_classes(embeddings, labels, refused, row_weights))
        batch = embeddings, labels, indices_tuple, ref_emb, ref_labels
        if isinstance(self.loss, TripletLoss):
            if row_weights is not None:
                raise ValueError("row_weights: expected None with a loss of triplets")
            return self._triplets(*batch)
        return self._compute(lambda: _Share(*self._pairs(*batch, row_weights)))

    def _towers(
        self, a: Tensor, b: Tensor, labels: Tensor | None = None, row_weights: Tensor | None = None
    ) -> Tensor:
        loss = self.loss

        def share() -> _Share:
            return _Share(loss.call, loss.batch(a, b, labels, row_weights), numbered=labels is None)

        value = self._compute(share)
        return loss.halves(value) if loss.both_directions else value

    def _queries(
        self,
        query: Tensor,
        positive: Tensor,
        negatives: Tensor | None = None,
        row_weights: Tensor | None = None,
    ) -> Tensor:
        loss, processes = self.loss, Processes(self.group)
        shared = negatives is not None and loss.negative_mode == "unpaired"

        def share_and_words():
            loss.check(query, positive, negatives, row_weights)
            call = loss.lse_call()
            if self.mode == "ring":
                ring.check(call, Batch(query, None, positive))
            how = loss.negative_mode, loss.in_batch_negatives, loss.reduction
            return call, {
                **_points(query),
                "mode": MODES.index(self.mode),
                "refs": negatives.shape[0] if shared else 0,
                "references": negatives is not None,
                "graph": torch.is_grad_enabled(),
                "emb_grad": query.requires_grad or positive.requires_grad,
                "ref_grad": shared and negatives.requires_grad,
                "options": _digest(call, *how),
            }

        call, words = processes.agree(share_and_words)
        _check_same(words)
        # Where one process wants a gradient all must take part in making it.
        query, positive, negatives = (
            x if x is None or x.requires_grad or not any(words[wanted]) else x.detach().requires_grad_()
            for x, wanted in ((query, "emb_grad"), (positive, "emb_grad"), (negatives, "ref_grad"))
        )
        rows, refs = words["rows"], words["refs"]
        numbers = total(rows, processes.rank) + torch.arange(query.shape[0], device=query.device)

        def against(points: Tensor, columns: Tensor, are_positives: bool) -> Tensor | None:
            counts = rows if are_positives else refs
            if sum(counts) <= are_positives:
                return None
            batch = lse_batch(call, points, numbers, columns, are_positives)
            if self.mode == "ring":
                return ring.compute(call, batch, processes, rows, counts)
            return compute(call, _with_all_columns(batch, processes, rows, counts))

        losses = loss.row_losses(query, positive, negatives, against)
        if row_weights is not None:
            losses = losses * row_weights.to(losses.dtype)
        if loss.reduction == "none":
            return in_wanted_dtype(losses, query)
        value = summed(losses.double().sum(), processes)
        return in_wanted_dtype(value if loss.reduction == "sum" else value / max(sum(rows), 1), query)

    if TYPE_CHECKING:  # nn.Module's gives Any
        __call__ = forward

    def against(
        self, embeddings: Tensor, labels: Tensor, pairs: MinedPairs, ref_emb: Tensor, ref_labels: Tensor
    ) -> Tensor:
        """The loss of all processes' rows against columns that are the same on every process.

        Arguments as those of :meth:`forward`, but ``ref_emb`` is whole. What
        :class:`dml_cuda.CrossBatchMemory` does with its queue.
        """
        batch = embeddings, labels, pairs, ref_emb, ref_labels
        if isinstance(self.loss, TripletLoss):
            return self._triplets(*batch, whole=True)
        return self._compute(lambda: _Share(*self._pairs(*batch), whole=True))

    def _pairs(
        self, embeddings, labels, indices_tuple, ref_emb, ref_labels, row_weights=None
    ) -> tuple[Call, Batch]:
        call = self.loss.call
        epsilon = call.options.epsilon
        if indices_tuple is not None and not isinstance(indices_tuple, MinedPairs):
            raise ValueError(
                "indices_tuple: expected None or the pairs of dml_cuda.MultiSimilarityMiner, got "
                f"{type(indices_tuple).__name__}: lists of pairs cannot name the rows of other processes"
            )
        if self.miner is not None:
            if epsilon is not None or indices_tuple is not None:
                raise ValueError("miner: expected no epsilon of the loss and no indices_tuple beside it")
            if self.miner.similarity != call.similarity:
                raise ValueError(
                    f'miner: expected similarity="{call.similarity}" as the loss has, got '
                    f'"{self.miner.similarity}"'
                )
            epsilon = self.miner.epsilon
        mined = call._replace(options=call.options._replace(epsilon=epsilon))
        batch = validate(mined, embeddings, labels, indices_tuple, ref_emb, ref_labels, row_weights)
        if batch.indices is not None:
            raise ValueError(
                "indices_tuple: expected pairs mined from these very embeddings, by the similarity of the "
                "loss: other pairs would be listed, and lists cannot name the rows of other processes"
            )
        return call, batch

    def _triplets(
        self, embeddings, labels, indices_tuple, ref_emb, ref_labels, whole: bool = False
    ) -> Tensor:
        loss, processes = self.loss, Processes(self.group)

        def share_and_words():
            if self.mode == "ring":
                raise ValueError('mode: expected "gather" with a loss of triplets, got "ring"')
            found = indices_tuple
            if self.miner is not None:
                if found is not None:
                    raise ValueError("miner: expected no indices_tuple beside it")
                found = self.miner(embeddings, labels, ref_emb, ref_labels)
            batch = triplets.share(loss, embeddings, labels, found, ref_emb, ref_labels)
            rows, columns = batch.rows, batch.rows.ref_emb
            refs = 0 if columns is None else columns.shape[0]
            call = loss.call
            if isinstance(call.margin, Tensor):  # which may differ for a while
                call = call._replace(margin="learned")
            how = call, batch.selection, refs if whole else None
            words = {
                **_points(rows.embeddings),
                "refs": refs,
                "references": columns is not None,
                "graph": torch.is_grad_enabled(),
                "emb_grad": rows.embeddings.requires_grad,
                "ref_grad": columns is not None and columns.requires_grad,
                "options": zlib.crc32(repr(how).encode()),
                "seed": 0 if batch.seed is None else int(batch.seed),
            }
            return batch, words

        batch, words = processes.agree(share_and_words)
        _check_same(words)
        return triplets.compute(loss, batch, processes, words, whole)

    def _rows_and_classes(
        self, embeddings: Tensor, labels: Tensor, refused: tuple, row_weights: Tensor | None
    ) -> _Share:
        for name, value in zip(("indices_tuple", "ref_emb", "ref_labels"), refused, strict=True):
            if value is not None:
                raise ValueError(f"{name}: expected None with a class-level loss on several processes")
        head = self.loss
        labels = head.check(embeddings, labels)
        factors = head.factors(embeddings, labels, row_weights)
        embeddings, columns = head.promoted(embeddings)
        rule = {"epsilon": None, "similarity": head.call.similarity, "check_pairs": False}
        if isinstance(head, RowHead):  # makes its own columns
            batch = make_batch(embeddings, labels, *(None,) * 3, **rule)
            return _Share(head.call, batch.with_row_weights(factors), whole=True)
        if isinstance(head, ProxyAnchorLoss):
            known = labels >= 0  # the others are left out, as negatives too
            return _Share(
                head.call, make_batch(embeddings[known], labels[known], *(None,) * 3, **rule), proxies=True
            )
        batch = make_batch(embeddings, labels, None, columns, head.classes(), **rule)
        return _Share(head.call, batch.with_row_weights(factors), whole=True)

    def _proxies_and_columns(self, batch: Batch, processes: Processes, rows: list[int]) -> Batch:
        """This process's share of the proxies as rows, and the points of all processes as columns."""
        batch = batch._replace(
            ref_emb=gathered(batch.embeddings, processes, rows),
            ref_labels=processes.gather_rows(batch.labels, rows),
        )
        proxies, classes = (
            x.tensor_split(processes.size)[processes.rank] for x in (self.loss.rows(), self.loss.classes())
        )
        wide = torch.promote_types(proxies.dtype, batch.ref_emb.dtype)  # they differ under autocast
        return batch._replace(embeddings=proxies.to(wide), ref_emb=batch.ref_emb.to(wide), labels=classes)

    def _compute(self, prepare: Callable[[], _Share]) -> Tensor:
        processes = Processes(self.group)

        def share_and_words():
            share = prepare()
            if self.mode == "ring" and not (share.whole or share.proxies):
                ring.check(share.call, share.batch)
            return share, {**_words(share), "mode": MODES.index(self.mode)}

        share, words = processes.agree(share_and_words)
        _check_same(words)
        call, batch = share.call, share.batch._replace(labels=share.batch.labels.long())
        # Where one process wants a gradient all must take part in making it.
        embeddings, ref_emb = batch.embeddings, batch.ref_emb
        if any(words["emb_grad"]) and not embeddings.requires_grad:
            batch = batch._replace(embeddings=embeddings.detach().requires_grad_())
        if any(words["ref_grad"]) and not ref_emb.requires_grad and not share.whole:
            batch = batch._replace(ref_emb=ref_emb.detach().requires_grad_())
        reduction = call.options.reduction
        is_reduced = reduction != "none"
        call = call.with_sums(is_reduced)
        added: Tensor | float = 0.0
        if isinstance(self.loss, RowHead):
            value, added = self.loss.row_losses(batch.embeddings, batch.labels)
            known = self.loss.known(batch.labels)
            how = sums_and_counts if is_reduced else reduce
            nonzero = self.loss.formula.is_nonzero(value)
            value = how(value, known, reduction, nonzero, batch.row_weights)
        elif share.whole:
            value = compute(call, batch)
            if reduction == "mean_valid" and isinstance(self.loss, ClassifierLoss):
                known = self.loss.known(batch.labels).sum().to(value)  # in place of the rows with a pair
                value = torch.cat([value[:2], known[None], value[3:]])
        elif share.proxies:
            value = compute(call, self._proxies_and_columns(batch, processes, words["rows"]))
        elif isinstance(self.loss, TwoTowerLoss):
            value = self._directions(call, batch, share.numbered, processes, words["rows"])
        elif self.mode == "ring" and not torch.jit.is_tracing():  # of one process, which needs no ring
            value = ring.compute(call, batch, processes, words["rows"], words["refs"])
        else:
            value = compute(call, _with_all_columns(batch, processes, words["rows"], words["refs"]))
        if is_reduced:
            value = divided(summed(value.double(), processes), reduction)
        return in_wanted_dtype(value + added, embeddings)

    def _directions(
        self, call: Call, batch: Batch, numbered: bool, processes: Processes, rows: list[int]
    ) -> Tensor:
        """The losses of this process's rows of one tower over all rows of the other, or of both towers."""
        if numbered:  # by their place in the whole batch
            numbers = batch.labels + total(rows, processes.rank)
            batch = batch._replace(labels=numbers, ref_labels=numbers)
        directions = [batch]
        if self.loss.both_directions:
            directions.append(batch._replace(embeddings=batch.ref_emb, ref_emb=batch.embeddings))
        found = [
            ring.compute(call, one, processes, rows, rows)
            if self.mode == "ring"
            else compute(call, _with_all_columns(one, processes, rows, rows))
            for one in directions
        ]
        return sum(found) if call.op_options.return_sums else torch.cat(found)

    def __setstate__(self, state: dict) -> None:
        _leave_uncompiled()
        super().__setstate__(state)

    def __deepcopy__(self, memo: dict) -> "DistributedLoss":
        """A copy for the same processes, whose group cannot be copied."""
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        state = {name: value for name, value in self.__dict__.items() if name != "group"}
        copy.__dict__.update(deepcopy(state, memo), group=self.group)
        return copy

    def gather(self, check: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], slice]:
        """The rows of all processes, without a gradient, of the tensors that ``check`` returns or raises an
        error instead of (the first of them embeddings); and which rows are this process's."""
        processes = Processes(self.group)

        def tensors_and_words():
            tensors = check()
            return tensors, {"tensors": len(tensors), **_points(tensors[0])}

        tensors, words = processes.agree(tensors_and_words)
        _check_same(words)
        rows = words["rows"]
        first = total(rows, processes.rank)
        whole = tuple(processes.gather_rows(x, rows) for x in tensors)
        return whole, slice(first, first + rows[processes.rank])

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}"


def _is_class_level(loss: object) -> bool:
    """Whether a loss is one of rows and the weights of classes, or of proxies and rows, and no more."""
    if not isinstance(loss, ClassifierLoss):
        return False
    if isinstance(loss, RowHead):
        return type(loss).forward is RowHead.forward
    if type(loss).forward is not ClassifierLoss.forward:
        return False
    return isinstance(loss, ProxyAnchorLoss) or type(loss).losses is ClassifierLoss.losses


def _points(embeddings: Tensor) -> dict[str, int]:
    return {
        "rows": embeddings.shape[0],
        "columns": embeddings.shape[1],
        "dtype": _DTYPES.index(embeddings.dtype),
    }


def _check_same(words: dict[str, list[int]]) -> None:
    for name, message in _SAME.items():
        if len(set(words.get(name, []))) > 1:
            raise ValueError(f"{message}; they differ")


def _digest(call: Call, *more: object) -> int:
    """A number that tells options from others; parameters that learn may differ for a while."""
    params = ["learned" if isinstance(value, Tensor) else value for value in call.params]
    options = call.formula.name, params, call.similarity, call.options.reduction, *more
    return zlib.crc32(repr(options).encode())


def _words(share: _Share) -> dict[str, int]:
    call, batch = share.call, share.batch
    refs = 0 if batch.ref_emb is None else batch.ref_emb.shape[0]
    columns = refs if share.whole else None
    return {
        **_points(batch.embeddings),
        "refs": refs,
        "references": batch.ref_emb is not None,
        "graph": torch.is_grad_enabled(),
        "emb_grad": batch.embeddings.requires_grad,
        "ref_grad": batch.ref_emb is not None and batch.ref_emb.requires_grad,
        "options": _digest(call, batch.epsilon, columns),
    }


def _with_all_columns(batch: Batch, processes: Processes, rows: list[int], refs: list[int]) -> Batch:
    """The batch with the columns of all processes, and for each row which of them it is itself."""
    if batch.ref_emb is not None:
        return batch._replace(
            ref_emb=gathered(batch.ref_emb, processes, refs),
            ref_labels=processes.gather_rows(batch.ref_labels.long(), refs),
        )
    first, device = total(rows, processes.rank), batch.labels.device
    return batch._replace(
        ref_emb=gathered(batch.embeddings, processes, rows),
        ref_labels=processes.gather_rows(batch.labels, rows),
        self_index=torch.arange(first, first + rows[processes.rank], device=device),
        mine_self_pair=False,
    )


@cache
def _leave_uncompiled() -> None:
    """The processes look at each other's sizes. Once there is a loss of theirs, since this loads the
    compiler, on which an import of dml_cuda should not wait."""
    for name in ("forward", "against"):
        setattr(DistributedLoss, name, torch.compiler.disable(getattr(DistributedLoss, name)))
