"""Custom losses: a formula in C++, compiled into the kernels of the package.

``compile_loss`` and ``check_loss`` are exported by ``dml_cuda`` too. ``Formula``, ``Pairs``, ``Part`` and
``softplus`` are what a reference in PyTorch is written with.
"""

import inspect
import keyword
import os
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, ClassVar, NamedTuple

from .. import _C
from .._inputs.checks import check_number
from .._inputs.options import NAMES, check_names, check_options
from ..losses._formula import Formula, Pairs, Part, softplus
from ..losses._pair import PairLoss, option
from ..losses.multi_similarity import MultiSimilarityLoss
from . import build
from .check import check_loss
from .formula import CompiledFormula
from .source import parameters, read

__all__ = ["CustomLoss", "Formula", "Pairs", "Part", "check_loss", "compile_loss", "softplus"]


class Origin(NamedTuple):
    """The arguments of :func:`compile_loss` that made a class."""

    text: str
    reference: type[Formula] | None
    name: str


class CustomLoss(PairLoss):
    """Base class of what :func:`compile_loss` returns: a module, made with its parameters and options."""

    origin: ClassVar[Origin]
    signature: ClassVar[inspect.Signature]  # of the parameters

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        check_names(keywords, (*self.signature.parameters, *NAMES))
        options = {name: keywords.pop(name) for name in NAMES if name in keywords}
        try:
            bound = self.signature.bind(*arguments, **keywords)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}{self.signature}: {error}") from None
        bound.apply_defaults()
        super().__init__(options, **bound.arguments)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """Pickles the source, as the class is not an attribute of any module."""
        arguments = {**self.values, **self._call.options._asdict()}
        state = {name: value for name, value in self.__dict__.items() if name not in ("_call", "_values")}
        return _rebuild, (self.origin, arguments, self._call.dynamic_params), state


def _rebuild(origin: Origin, arguments: Mapping[str, Any], dynamic_params: bool) -> CustomLoss:
    loss = compile_loss(origin.text, origin.reference, name=origin.name)(**arguments)
    loss._call = loss._call._replace(dynamic_params=dynamic_params)
    return loss


def _signature(defaults: Mapping[str, float | None]) -> inspect.Signature:
    kind, required = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    return inspect.Signature(
        [
            inspect.Parameter(name, kind, default=required if default is None else default)
            for name, default in defaults.items()
        ]
    )


def _constructor(defaults: Mapping[str, float | None], formula: type[Formula]) -> Callable[..., None]:
    """``CustomLoss.__init__`` with the signature of a loss: its parameters and the options."""

    def __init__(self: CustomLoss, *arguments: Any, **keywords: Any) -> None:
        CustomLoss.__init__(self, *arguments, **keywords)

    kind = inspect.Parameter
    checked = check_options({}, similarity=formula.similarity, reduction=formula.reduction)
    options = [kind(name, kind.KEYWORD_ONLY, default=value) for name, value in checked._asdict().items()]
    own = kind("self", kind.POSITIONAL_OR_KEYWORD)
    __init__.__signature__ = inspect.Signature([own, *_signature(defaults).parameters.values(), *options])
    return __init__


@cache
def _taken_names() -> dict[str, str]:
    """The names that a parameter cannot have, and what has them."""
    attributes = {*dir(CustomLoss), *vars(MultiSimilarityLoss())}
    return {
        **dict.fromkeys(attributes, "an attribute of every loss"),
        **dict.fromkeys(inspect.signature(CustomLoss.forward).parameters, "an argument of every loss"),
        **dict.fromkeys(NAMES, "an option of every loss"),
        **dict.fromkeys(keyword.kwlist, "a Python keyword"),
    }


def _check_parameters(names: Iterable[str]) -> None:
    """Raises ValueError for a parameter that could not be set by its name."""
    for name in names:
        if name in _taken_names():
            raise ValueError(
                f"kParams: expected another name than {name} for a parameter: it is {_taken_names()[name]}"
            )


def _make_formula(
    op: str, defaults: Mapping[str, float | None], reference: type[Formula] | None
) -> type[Formula]:
    """The formula named ``op`` in the ops, as a class."""
    facts = _C.formula_facts(op)[1]
    members: dict[str, Any] = {"name": op, "on_cuda": facts["cuda"], "facts": facts}
    members["log_one_plus"] = facts["log_one_plus"]
    checks = getattr(reference, "parameters", None)
    if checks is None:
        members["parameters"] = dict.fromkeys(defaults, check_number)
    elif list(checks) != list(defaults):
        raise ValueError(
            f"reference: expected the parameters that the struct names, {', '.join(defaults)}; got "
            f"{', '.join(checks)}"
        )
    if reference is not None:
        return type(reference.__name__, (reference,), members)
    return type("Formula", (CompiledFormula,), {**members, "repeats": facts["counts_pairs"]})


def compile_loss(
    source: str | os.PathLike[str], reference: type[Formula] | None = None, *, name: str | None = None
) -> type[CustomLoss]:
    """Compiles a custom loss: its formula in C++, inside the kernels of this package.

    >>> UnifiedLoss = dml_cuda.compile_loss("unified.h")
    >>> loss_fn = UnifiedLoss(scale=16.0, epsilon=0.1)
    >>> loss = loss_fn(embeddings, labels)

    The result works like any loss of the package: parameters by name, the options of
    :class:`dml_cuda.PairOptions`, ``ref_emb``, ``indices_tuple``, memory, several processes,
    ``torch.compile``, autocast. ``docs/custom_loss.md`` leads from an equation to a trained model.

    The first call compiles. It needs a C++ compiler and ninja and takes some seconds; for CUDA kernels it
    also needs nvcc and takes one or two minutes. The library is cached in ``DML_CUDA_CACHE``
    (``~/.cache/dml_cuda`` by default) under a hash of the formula, the package, torch and the machine, and
    shared by all processes.

    Args:
        source: one struct like those in ``csrc/losses``, as text or as the path of a file. It must be
            self-contained: the hash does not cover files that it includes.
        reference: the same formula in PyTorch, a subclass of :class:`dml_cuda.custom.Formula` with
            ``row``. Optional. :func:`check_loss` compares with it; its ``parameters`` (checks), ``levels``,
            ``similarity``, ``reduction`` and ``repeats`` are used; ``backend="reference"`` has second
            derivatives; and pairs listed on a GPU stay there.
        name: the name of the returned class; the struct's by default.

    Returns:
        A subclass of :class:`dml_cuda.custom.CustomLoss`: ``loss_fn = UnifiedLoss(**parameters, **options)``.
        Parameters without a default in ``kParams`` are required.

    Raises:
        TypeError, ValueError: the source is not a formula or does not compile; the message has the
            compiler's errors, with line numbers of the source.
        OSError: the source cannot be read or the cache cannot be written.
        RuntimeError: no compiler or no ninja was found.
    """
    if reference is not None and not (isinstance(reference, type) and issubclass(reference, Formula)):
        raise TypeError(f"reference: expected a subclass of dml_cuda.custom.Formula, got {reference!r}")
    if name is not None and not (isinstance(name, str) and name.isidentifier()):
        raise ValueError(f"name: expected a Python identifier, got {name!r}")
    read_source = read(source)
    if read_source.declaration is not None:  # before the compiler runs; _make_loss checks what was compiled
        _check_parameters(parameters(read_source.declaration))
    op = build.load(read_source)
    return _make_loss(op, read_source.text, reference, name or read_source.struct)


@cache
def _make_loss(op: str, text: str, reference: type[Formula] | None, title: str) -> type[CustomLoss]:
    defaults = parameters(_C.formula_facts(op)[0])
    _check_parameters(defaults)
    formula = _make_formula(op, defaults, reference)
    members: dict[str, Any] = {name: option() for name in defaults}
    members |= {
        "__doc__": f"{title}, a custom loss; see :func:`dml_cuda.compile_loss`.",
        "formula": formula,
        "origin": Origin(text, reference, title),
        "signature": _signature(defaults),
        "__init__": _constructor(defaults, formula),
    }
    return type(title, (CustomLoss,), members)
