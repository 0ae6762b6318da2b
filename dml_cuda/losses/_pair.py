"""What the pair losses share: a formula with its options as a function and as a module."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .._inputs.checks import check_parameter, is_per_class
from .._inputs.options import NAMES, PairOptions, check_options
from .._ops.arguments import op_options
from .._ops.evaluate import Call, evaluate_arguments
from ._formula import Formula


def check_parameters(formula: type[Formula], values: Mapping[str, Any]) -> None:
    """Raises TypeError or ValueError for one that cannot be, where that can be known."""
    for name, check in formula.parameters.items():
        check_parameter(name, values[name], check, name in formula.per_class)


def make_call(
    formula: type[Formula],
    values: Mapping[str, Any],
    options: Mapping[str, Any],
    dynamic_params: bool = False,
) -> Call:
    """Raises TypeError or ValueError for a parameter or an option that cannot be."""
    check_parameters(formula, values)
    defaults = {"similarity": formula.similarity, "reduction": formula.reduction}
    checked = check_options(options, **defaults, parameters=formula.parameters)
    similarity = checked.measure
    as_op = op_options(formula.name, formula.params(values, similarity), similarity, checked)
    return Call(formula, checked, as_op, dynamic_params, as_op.learns)


_PLAIN = frozenset({float, int, bool, str, type(None)})
_MOST_REMEMBERED = 256
_remembered: dict[tuple[Any, ...], Call] = {}


def function_call(formula: type[Formula], values: Mapping[str, Any], options: Mapping[str, Any]) -> Call:
    """:func:`make_call` of a loss as a function.

    Remembered for plain values: checks would take a quarter of a small batch's time."""
    given = *values.values(), *options.values()
    types = tuple(map(type, given))
    if torch.compiler.is_compiling() or not _PLAIN.issuperset(types):
        return make_call(formula, values, options, dynamic_params=True)
    key = formula, given, types, *options  # the types too, as 1 == True
    call = _remembered.get(key)
    if call is None:
        call = make_call(formula, values, options, dynamic_params=True)
        if len(_remembered) >= _MOST_REMEMBERED:  # a parameter that is scheduled
            _remembered.clear()
        _remembered[key] = call
    return call


def pair_loss(
    formula: type[Formula],
    values: Mapping[str, Any],
    options: PairOptions,
    embeddings: Tensor,
    labels: Tensor | None,
    indices_tuple: object,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    row_weights: Tensor | None = None,
) -> Tensor:
    """The loss as a function: a formula with its parameters by name, applied to a batch."""
    call = function_call(formula, values, options)
    return evaluate_arguments(call, embeddings, labels, indices_tuple, ref_emb, ref_labels, row_weights)


class _Option:
    """An option of a module: an attribute that is checked when it is set."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: "LossModule | None", owner: type | None = None) -> Any:
        return self if module is None else module.get_option(self.name)

    def __set__(self, module: "LossModule", value: object) -> None:
        module.set_option(self.name, value)


def option() -> Any:
    """An attribute of :class:`LossModule` that is one of its options."""
    return _Option()


def described(options: Mapping[str, Any]) -> str:
    """Options by name, as ``repr`` of a module shows them."""

    def shown(value: Any) -> str:
        if not isinstance(value, Tensor):
            return repr(value)
        is_number = value.numel() == 1 and not hasattr(value, "full_tensor")  # which a DTensor would gather
        return repr(value.item()) if is_number else f"tensor of {value.numel()}"

    return ", ".join(f"{name}={shown(value)}" for name, value in options.items())


class LossModule(nn.Module):
    """The parameters of a loss, of which those that learn are the module's too."""

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[str, Any] = {}

    def _keep(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            learns = isinstance(value, nn.Parameter)
            self._values[name] = None if learns else value
            if learns:
                self._parameters[name] = value
            else:
                self._parameters.pop(name, None)

    @property
    def values(self) -> dict[str, Any]:
        """The parameters of the loss by name."""
        learned = self._parameters
        return {name: learned.get(name, value) for name, value in self._values.items()}

    def get_option(self, name: str) -> Any:
        raise NotImplementedError

    def set_option(self, name: str, value: object) -> None:
        raise NotImplementedError

    def __setattr__(self, name: str, value: object) -> None:
        # nn.Module would not leave a Parameter, nor what replaces one, to a property of the class.
        if isinstance(getattr(type(self), name, None), _Option | property):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


class FormulaModule(LossModule):
    """A formula with its parameters and options as a module.

    Every parameter and option is an attribute, readable and settable, and checked when it is set. A parameter
    of the formula that learns is one of the module's too. ``call`` holds them as the ops take them.
    """

    formula: ClassVar[type[Formula]]

    reduction: str = option()
    backend: str = option()

    def __init__(self, options: Mapping[str, Any], **values: Any) -> None:
        super().__init__()
        self._set(values, options, dynamic_params=False)

    def _set(self, values: Mapping[str, Any], options: Mapping[str, Any], dynamic_params: bool) -> None:
        check_parameters(self.formula, values)
        # It only remembers which parameters are tensors: their values are those of the call.
        numbers = {name: torch.ones(()) if isinstance(x, Tensor) else x for name, x in values.items()}
        self._call = make_call(self.formula, numbers, options, dynamic_params=dynamic_params)
        self._keep(values)

    @property
    def call(self) -> Call:
        if not self._call.learns:
            return self._call
        values, call = self.values, self._call
        check_parameters(self.formula, values)
        if any(map(is_per_class, values.values())):
            call = call._replace(formula=self.formula.of_classes)
        return call.with_values(values)

    def get_option(self, name: str) -> Any:
        return getattr(self._call.options, name) if name in NAMES else self.values[name]

    def set_option(self, name: str, value: object) -> None:
        values, options = self.values, self._call.options._asdict()
        if name in NAMES:
            options[name] = value
        else:
            values[name] = value
        # An option that was set may be set again at every step: no graph should be compiled for each value.
        self._set(values, options, dynamic_params=True)

    def extra_repr(self) -> str:
        return described(self.values | self._call.options._asdict())


class PairLoss(FormulaModule):
    """What the pair losses share."""

    epsilon: float | None = option()
    similarity: str = option()
    normalize_embeddings: bool | None = option()
    check_pairs: bool = option()
    class_weights: Tensor | None = option()
    cache_bytes: int | None = option()

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: object = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        row_weights: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: ``[N, D]``.
            labels: ``[N]`` integers; not needed with ``indices_tuple``.
            indices_tuple: the pairs or triplets that count, as a miner returns them.
            ref_emb: ``[M, D]`` to pair the rows with, or ``None`` for the rows themselves.
            ref_labels: ``[M]`` integers, given exactly when ``ref_emb`` is; not needed with
                ``indices_tuple``.
            row_weights: ``[N]`` factors of the rows' losses; of every pair of a row, where a loss averages
                over pairs. What a mean divides by stays as it is.
        """
        batch = embeddings, labels, indices_tuple, ref_emb, ref_labels, row_weights
        return evaluate_arguments(self.call, *batch)

    if TYPE_CHECKING:  # nn.Module's gives Any
        __call__ = forward
