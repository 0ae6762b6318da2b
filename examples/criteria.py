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
    "triplet": ("TripletMarginLoss", "triplet margin"),
    "margin": ("MarginLoss", "margin"),
}
LOSSES = {name: f"{title}, dml_cuda" for name, (_, title) in _CLASSES.items()} | {
    f"pml-{name}": f"{title}, pytorch-metric-learning"
    for name, (of, title) in _CLASSES.items()
    if hasattr(pml_losses, of)
}

# By their name in --miner: their class, what it is called and what of the paper's it is given.
MINERS = {
    "multi_similarity": ("MultiSimilarityMiner", "mined with epsilon {epsilon}", {}),
    "batch_hard": ("BatchHardMiner", "batch-hard triplets", {}),
    "semihard": ("TripletMarginMiner", "semi-hard triplets", {"type_of_triplets": "semihard"}),
    "distance_weighted": ("DistanceWeightedMiner", "distance-weighted triplets", {}),
}
# Where none is chosen.
DEFAULT_MINERS = {"ms": "multi_similarity", "triplet": "semihard", "margin": "distance_weighted"}

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
    miner: str | None,
    epsilon: float,
    gamma: float,
    embedding_size: int,
    memory: int = 0,
    distributed: bool = False,
) -> nn.Module:
    """A module to call with embeddings and labels.

    Both libraries' classes have the same names, the same arguments and the same defaults.

    Args:
        name: one of ``LOSSES``.
        miner: one of ``MINERS``, or ``None`` to keep every pair or triplet.
        epsilon: the margin of the multi-similarity miner.
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
    find = None
    if miner is not None:
        cls, _, options = MINERS[miner]
        find = getattr(miners, cls)(
            **options, **({"epsilon": epsilon} if miner == "multi_similarity" else {})
        )
    if memory:
        return losses.CrossBatchMemory(loss, embedding_size, memory, miner=find)
    return _Mined(loss, find)
