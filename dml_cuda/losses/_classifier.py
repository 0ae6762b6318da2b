"""Base class of the class-level losses, which compare rows with the weights of classes."""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from .._inputs import autocast as _autocast
from .._inputs.checks import FLOATS, Backend, Reduction, check_batch, check_count, is_per_class
from .._inputs.indices import index_lists
from .._inputs.options import check_names
from .._inputs.row_weights import check_row_weights, weights_of_rows
from .._inputs.traced import is_traced
from .._ops.centers import unit_and_inverse
from .._ops.evaluate import Call, evaluate_arguments
from ._formula import reduce
from ._pair import FormulaModule, described, option


class ClassifierOptions(TypedDict, total=False):
    """The options that the class-level losses share; their defaults are ``"mean"`` and ``"auto"``.

    Attributes:
        reduction, backend, class_weights: as in :class:`dml_cuda.PairOptions`.
    """

    reduction: Reduction
    backend: Backend
    class_weights: Tensor | None


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


def listing_weights(indices: tuple[Tensor, ...], embeddings: Tensor) -> Tensor:
    """``[N]`` how often each row is listed, relative to the most listed row; 1 if no row is listed."""
    dtype = _autocast.computed_dtype(embeddings.dtype)
    counts = embeddings.new_zeros(embeddings.shape[0], dtype=dtype)
    for index in indices:
        index = index.to(counts.device, torch.long)
        counts = counts.index_add(0, index, torch.ones_like(index, dtype=counts.dtype))
    most = counts.max() if len(counts) else counts.sum()
    return torch.where(most > 0, counts / most.clamp(min=1), 1.0)


class ClassifierLoss(FormulaModule):
    """A classification loss over ``num_classes`` classes without materialised logits.

    Rows with a negative label are ignored: their loss and gradient are 0. ``"mean"`` divides by all N rows
    all the same, ``"mean_valid"`` by the others. Labels >= ``num_classes`` raise ValueError on the CPU; on
    the GPU, where checking would synchronise, and in compiled code those rows are ignored too.

    Embeddings and weights may differ in dtype: the loss is computed in the wider one, which is the dtype of
    the result, and each gets its gradient in its own.
    """

    class_weights: Tensor | None = option()
    weight: ClassVar[str]  # the name of the parameter, as in pytorch-metric-learning
    by_columns: ClassVar[bool] = True  # whether the parameter is [D, C], and not [C, D]

    def __init__(
        self, num_classes: int, embedding_size: int, options: ClassifierOptions, **values: Any
    ) -> None:
        check_names(options, tuple(ClassifierOptions.__annotations__), values)
        super().__init__({"reduction": "mean", **options}, **values)
        check_count("num_classes", num_classes)
        check_count("embedding_size", embedding_size)
        self.num_classes, self.embedding_size = int(num_classes), int(embedding_size)

    def weight_shape(self) -> tuple[int, int]:
        """The shape of the parameter, as in pytorch-metric-learning."""
        size = self.num_columns(), self.embedding_size
        return size[::-1] if self.by_columns else size

    def num_columns(self) -> int:
        """How many points the rows are compared with."""
        return self.num_classes

    def add_weight(self) -> None:
        """Adds the parameter, once the sizes are known."""
        setattr(self, self.weight, nn.Parameter(torch.empty(self.weight_shape())))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew, as pytorch-metric-learning does: from a standard normal distribution."""
        nn.init.normal_(getattr(self, self.weight))

    def rows(self) -> Tensor:
        """``[C, D]`` the weights of the classes."""
        weight = getattr(self, self.weight)
        return weight.T if self.by_columns else weight

    def wide_dtype(self, embeddings: Tensor) -> torch.dtype:
        """The wider of the dtypes of embeddings and weights."""
        return torch.promote_types(embeddings.dtype, getattr(self, self.weight).dtype)

    def promoted(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings ``[N, D]`` and weights ``[C, D]`` in the wider of their dtypes."""
        wide = self.wide_dtype(embeddings)
        return embeddings.to(wide), self.rows().to(wide)

    def check(
        self, embeddings: object, labels: object, ref_emb: object = None, ref_labels: object = None
    ) -> Tensor:
        """Validates a batch; returns its labels on the device of the embeddings. Raises TypeError or
        ValueError."""
        for name, value in (("ref_emb", ref_emb), ("ref_labels", ref_labels)):
            if value is not None:
                raise ValueError(
                    f"{name}: expected None, as a class-level loss compares rows with its {self.weight}; got "
                    f"{type(value).__name__}"
                )
        labels, _ = check_batch(embeddings, labels, None, None)
        self._check_weight()
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
        check_classes(labels, self.num_classes)
        for name in self.formula.per_class:
            value = self.values[name]
            if is_per_class(value) and value.shape[0] != self.num_classes:
                raise ValueError(
                    f"{name}: expected a number for each of num_classes={self.num_classes} classes, got "
                    f"{value.shape[0]}"
                )
        return labels

    def _check_weight(self) -> None:
        """Raises TypeError or ValueError for a weight that was replaced by another kind of tensor."""
        name, weight, shape = self.weight, getattr(self, self.weight), self.weight_shape()
        if not isinstance(weight, Tensor) or weight.dtype not in FLOATS:
            got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(f"{name}: expected a floating-point tensor of shape {list(shape)}, got {got}")
        if weight.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(weight.shape)}")

    def known(self, labels: Tensor) -> Tensor:
        """``[N]`` which rows have a class."""
        labels = labels.long()
        return (labels >= 0) & (labels < self.num_classes)

    def classes(self) -> Tensor:
        """``[C]`` the class indices."""
        return torch.arange(self.num_classes, device=getattr(self, self.weight).device)

    def pairs(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows, their labels, columns and their labels, as the formula takes them."""
        rows, columns = self.promoted(embeddings)
        return rows, labels, columns, self.classes()

    def losses(self, call: Call, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a validated batch, by ``call``."""
        rows, labels, columns, classes = self.pairs(embeddings, labels)
        if call.op_options.reduction != "mean_valid":
            return evaluate_arguments(call, rows, labels, None, columns, classes)
        # The kernels count the pairs of a row without a class: it is no class's positive.
        total = evaluate_arguments(call.with_reduction("sum"), rows, labels, None, columns, classes)
        return total / self.known(labels).sum().clamp(min=1)

    def listed(self, indices_tuple: Any) -> tuple[Tensor, ...]:
        """The index tensors that count for the weights of rows."""
        return index_lists(indices_tuple)

    def weighted(
        self, embeddings: Tensor, labels: Tensor, listing: Tensor | None, factors: Tensor | None
    ) -> Tensor:
        """As :meth:`losses`, with each row weighted by how often it is listed, and by a factor ``[N]``."""
        call = self.call.with_reduction("none").without_class_weights()  # those are among the factors
        return self.reduced(self.losses(call, embeddings, labels), labels, listing, factors)

    def reduced(
        self, losses: Tensor, labels: Tensor, listing: Tensor | None, factors: Tensor | None
    ) -> Tensor:
        """The rows' losses ``[N]``, weighted as :meth:`weighted` says, and reduced."""
        nonzero = self.formula.is_nonzero(losses)
        if listing is not None:
            nonzero = nonzero & (listing > 0)
            losses = losses * listing.to(losses.dtype)
        return reduce(losses, self.known(labels), self.reduction, nonzero, factors)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: object = None,
        ref_emb: None = None,
        ref_labels: None = None,
        row_weights: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: ``[N, D]``, on the device of the weights.
            labels: ``[N]`` classes in [0, C); negative to ignore a row.
            indices_tuple: pairs or triplets of a miner. They do not select pairs, since every row is compared
                with every class: as in pytorch-metric-learning's classification losses, each row's loss is
                weighted by how often the row is listed, relative to the most listed row (1 if no row is).
            ref_emb, ref_labels: ``None``, for callers that pass the arguments of every loss.
            row_weights: ``[N]`` factors of the rows' losses. What a mean divides by stays as it is.
        """
        labels = self.check(embeddings, labels, ref_emb, ref_labels)
        factors = self.factors(embeddings, labels, row_weights)
        if indices_tuple is None and factors is None:
            return self.losses(self.call, embeddings, labels)
        listing = None if indices_tuple is None else listing_weights(self.listed(indices_tuple), embeddings)
        return self.weighted(embeddings, labels, listing, factors)

    def factors(self, embeddings: Tensor, labels: Tensor, row_weights: Tensor | None) -> Tensor | None:
        """``[N]`` the factors of the rows' losses, if there are any."""
        if row_weights is not None:
            check_row_weights(row_weights, embeddings)
        return weights_of_rows(self.class_weights, labels, row_weights, ignore_negative=True)

    if TYPE_CHECKING:  # nn.Module's gives Any
        __call__ = forward

    def cosines(self, embeddings: Tensor) -> Tensor:
        """``[N, C]`` cosines with the weights of the classes."""
        x, w = (nn.functional.normalize(points, dim=1) for points in self.promoted(embeddings))
        return x @ w.T

    def extra_repr(self) -> str:
        values = {"num_classes": self.num_classes, "embedding_size": self.embedding_size, **self.values}
        return described(values | {"reduction": self.reduction, "backend": self.backend})

    def center_weights(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, ...] | None:
        """The fields of :class:`dml_cuda.functional.PairWeights`, of a head whose pairs are no row and class
        that a formula sees."""
        return None


class RowHead(ClassifierLoss):
    """A head that makes its rows' losses itself: they are no function of similarities of pairs."""

    def row_losses(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | float]:
        """The losses ``[N]`` of a validated batch, float32 or float64, and what is added once reduced."""
        raise NotImplementedError

    def cosine_losses(self, cosines: Tensor, embeddings: Tensor, labels: Tensor) -> Tensor:
        """``[N]`` losses from the cosines of rows and centres, in plain PyTorch."""
        raise NotImplementedError

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: object = None,
        ref_emb: None = None,
        ref_labels: None = None,
        row_weights: Tensor | None = None,
    ) -> Tensor:
        labels = self.check(embeddings, labels, ref_emb, ref_labels)
        factors = self.factors(embeddings, labels, row_weights)
        listing = None if indices_tuple is None else listing_weights(self.listed(indices_tuple), embeddings)
        return self.weighted(embeddings, labels, listing, factors)

    def weighted(
        self, embeddings: Tensor, labels: Tensor, listing: Tensor | None, factors: Tensor | None
    ) -> Tensor:
        losses, added = self.row_losses(embeddings, labels)
        with _autocast.off(embeddings.device):
            value = self.reduced(losses, labels, listing, factors) + added
        return value.to(_autocast.result_dtype(embeddings, self.wide_dtype(embeddings)))

    def center_weights(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Rows, centres, their cosine and the loss's derivative by it: first those of the row's own class,
        then the others."""
        labels = self.check(embeddings, labels).long()
        dtype = _autocast.computed_dtype(self.wide_dtype(embeddings))
        with torch.inference_mode(False), _autocast.off(embeddings.device):
            rows, centers = (points.detach().to(dtype) for points in self.promoted(embeddings))
            x, w = (unit_and_inverse(points)[0] for points in (rows, centers))
            with torch.enable_grad():
                s = (x @ w.T).requires_grad_()
                losses = self.cosine_losses(s, rows, labels)
                value = reduce(losses, self.known(labels), self.reduction).sum()
            (derivative,) = torch.autograd.grad(value, s)
            classes = torch.arange(len(w), device=labels.device) // (len(w) // self.num_classes)
            own, known = labels[:, None] == classes, self.known(labels)[:, None]
            return tuple(
                column
                for kind in (own, ~own & known)
                for column in (*kind.nonzero().unbind(1), s.detach()[kind], derivative[kind])
            )
