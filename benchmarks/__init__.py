"""Fused losses against the matmuls in them and against other code: ``python -m benchmarks``."""
