"""Miners, and what they return. ``dml_cuda`` exports the public classes."""
