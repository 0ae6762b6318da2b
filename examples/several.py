"""What a training over several processes needs beside DistributedDataParallel, for ``--distributed``.

Every process draws the same batches and keeps its rows, so that the whole batch is that of one process.
"""

import gc

import torch
import torch.distributed as dist
from torch import Tensor, nn

if dist.is_available():
    # Its functions keep the group that there is at their first import, and with it the threads of that.
    import torch.distributed.nn


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


def start(device: str) -> torch.device:
    """Joins the processes that torchrun started; returns this one's device."""
    if device == "cpu":
        dist.init_process_group("gloo")
        return torch.device("cpu")
    local = torch.device("cuda", dist.get_node_local_rank(fallback_rank=0))
    torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl")
    return local


def stop() -> None:
    """Ends what :func:`start` began, once nothing uses it any more.

    A thread of the group that is still at work when the interpreter ends may abort the process.
    """
    if _several():
        gc.collect()
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this process is the one that speaks and writes."""
    return not _several() or dist.get_rank() == 0


def own_rows(*whole: Tensor) -> list[Tensor]:
    """This process's rows of a batch."""
    if not _several():
        return list(whole)
    return [x.tensor_split(dist.get_world_size())[dist.get_rank()] for x in whole]


class _Sum(torch.autograd.Function):
    """The sum over the processes; its gradient, that of the sum of what all make of it."""

    @staticmethod
    def forward(ctx, own: Tensor) -> Tensor:
        total = own.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Sum.apply(grad)


class WholeBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation by the mean and the variance of all processes' rows, on any device
    (torch.nn.SyncBatchNorm is for GPUs)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dims = 0, 2, 3
        count = _Sum.apply(x.new_tensor([float(x.numel() // x.shape[1])]))
        mean = _Sum.apply(x.sum(dims)) / count
        centred = x - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum(dims)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return centred * scale[:, None, None] + self.bias[:, None, None]


def normalise_whole_batches(network: nn.Module) -> nn.Module:
    """Makes the layers of batch normalisation see the whole batch."""
    for name, layer in network.named_children():
        if not isinstance(layer, nn.BatchNorm2d):
            normalise_whole_batches(layer)
            continue
        whole = WholeBatchNorm2d(layer.num_features, layer.eps, layer.momentum).to(layer.weight)
        whole.load_state_dict(layer.state_dict())
        setattr(network, name, whole)
    return network
