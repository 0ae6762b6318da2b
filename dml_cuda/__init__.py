"""Deep-metric-learning losses as fused kernels: forward and backward without the N x N matrix."""

import importlib
from typing import TYPE_CHECKING, Any

from ._extension import _C  # first: it explains why the extension cannot be loaded

# isort: split
from . import distributed, functional, reference
from ._inputs.options import PairOptions
from .losses._ranking import RankingOptions
from .losses._triplet import TripletOptions
from .losses._two_towers import TowerOptions
from .losses.binomial_deviance import BinomialDevianceLoss
from .losses.circle import CircleLoss
from .losses.circle_classifier import CircleClassifierLoss
from .losses.clip import CLIPLoss
from .losses.contrastive import ContrastiveLoss
from .losses.fast_ap import FastAPLoss
from .losses.info_nce import InfoNCELoss
from .losses.lifted_pairs import LiftedStructureLoss
from .losses.lifted_structure import GeneralizedLiftedStructureLoss
from .losses.margin import MarginLoss
from .losses.margin_softmax import ArcFaceLoss, CosFaceLoss, NormalizedSoftmaxLoss
from .losses.multi_similarity import MultiSimilarityLoss
from .losses.n_pairs import NPairsLoss
from .losses.nca import NCALoss
from .losses.nt_xent import NTXentLoss
from .losses.proxy_anchor import ProxyAnchorLoss
from .losses.proxy_nca import ProxyNCALoss
from .losses.ranked_list import RankedListLoss
from .losses.recall_at_k import RecallAtKLoss
from .losses.siglip import SigLIPLoss
from .losses.smooth_ap import SmoothAPLoss
from .losses.soft_triple import SoftTripleLoss
from .losses.sphere_face import SphereFaceLoss
from .losses.sub_center_arc_face import SubCenterArcFaceLoss
from .losses.sup_con import SupConLoss
from .losses.triplet_margin import TripletMarginLoss
from .losses.tuplet_margin import TupletMarginLoss
from .memory import CrossBatchMemory
from .miners.mined_pairs import MinedPairs, PairCounts
from .miners.mined_triplets import MinedTriplets, SelectedPairs
from .miners.pairs import MultiSimilarityMiner
from .miners.triplets import (
    BatchEasyHardMiner,
    BatchHardMiner,
    DistanceWeightedMiner,
    PairMarginMiner,
    TripletMarginMiner,
)

if TYPE_CHECKING:
    from . import custom as custom
    from .custom import check_loss, compile_loss

__version__: str = _C.version

__all__ = [
    "ArcFaceLoss",
    "BatchEasyHardMiner",
    "BatchHardMiner",
    "BinomialDevianceLoss",
    "CLIPLoss",
    "CircleClassifierLoss",
    "CircleLoss",
    "ContrastiveLoss",
    "CosFaceLoss",
    "CrossBatchMemory",
    "DistanceWeightedMiner",
    "FastAPLoss",
    "GeneralizedLiftedStructureLoss",
    "InfoNCELoss",
    "LiftedStructureLoss",
    "MarginLoss",
    "MinedPairs",
    "MinedTriplets",
    "MultiSimilarityLoss",
    "MultiSimilarityMiner",
    "NCALoss",
    "NPairsLoss",
    "NTXentLoss",
    "NormalizedSoftmaxLoss",
    "PairCounts",
    "PairMarginMiner",
    "PairOptions",
    "ProxyAnchorLoss",
    "ProxyNCALoss",
    "RankedListLoss",
    "RankingOptions",
    "RecallAtKLoss",
    "SelectedPairs",
    "SigLIPLoss",
    "SmoothAPLoss",
    "SoftTripleLoss",
    "SphereFaceLoss",
    "SubCenterArcFaceLoss",
    "SupConLoss",
    "TowerOptions",
    "TripletMarginLoss",
    "TripletMarginMiner",
    "TripletOptions",
    "TupletMarginLoss",
    "build_info",
    "check_loss",
    "compile_loss",
    "distributed",
    "functional",
    "reference",
]


def __dir__() -> list[str]:
    """The public names, without the modules that imports leave here."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def build_info() -> dict:
    """The versions that this installation was built with, and its kernels.

    Returns:
        A dict of ``version``; ``torch``, the version built against; ``cuda``, ``None`` or a dict of
        ``version`` and ``architectures``; ``cpu``, a dict of the instruction sets ``available`` on this
        machine and the one ``in_use``.
    """
    cuda = None
    if _C.cuda_version:
        cuda = {"version": _C.cuda_version, "architectures": _C.cuda_archs.split(";")}
    return {
        "version": _C.version,
        "torch": _C.torch_version,
        "cuda": cuda,
        "cpu": {"available": _C.cpu_instruction_sets(), "in_use": _C.cpu_instruction_set()},
    }


def __getattr__(name: str) -> Any:
    """Imports what compiles custom losses on first use: most programs compile none."""
    if name not in ("custom", "check_loss", "compile_loss"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(".custom", __name__)
    return module if name == "custom" else getattr(module, name)
