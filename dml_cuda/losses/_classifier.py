"""Base class of the class-level losses, which compare rows with the weights of classes."""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from .._inputs import autocast as _autocast
from .._inputs.checks import Backend, Reduction, check_batch, check_count
from .._inputs.indices import index_lists
from .._inputs.traced import is_traced
from .._ops.evaluate import Call, evaluate_arguments
from ._formula import reduce
from ._pair import FormulaModule, described


class ClassifierOptions(TypedDict, total=False):
    """The options that the class-level losses share; their defaults are ``"mean"`` and ``"auto"``.

    Attributes:
        reduction, backend: as in :class:`dml_cuda.PairOptions`.
    """

    reduction: Reduction
    backend: Backend


def check_classes(labels: Tensor, num_classes: int) -> None:
    """Raises ValueError for labels >= num_classes on the CPU; on a GPU checking would synchronise."""
    if labels.device.type != "cpu" or is_traced(labels) or labels.numel() == 0:
        return
    labels = labels.long()
    if int(labels.max()) < num_classes:
        return
    wrong = labels[labels >= num_classes].unique()
    named = ", ".join(str(int(label)) for label in wrong[:5]) + (", ..." if len(wrong) > 5 else "")
    raise ValueError(
        f"labels: expected classes below num_classes={num_classes} (or below 0 to ignore a row), got {named}"
    )


def row_weights(indices: tuple[Tensor, ...], embeddings: Tensor) -> Tensor:
    """``[N]`` how often each row is listed, relative to the most listed row; 1 if no row is listed."""
    dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    counts = embeddings.new_zeros(embeddings.shape[0], dtype=dtype)
    for index in indices:
        index = index.to(counts.device, torch.long)
        counts = counts.index_add(0, index, torch.ones_like(index, dtype=counts.dtype))
    most = counts.max() if len(counts) else counts.sum()
    return torch.where(most > 0, counts / most.clamp(min=1), 1.0)


class ClassifierLoss(FormulaModule):
    """A classification loss over ``num_classes`` classes without materialised logits.

    Rows with a negative label are ignored: their loss and gradient are 0, and ``"mean"`` and ``"mean_valid"``
    still divide by all N rows. Labels >= ``num_classes`` raise ValueError on the CPU; on the GPU, where
    checking would synchronise, and in compiled code those rows are ignored too.
    """

    weight: ClassVar[str]  # the name of the parameter, as in pytorch-metric-learning

    def __init__(
        self, num_classes: int, embedding_size: int, options: ClassifierOptions, **values: Any
    ) -> None:
        for name in options:
            if name not in ClassifierOptions.__annotations__:
                raise TypeError(f"{name}: expected one of the options reduction, backend")
        super().__init__({"reduction": "mean", **options}, **values)
        check_count("num_classes", num_classes)
        check_count("embedding_size", embedding_size)
        self.num_classes, self.embedding_size = int(num_classes), int(embedding_size)

    def add_columns(self, count: int, init: Any, **options: Any) -> None:
        """Adds the parameter ``[D, count]``, the shape of pytorch-metric-learning. Its transpose is
        contiguous, as the kernels read one class after the other, and so is its gradient."""
        weight = init(torch.empty(self.embedding_size, count), **options)
        setattr(self, self.weight, nn.Parameter(weight.T.contiguous().T))

    def rows(self) -> Tensor:
        """``[C, D]`` the weights of the classes."""
        return getattr(self, self.weight).T

    def check(self, embeddings: object, labels: object) -> Tensor:
        """Validates a batch; returns its labels on the device of the embeddings. Raises TypeError or
        ValueError."""
        labels, _ = check_batch(embeddings, labels, None, None)
        name, weight = self.weight, getattr(self, self.weight)
        if embeddings.shape[1] != self.embedding_size:
            raise ValueError(
                f"embeddings: expected embedding_size={self.embedding_size} columns, got "
                f"{embeddings.shape[1]}"
            )
        if embeddings.device != weight.device:
            raise ValueError(
                f"embeddings: expected device {weight.device} as {name} has, got {embeddings.device}"
            )
        if embeddings.dtype != weight.dtype and not _autocast.is_on(embeddings.device):
            raise TypeError(f"embeddings: expected {weight.dtype} as {name} has, got {embeddings.dtype}")
        check_classes(labels, self.num_classes)
        return labels

    def classes(self) -> Tensor:
        """``[C]`` the class indices."""
        return torch.arange(self.num_classes, device=getattr(self, self.weight).device)

    def pairs(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows, their labels, columns and their labels, as the formula takes them."""
        return embeddings, labels, self.rows(), self.classes()

    def losses(self, call: Call, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a validated batch, by ``call``."""
        rows, labels, columns, classes = self.pairs(embeddings, labels)
        return evaluate_arguments(call, rows, labels, None, columns, classes)

    def listed(self, indices_tuple: Any) -> tuple[Tensor, ...]:
        """The index tensors that count for the weights of rows."""
        return index_lists(indices_tuple)

    def weighted(self, embeddings: Tensor, labels: Tensor, indices_tuple: Any) -> Tensor:
        """As :meth:`losses`, with each row weighted by how often it is listed."""
        call = self.call.with_reduction("none")
        losses = self.losses(call, embeddings, labels)
        weights = row_weights(self.listed(indices_tuple), embeddings).to(losses.dtype)
        nonzero = self.formula.is_nonzero(losses) & (weights > 0)
        return reduce(losses * weights, torch.ones_like(nonzero), self.reduction, nonzero)

    def forward(self, embeddings: Tensor, labels: Tensor, indices_tuple: object = None) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: ``[N, D]``, dtype and device of the weights.
            labels: ``[N]`` classes in [0, C); negative to ignore a row.
            indices_tuple: pairs or triplets of a miner. They do not select pairs, since every row is compared
                with every class: as in pytorch-metric-learning's classification losses, each row's loss is
                weighted by how often the row is listed, relative to the most listed row (1 if no row is).
        """
        labels = self.check(embeddings, labels)
        if indices_tuple is None:
            return self.losses(self.call, embeddings, labels)
        return self.weighted(embeddings, labels, indices_tuple)

    if TYPE_CHECKING:  # nn.Module's gives Any
        __call__ = forward

    def cosines(self, embeddings: Tensor) -> Tensor:
        """``[N, C]`` cosines with the weights of the classes."""
        rows = nn.functional.normalize(self.rows(), dim=1)
        return nn.functional.normalize(embeddings, dim=1) @ rows.T

    def extra_repr(self) -> str:
        values = {"num_classes": self.num_classes, "embedding_size": self.embedding_size, **self.values}
        return described(values | {"reduction": self.reduction, "backend": self.backend})
