"""The losses in plain PyTorch: the readable truth that the kernels are tested against."""
