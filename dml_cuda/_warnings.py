"""Warnings that point at the caller's line, once each."""

import sys
import warnings

from ._ops.constant_result import constant_result

_PASSED_OVER = {"dml_cuda", "torch", "pytorch_metric_learning"}
_given: set[str] = set()


def _depth_of_the_caller() -> int:
    """How many frames up the first line is that is neither of this package nor of those that call it."""
    depth = 1
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _PASSED_OVER:
        frame = frame.f_back
        depth += 1
    return depth - 1  # one of them is this function's


@constant_result  # compiled code warns while it is compiled, in one graph
def warn_once(message: str) -> None:
    """Warns of ``message``, the first time."""
    if message not in _given:
        _given.add(message)
        warnings.warn(message, stacklevel=_depth_of_the_caller())
