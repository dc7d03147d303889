"""Pruners: a criterion and an allocation under an NNI name."""

from compress.pruners.base import Pruner
from compress.pruners.oneshot import (
    FilterPruner,
    FPGMPruner,
    L1FilterPruner,
    L2FilterPruner,
    LevelPruner,
    RandomFilterPruner,
)

__all__ = [
    "FPGMPruner",
    "FilterPruner",
    "L1FilterPruner",
    "L2FilterPruner",
    "LevelPruner",
    "Pruner",
    "RandomFilterPruner",
]
