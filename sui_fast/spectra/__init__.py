"""The kernel matrix seen as a spectrum."""

from .dense import Spectrum, dense_spectrum

__all__ = ["Spectrum", "dense_spectrum"]
