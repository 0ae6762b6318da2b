"""The losses, one a file: its formula, its function and its module."""

from .binomial_deviance import BinomialDevianceLoss, binomial_deviance_loss
from .circle import CircleLoss, circle_loss
from .circle_classifier import CircleClassifierLoss
from .contrastive import ContrastiveLoss, contrastive_loss
from .lifted_structure import GeneralizedLiftedStructureLoss, generalized_lifted_structure_loss
from .margin import MarginLoss, margin_loss
from .margin_softmax import ArcFaceLoss, CosFaceLoss, NormalizedSoftmaxLoss
from .multi_similarity import MultiSimilarityLoss, multi_similarity_loss
from .nt_xent import NTXentLoss, nt_xent_loss
from .proxy_anchor import ProxyAnchorLoss
from .proxy_nca import ProxyNCALoss
from .soft_triple import SoftTripleLoss
from .sup_con import SupConLoss, sup_con_loss
from .triplet_margin import TripletMarginLoss, triplet_margin_loss

__all__ = [
    "ArcFaceLoss",
    "BinomialDevianceLoss",
    "CircleClassifierLoss",
    "CircleLoss",
    "ContrastiveLoss",
    "CosFaceLoss",
    "GeneralizedLiftedStructureLoss",
    "MarginLoss",
    "MultiSimilarityLoss",
    "NTXentLoss",
    "NormalizedSoftmaxLoss",
    "ProxyAnchorLoss",
    "ProxyNCALoss",
    "SoftTripleLoss",
    "SupConLoss",
    "TripletMarginLoss",
    "binomial_deviance_loss",
    "circle_loss",
    "contrastive_loss",
    "generalized_lifted_structure_loss",
    "margin_loss",
    "multi_similarity_loss",
    "nt_xent_loss",
    "sup_con_loss",
    "triplet_margin_loss",
]
