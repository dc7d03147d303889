"""Pruners: a criterion and an allocation under an NNI name."""

from compress.pruners.activation import (
    ActivationAPoZRankFilterPruner,
    ActivationMeanRankFilterPruner,
    WandaPruner,
)
from compress.pruners.base import Pruner
from compress.pruners.data import OBDFilterPruner, TaylorFOWeightFilterPruner
from compress.pruners.initial import GraSPPruner, SNIPFilterPruner, SNIPPruner
from compress.pruners.oneshot import (
    FilterPruner,
    FPGMPruner,
    L1FilterPruner,
    L2FilterPruner,
    LAMPPruner,
    LevelPruner,
    RandomFilterPruner,
)
from compress.pruners.training import MovementPruner, SlimPruner

# NNI v2's names, where they differ from v1's.
L1NormPruner = L1FilterPruner
L2NormPruner = L2FilterPruner
TaylorFOWeightPruner = TaylorFOWeightFilterPruner
ActivationAPoZRankPruner = ActivationAPoZRankFilterPruner
ActivationMeanRankPruner = ActivationMeanRankFilterPruner

__all__ = [
    "ActivationAPoZRankFilterPruner",
    "ActivationAPoZRankPruner",
    "ActivationMeanRankFilterPruner",
    "ActivationMeanRankPruner",
    "FPGMPruner",
    "FilterPruner",
    "GraSPPruner",
    "L1FilterPruner",
    "L1NormPruner",
    "L2FilterPruner",
    "L2NormPruner",
    "LAMPPruner",
    "LevelPruner",
    "MovementPruner",
    "OBDFilterPruner",
    "Pruner",
    "RandomFilterPruner",
    "SNIPFilterPruner",
    "SNIPPruner",
    "SlimPruner",
    "TaylorFOWeightFilterPruner",
    "TaylorFOWeightPruner",
    "WandaPruner",
]
