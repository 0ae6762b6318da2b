"""Miners, and what they return."""

from .._exports import lazy_exports

__all__ = [
    "BatchEasyHardMiner",
    "BatchHardMiner",
    "DistanceWeightedMiner",
    "MinedPairs",
    "MinedTriplets",
    "MultiSimilarityMiner",
    "PairCounts",
    "PairMarginMiner",
    "SelectedPairs",
    "TripletMarginMiner",
]
__getattr__, __dir__ = lazy_exports(__name__, __all__)
