"""The losses, one a file: its formula, its function and its module.

It imports none of them: so ``reference`` and ``miners``, which the losses need, can import ``_formula`` and
``_pair`` from here.
"""

from .._exports import lazy_exports

__getattr__, __dir__ = lazy_exports(__name__, lambda name: name.endswith("Loss"))
