"""Derivatives of the ops that are registered from Python, also under the transforms of torch.func.

The derivative of pair_loss is not among them: csrc/torch/autograd.cpp holds it, for transforms too.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

from .. import _C  # noqa: F401  loading it registers torch.ops.dml_cuda

_LIBRARY = torch.library.Library("dml_cuda", "FRAGMENT")
_DERIVATIVES: dict[str, tuple[Callable, Callable]] = {}  # backward and setup_context of an op


def _no_vmap(info, in_dims, *arguments):
    raise NotImplementedError(
        "the fused losses of dml_cuda take one batch at a time, not torch.vmap: call them in a loop, or pass "
        'backend="reference"'
    )


def _no_jvp(ctx, *tangents):
    raise NotImplementedError(
        "the fused losses of dml_cuda have no forward-mode derivative: differentiate in reverse, or pass "
        'backend="reference"'
    )


def no_second_derivative(ctx, *_):
    raise RuntimeError(
        "the fused losses of dml_cuda have no second derivative: "
        'pass backend="reference" to differentiate their gradient'
    )


class _FirstDerivative(torch.autograd.Function):
    """A gradient by some points, as it is; it cannot be differentiated by them again."""

    @staticmethod
    def forward(gradient, *points):
        return gradient.clone()

    setup_context = staticmethod(lambda ctx, inputs, output: None)
    backward = staticmethod(no_second_derivative)


def first_derivative(gradient: Tensor, *points: Tensor | None) -> Tensor:
    """A gradient that a backward pass returns: differentiating it by ``points`` is an error that says why."""
    # Without a graph of the gradient there is no second derivative to be refused.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _FirstDerivative.apply(gradient, *points)
    return gradient


def save_nothing(ctx, inputs, output) -> None:
    """The context of an op without a derivative."""


def register_derivative(name: str, backward: Callable, setup_context: Callable = save_nothing) -> None:
    """Gives an op its derivative: for the dispatcher, and for the transforms, which do not see that one."""

    @cache
    def kernel() -> Callable:
        op = getattr(torch.ops.dml_cuda, name).default
        return make_autograd_impl(op, Info(backward, setup_context))

    # Made on first use: torch.library.register_autograd makes it at once, which took a quarter of the time of
    # importing dml_cuda.
    _LIBRARY.impl(name, lambda *given, **named: kernel()(*given, **named), "Autograd", with_keyset=True)
    _DERIVATIVES[name] = backward, setup_context


@cache
def _function(name: str) -> type[torch.autograd.Function]:
    """An op as the transforms take it; made on first use, as such a class takes long to make."""
    op = getattr(torch.ops.dml_cuda, name).default
    backward, setup_context = _DERIVATIVES[name]
    members = {
        "forward": lambda *arguments: op(*arguments),
        "setup_context": setup_context,
        "backward": backward,
        "vmap": _no_vmap,
        "jvp": _no_jvp,
    }
    return type(name, (torch.autograd.Function,), {k: staticmethod(f) for k, f in members.items()})


def call(name: str, *arguments):
    """An op with a derivative from Python, as plain autograd, torch.compile or a transform needs it."""
    if not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    ):
        return _function(name).apply(*arguments)
    return getattr(torch.ops.dml_cuda, name).default(*arguments)
