"""Programs that use dml_cuda on real data."""
