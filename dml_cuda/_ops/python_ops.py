"""Ops of the library that are written in Python, for every device."""

from collections.abc import Callable

import torch


def python_op(schema: str) -> Callable[[Callable], Callable]:
    """Registers a function as the op of a schema: to derive one from annotations takes long at import."""
    name, _, rest = schema.partition("(")
    torch.library.define(f"dml_cuda::{name}", f"({rest}")

    def register(function: Callable) -> Callable:
        torch.library.impl(f"dml_cuda::{name}", "CompositeExplicitAutograd", function)
        return function

    return register
