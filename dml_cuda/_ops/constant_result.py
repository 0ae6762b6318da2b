"""What torch.compile is to make of functions, said without loading it: its import takes as long as PyTorch's
own, which not everybody should wait for who imports dml_cuda."""

from collections.abc import Callable
from typing import TypeVar

_F = TypeVar("_F", bound=Callable)


def constant_result(function: _F) -> _F:
    """As ``torch.compiler.assume_constant_result``: called while a graph is made, and not by the graph."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
