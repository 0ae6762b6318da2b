"""Formulas of one's own: a loss from its formula, with the kernels of the package."""

import inspect
import os
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, NamedTuple

from .. import _C
from .._inputs.checks import check_number
from .._inputs.options import NAMES
from ..losses._formula import Formula
from ..losses._pair import PairLoss, option
from . import build
from .check import check_loss
from .formula import CompiledFormula
from .source import parameters, read

__all__ = ["CustomLoss", "check_loss", "compile_loss"]


class Origin(NamedTuple):
    """What a loaded loss was made of."""

    text: str
    reference: type[Formula] | None
    name: str


class CustomLoss(PairLoss):
    """What :func:`compile_loss` returns is a subclass of this: a loss, made with its parameters and
    options."""

    origin: ClassVar[Origin]
    signature: ClassVar[inspect.Signature]

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        options = {name: keywords.pop(name) for name in NAMES if name in keywords}
        try:
            bound = self.signature.bind(*arguments, **keywords)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}{self.signature}: {error}") from None
        bound.apply_defaults()
        super().__init__(options, **bound.arguments)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """By what it was made of, as its class has no place to be found in."""
        made = {**self._values, **self.call.options._asdict()}
        rest = {name: value for name, value in self.__dict__.items() if name not in ("call", "_values")}
        return _remake, (self.origin, made, self.call.dynamic_params), rest


def _remake(origin: Origin, made: Mapping[str, Any], dynamic_params: bool) -> CustomLoss:
    loss = compile_loss(origin.text, origin.reference, name=origin.name)(**made)
    loss.call = loss.call._replace(dynamic_params=dynamic_params)
    return loss


def _signature(stated: Mapping[str, float | None]) -> inspect.Signature:
    kind, none = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    return inspect.Signature(
        [
            inspect.Parameter(name, kind, default=none if default is None else default)
            for name, default in stated.items()
        ]
    )


def _make_formula(
    op: str, stated: Mapping[str, float | None], reference: type[Formula] | None
) -> type[Formula]:
    """The formula as the losses take it."""
    facts = _C.formula_facts(op)[1]
    members: dict[str, Any] = {"name": op, "on_cuda": facts["cuda"], "facts": facts}
    checks = getattr(reference, "parameters", None)
    if checks is None:
        members["parameters"] = dict.fromkeys(stated, check_number)
    elif list(checks) != list(stated):
        raise ValueError(
            f"reference: expected the parameters that the struct names, {', '.join(stated)}; got "
            f"{', '.join(checks)}"
        )
    if reference is not None:
        return type(reference.__name__, (reference,), members)
    return type("Formulas", (CompiledFormula,), {**members, "repeats": facts["counts_pairs"]})


def compile_loss(
    source: str | os.PathLike[str], reference: type[Formula] | None = None, *, name: str | None = None
) -> type[CustomLoss]:
    """A loss of your own: its formula in C++, compiled into the kernels of this package.

    >>> NCALoss = dml_cuda.compile_loss("nca.h")
    >>> loss_fn = NCALoss(scale=16.0, epsilon=0.1)
    >>> loss = loss_fn(embeddings, labels)

    What it returns is called and configured like any loss of the package: parameters by name, the options of
    :class:`dml_cuda.PairOptions`, ``ref_emb``, ``indices_tuple``, memory, several processes,
    ``torch.compile``, autocast. ``docs/custom_loss.md`` leads from an equation to a trained model.

    The first call compiles, which takes a C++ compiler, ninja and some seconds (with CUDA kernels nvcc, and
    one or two minutes). The result is kept in ``DML_CUDA_CACHE`` (``~/.cache/dml_cuda`` by default), found by
    a hash of the formula, the package, torch and the machine, and shared by all processes that ask for it.

    Args:
        source: one struct as those of ``csrc/losses``, as text or as the path of a file. It must contain all
            that it needs: files that it includes are not looked at when the cache is searched.
        reference: the same formula in PyTorch, a subclass of :class:`dml_cuda.custom.Formula` with
            ``row``. Optional:
            it checks the formulas (:func:`check_loss`), and its ``parameters`` (checks), ``levels``,
            ``similarity``, ``reduction`` and ``repeats`` count where it has them. With it
            ``backend="reference"`` has second derivatives, and pairs listed on a GPU stay there.
        name: of the class returned; that of the struct by default.

    Returns:
        A class: ``loss_fn = NCALoss(**parameters, **options)``. Parameters without a default in ``kParams``
        must be given.

    Raises:
        TypeError, ValueError, OSError: for what is no formula, does not compile (with the compiler's words on
            your own lines) or cannot be read or kept.
        RuntimeError: where there is no compiler or no ninja.
    """
    if reference is not None and not (isinstance(reference, type) and issubclass(reference, Formula)):
        raise TypeError(f"reference: expected a subclass of dml_cuda.custom.Formula, got {reference!r}")
    if name is not None and not (isinstance(name, str) and name.isidentifier()):
        raise ValueError(f"name: expected a name, got {name!r}")
    read_source = read(source)
    op = build.load(read_source)
    return _make_loss(op, read_source.text, reference, name or read_source.struct)


@cache
def _make_loss(op: str, text: str, reference: type[Formula] | None, title: str) -> type[CustomLoss]:
    stated = parameters(_C.formula_facts(op)[0])
    formula = _make_formula(op, stated, reference)
    members: dict[str, Any] = {each: option() for each in stated}
    members |= {
        "__doc__": f"{title}, a formula of its own; see :func:`dml_cuda.compile_loss`.",
        "formula": formula,
        "origin": Origin(text, reference, title),
        "signature": _signature(stated),
    }
    return type(title, (CustomLoss,), members)
