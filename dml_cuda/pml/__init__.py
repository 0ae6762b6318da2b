"""pytorch-metric-learning's own classes, computed by the kernels of dml_cuda.

Each class subclasses the one of the same name and replaces its computation only. Reducers, regularisers,
``collect_stats``, ``isinstance`` checks, ``CrossBatchMemory`` and ``DistributedLossWrapper`` work as before.
Requires pytorch-metric-learning 2.9: ``pip install "./[pml]"`` in a clone.

If the kernels do not support something (a distance, a reducer of pair losses, an overridden method),
pytorch-metric-learning computes the loss, and one warning says so.

One result differs: pytorch-metric-learning gives 0 for a batch in which a miner keeps at most one pair of
each kind. Detecting that would synchronise with the device, so here such pairs have their loss.

>>> from dml_cuda.pml import MultiSimilarityLoss, MultiSimilarityMiner
>>> miner, loss_fn = MultiSimilarityMiner(epsilon=0.1), MultiSimilarityLoss(reducer=reducers.SumReducer())
>>> loss = loss_fn(embeddings, labels, miner(embeddings, labels))
"""

from .class_losses import (
    ArcFaceLoss,
    CosFaceLoss,
    NormalizedSoftmaxLoss,
    ProxyAnchorLoss,
    ProxyNCALoss,
    SoftTripleLoss,
    SphereFaceLoss,
    SubCenterArcFaceLoss,
)
from .miners import (
    BatchEasyHardMiner,
    BatchHardMiner,
    DistanceWeightedMiner,
    MultiSimilarityMiner,
    PairMarginMiner,
    TripletMarginMiner,
)
from .pair_losses import (
    CircleLoss,
    ContrastiveLoss,
    GeneralizedLiftedStructureLoss,
    LiftedStructureLoss,
    MultiSimilarityLoss,
    NCALoss,
    NPairsLoss,
    NTXentLoss,
    RankedListLoss,
    SupConLoss,
    TupletMarginLoss,
)
from .ranking_losses import FastAPLoss, SmoothAPLoss
from .triplet_losses import MarginLoss, TripletMarginLoss

__all__ = [
    "ArcFaceLoss",
    "BatchEasyHardMiner",
    "BatchHardMiner",
    "CircleLoss",
    "ContrastiveLoss",
    "CosFaceLoss",
    "DistanceWeightedMiner",
    "FastAPLoss",
    "GeneralizedLiftedStructureLoss",
    "LiftedStructureLoss",
    "MarginLoss",
    "MultiSimilarityLoss",
    "MultiSimilarityMiner",
    "NCALoss",
    "NPairsLoss",
    "NTXentLoss",
    "NormalizedSoftmaxLoss",
    "PairMarginMiner",
    "ProxyAnchorLoss",
    "ProxyNCALoss",
    "RankedListLoss",
    "SmoothAPLoss",
    "SoftTripleLoss",
    "SphereFaceLoss",
    "SubCenterArcFaceLoss",
    "SupConLoss",
    "TripletMarginLoss",
    "TripletMarginMiner",
    "TupletMarginLoss",
]
