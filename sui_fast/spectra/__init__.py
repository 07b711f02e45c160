"""The kernel matrix seen as a spectrum."""

from .anchors import INNER, anchored_sketch_map, beside_directions, pool_size, reduced_sketch_map
from .dense import Spectrum, dense_spectrum
from .maps import RANK_FOR, FeatureMap, nystrom_map, sketch_map, sketch_rank, subspace_columns, subspace_map
from .moments import FeatureSpectrum, Moments, feature_spectrum
from .projections import PROJECTIONS, project, projection_matrix
from .store import Store, fingerprint_of

__all__ = [
    "INNER",
    "PROJECTIONS",
    "RANK_FOR",
    "FeatureMap",
    "FeatureSpectrum",
    "Moments",
    "Spectrum",
    "Store",
    "anchored_sketch_map",
    "beside_directions",
    "dense_spectrum",
    "feature_spectrum",
    "fingerprint_of",
    "nystrom_map",
    "pool_size",
    "project",
    "projection_matrix",
    "reduced_sketch_map",
    "sketch_map",
    "sketch_rank",
    "subspace_columns",
    "subspace_map",
]
