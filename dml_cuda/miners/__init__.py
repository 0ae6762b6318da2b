"""Miners, and what they return."""

from .._exports import lazy_exports

_RESULTS = ("MinedPairs", "MinedTriplets", "PairCounts", "SelectedPairs")
__getattr__, __dir__ = lazy_exports(__name__, lambda name: name.endswith("Miner") or name in _RESULTS)
