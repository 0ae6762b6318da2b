"""Losses of a batch that is spread over several processes: exactly the value and the gradient of one."""

from .loss import DistributedLoss

__all__ = ["DistributedLoss"]
