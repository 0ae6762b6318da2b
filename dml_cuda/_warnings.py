"""Warnings that are given once each and point at the caller's line."""

import sys
import warnings

from ._ops.constant_result import constant_result

_SKIPPED_PACKAGES = {"dml_cuda", "torch", "pytorch_metric_learning"}
_given: set[str] = set()


def _caller_depth() -> int:
    """The stack level of the innermost frame outside this package, torch and pytorch-metric-learning."""
    depth = 1
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _SKIPPED_PACKAGES:
        frame = frame.f_back
        depth += 1
    return depth - 1  # without this function's frame


@constant_result  # compiled code warns at compile time, without a graph break
def warn_once(message: str) -> None:
    """Warns, unless the same message was given before."""
    if message not in _given:
        _given.add(message)
        warnings.warn(message, stacklevel=_caller_depth())
