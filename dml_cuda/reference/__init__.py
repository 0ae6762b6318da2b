"""The losses in plain PyTorch: the readable truth that the kernels are tested against."""

from .pairs import pair_loss

__all__ = ["pair_loss"]
