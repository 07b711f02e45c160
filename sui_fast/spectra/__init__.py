"""The kernel matrix seen as a spectrum."""

from .dense import Spectrum, dense_spectrum
from .maps import RANK_FOR, FeatureMap, nystrom_map, sketch_map, subspace_map
from .moments import FeatureSpectrum, Moments, feature_spectrum
from .store import Store, fingerprint_of

__all__ = [
    "RANK_FOR",
    "FeatureMap",
    "FeatureSpectrum",
    "Moments",
    "Spectrum",
    "Store",
    "dense_spectrum",
    "feature_spectrum",
    "fingerprint_of",
    "nystrom_map",
    "sketch_map",
    "subspace_map",
]
