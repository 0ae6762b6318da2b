"""pytorch-metric-learning's own classes, computed by the kernels of dml_cuda.

Each class subclasses the one of the same name and replaces only its computation, so reducers,
regularisers, ``collect_stats``, ``isinstance`` checks, ``CrossBatchMemory`` and
``DistributedLossWrapper`` go on working. Needs ``pip install "./[pml]"`` in a clone (version 2.9).

Where the kernels lack something (a distance, a reducer of pairs' losses, a method that a subclass replaces),
pytorch-metric-learning computes, and one warning says so.

One result differs: pytorch-metric-learning gives 0 for a batch in which a miner leaves one pair of each
kind at most. To know that, the pairs would have to be counted, so here such pairs have their loss.

>>> from dml_cuda.pml import MultiSimilarityLoss, MultiSimilarityMiner
>>> miner, loss_fn = MultiSimilarityMiner(epsilon=0.1), MultiSimilarityLoss(reducer=reducers.SumReducer())
>>> loss = loss_fn(embeddings, labels, miner(embeddings, labels))
"""

from .losses import (
    ArcFaceLoss,
    CircleLoss,
    ContrastiveLoss,
    CosFaceLoss,
    GeneralizedLiftedStructureLoss,
    MultiSimilarityLoss,
    NormalizedSoftmaxLoss,
    NTXentLoss,
    ProxyAnchorLoss,
    ProxyNCALoss,
    SoftTripleLoss,
    SupConLoss,
)
from .miners import (
    BatchEasyHardMiner,
    BatchHardMiner,
    DistanceWeightedMiner,
    MultiSimilarityMiner,
    PairMarginMiner,
    TripletMarginMiner,
)
from .triplets import MarginLoss, TripletMarginLoss

__all__ = [
    "ArcFaceLoss",
    "BatchEasyHardMiner",
    "BatchHardMiner",
    "CircleLoss",
    "ContrastiveLoss",
    "CosFaceLoss",
    "DistanceWeightedMiner",
    "GeneralizedLiftedStructureLoss",
    "MarginLoss",
    "MultiSimilarityLoss",
    "MultiSimilarityMiner",
    "NTXentLoss",
    "NormalizedSoftmaxLoss",
    "PairMarginMiner",
    "ProxyAnchorLoss",
    "ProxyNCALoss",
    "SoftTripleLoss",
    "SupConLoss",
    "TripletMarginLoss",
    "TripletMarginMiner",
]
