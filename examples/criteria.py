"""The losses to choose from: dml_cuda's, and pytorch-metric-learning's (PML) to compare them with."""

from functools import partial

from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import miners as pml_miners
from torch import Tensor, nn

import dml_cuda
from dml_cuda.distributed import DistributedLoss

_CLASSES = {
    "ms": ("MultiSimilarityLoss", "multi-similarity"),
    "circle": ("CircleLoss", "circle"),
    "contrastive": ("ContrastiveLoss", "contrastive"),
    "lifted": ("GeneralizedLiftedStructureLoss", "generalised lifted structure"),
    "binomial": ("BinomialDevianceLoss", "binomial deviance"),
    "ntxent": ("NTXentLoss", "NT-Xent"),
    "supcon": ("SupConLoss", "SupCon"),
}
LOSSES = {name: f"{title}, dml_cuda" for name, (_, title) in _CLASSES.items()} | {
    f"pml-{name}": f"{title}, pytorch-metric-learning"
    for name, (of, title) in _CLASSES.items()
    if hasattr(pml_losses, of)
}

JOINT = {
    "softmax": dml_cuda.NormalizedSoftmaxLoss,
    "cosface": dml_cuda.CosFaceLoss,
    "arcface": dml_cuda.ArcFaceLoss,
    "softtriple": partial(dml_cuda.SoftTripleLoss, tau=0.2),  # as in its paper
}


class _Mined(nn.Module):
    """A loss on the pairs that a miner keeps."""

    def __init__(self, loss: nn.Module, miner: nn.Module | None) -> None:
        super().__init__()
        self.loss, self.miner = loss, miner

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        pairs = None if self.miner is None else self.miner(embeddings, labels)
        return self.loss(embeddings, labels, pairs)


def make_loss(
    name: str,
    epsilon: float | None,
    gamma: float,
    embedding_size: int,
    memory: int = 0,
    distributed: bool = False,
) -> nn.Module:
    """A module to call with embeddings and labels.

    Both libraries' classes have the same names, the same arguments and the same defaults.

    Args:
        name: one of ``LOSSES``.
        epsilon: the miner's margin, or ``None`` to keep every pair.
        gamma: the scale of circle loss; the others have none.
        embedding_size: the columns of the embeddings.
        memory: how many rows of earlier batches to pair the batch with (cross-batch memory), 0 for none.
        distributed: whether the batch is spread over processes; not with pytorch-metric-learning's losses.
    """
    is_pml = name.startswith("pml-")
    losses, miners = (pml_losses, pml_miners) if is_pml else (dml_cuda, dml_cuda)
    kind = name.removeprefix("pml-")
    loss = getattr(losses, _CLASSES[kind][0])(**({"gamma": gamma} if kind == "circle" else {}))
    if distributed:
        loss = DistributedLoss(loss)
    miner = None if epsilon is None else miners.MultiSimilarityMiner(epsilon=epsilon)
    if memory:
        return losses.CrossBatchMemory(loss, embedding_size, memory, miner=miner)
    return _Mined(loss, miner)
