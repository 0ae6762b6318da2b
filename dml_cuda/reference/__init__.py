"""The losses in plain PyTorch, which the kernels are tested against."""

from .pairs import pair_loss

__all__ = ["pair_loss"]
