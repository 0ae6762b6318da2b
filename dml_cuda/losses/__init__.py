"""The losses, one a file: its formula, its function and its module.

It imports none of them: so ``reference`` and ``miners``, which the losses need, can import ``_formula`` and
``_pair`` from here.
"""

from .._exports import lazy_exports

__all__ = [
    "ArcFaceLoss",
    "BinomialDevianceLoss",
    "CLIPLoss",
    "CircleClassifierLoss",
    "CircleLoss",
    "ContrastiveLoss",
    "CosFaceLoss",
    "GeneralizedLiftedStructureLoss",
    "InfoNCELoss",
    "MarginLoss",
    "MultiSimilarityLoss",
    "NTXentLoss",
    "NormalizedSoftmaxLoss",
    "ProxyAnchorLoss",
    "ProxyNCALoss",
    "SigLIPLoss",
    "SoftTripleLoss",
    "SupConLoss",
    "TripletMarginLoss",
]
__getattr__, __dir__ = lazy_exports(__name__, __all__)
