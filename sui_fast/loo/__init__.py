"""Leave-one-out: what changes when samples are removed."""

from .removal import Removal
from .solve import leave_one_out

__all__ = ["Removal", "leave_one_out"]
