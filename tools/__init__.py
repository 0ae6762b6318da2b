"""Checks that are no benchmarks."""
