"""What the pair losses share: a formula with its options as a function and as a module."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from .._inputs.options import NAMES, PairOptions, check_options
from .._ops.arguments import op_options
from .._ops.evaluate import Call, evaluate_arguments
from ._formula import Formula


def make_call(
    formula: type[Formula],
    values: Mapping[str, Any],
    options: Mapping[str, Any],
    dynamic_params: bool = False,
) -> Call:
    """Raises TypeError or ValueError for a parameter or an option that cannot be."""
    for name, check in formula.parameters.items():
        check(name, values[name])
    defaults = {"similarity": formula.similarity, "reduction": formula.reduction}
    checked = check_options(options, **defaults, parameters=formula.parameters)
    similarity = checked.measure
    params = formula.params(values, similarity)
    return Call(formula, checked, op_options(formula.name, params, similarity, checked), dynamic_params)


def pair_loss(
    formula: type[Formula],
    values: Mapping[str, Any],
    options: PairOptions,
    embeddings: Tensor,
    labels: Tensor | None,
    indices_tuple: object,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
) -> Tensor:
    """The loss as a function: a formula with its parameters by name, applied to a batch."""
    call = make_call(formula, values, options, dynamic_params=True)
    return evaluate_arguments(call, embeddings, labels, indices_tuple, ref_emb, ref_labels)


class _Option:
    """An option of a module: an attribute that is checked when it is set."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: "FormulaModule | None", owner: type | None = None) -> Any:
        return self if module is None else module.get_option(self.name)

    def __set__(self, module: "FormulaModule", value: object) -> None:
        module.set_option(self.name, value)


def option() -> Any:
    """An attribute of :class:`FormulaModule` that is one of its options."""
    return _Option()


class FormulaModule(nn.Module):
    """A formula with its parameters and options as a module.

    Every parameter and option is an attribute, readable and settable, and checked when it is set. ``call``
    holds them as the ops take them.
    """

    formula: ClassVar[type[Formula]]

    reduction: str = option()
    backend: str = option()

    def __init__(self, options: Mapping[str, Any], **values: Any) -> None:
        super().__init__()
        self._values = values
        self.call = make_call(self.formula, values, options)

    def get_option(self, name: str) -> Any:
        return getattr(self.call.options, name) if name in NAMES else self._values[name]

    def set_option(self, name: str, value: object) -> None:
        values, options = self._values, self.call.options._asdict()
        if name in NAMES:
            options = {**options, name: value}
        else:
            values = {**values, name: value}
        # An option that was set may be set again at every step: no graph should be compiled for each value.
        self.call = make_call(self.formula, values, options, dynamic_params=True)
        self._values = values

    def extra_repr(self) -> str:
        options = self._values | self.call.options._asdict()
        return ", ".join(f"{name}={value!r}" for name, value in options.items())


class PairLoss(FormulaModule):
    """What the pair losses share."""

    epsilon: float | None = option()
    similarity: str = option()
    normalize_embeddings: bool | None = option()
    check_pairs: bool = option()

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: object = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: ``[N, D]``.
            labels: ``[N]`` integers; not needed with ``indices_tuple``.
            indices_tuple: the pairs or triplets that count, as a miner returns them.
            ref_emb: ``[M, D]`` to pair the rows with, or ``None`` for the rows themselves.
            ref_labels: ``[M]`` integers, given exactly when ``ref_emb`` is; not needed with
                ``indices_tuple``.
        """
        return evaluate_arguments(self.call, embeddings, labels, indices_tuple, ref_emb, ref_labels)

    if TYPE_CHECKING:  # nn.Module's gives Any
        __call__ = forward
