"""From a checked batch to a result: which kernels or reference, and what PyTorch must know of the ops."""

from . import listed_pair_ops, pair_ops, triplet_ops  # noqa: F401  they register fake kernels and derivatives
