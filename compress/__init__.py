"""Prune trained PyTorch networks: masks first, then a smaller network that computes the same."""

from compress.checkpoint import load, save, shrink_checkpoint
from compress.cost import GlobalPruner
from compress.evaluator import Evaluator
from compress.graph.channels import ChannelGraph
from compress.masks import Masks
from compress.pruners import (
    ActivationAPoZRankFilterPruner,
    ActivationAPoZRankPruner,
    ActivationMeanRankFilterPruner,
    ActivationMeanRankPruner,
    FPGMPruner,
    GraSPPruner,
    L1FilterPruner,
    L1NormPruner,
    L2FilterPruner,
    L2NormPruner,
    LAMPPruner,
    LevelPruner,
    MovementPruner,
    OBDFilterPruner,
    RandomFilterPruner,
    SlimPruner,
    SNIPFilterPruner,
    SNIPPruner,
    TaylorFOWeightFilterPruner,
    TaylorFOWeightPruner,
    WandaPruner,
)
from compress.reports import report
from compress.schedule import (
    ADMMPruner,
    AGPPruner,
    IterativePruner,
    LinearPruner,
    LotteryTicketPruner,
)
from compress.search import (
    AMCPruner,
    AutoCompressPruner,
    NetAdaptPruner,
    OptunaPruner,
    SensitivityPruner,
    SimulatedAnnealingPruner,
    sensitivity_analysis,
)
from compress.speedup import ModelSpeedup
from compress.speedup.compare import verify

__version__ = "0.1.0"

__all__ = [
    "ADMMPruner",
    "AGPPruner",
    "AMCPruner",
    "ActivationAPoZRankFilterPruner",
    "ActivationAPoZRankPruner",
    "ActivationMeanRankFilterPruner",
    "ActivationMeanRankPruner",
    "AutoCompressPruner",
    "ChannelGraph",
    "Evaluator",
    "FPGMPruner",
    "GlobalPruner",
    "GraSPPruner",
    "IterativePruner",
    "L1FilterPruner",
    "L1NormPruner",
    "L2FilterPruner",
    "L2NormPruner",
    "LAMPPruner",
    "LevelPruner",
    "LinearPruner",
    "LotteryTicketPruner",
    "Masks",
    "ModelSpeedup",
    "MovementPruner",
    "NetAdaptPruner",
    "OBDFilterPruner",
    "OptunaPruner",
    "RandomFilterPruner",
    "SNIPFilterPruner",
    "SNIPPruner",
    "SensitivityPruner",
    "SimulatedAnnealingPruner",
    "SlimPruner",
    "TaylorFOWeightFilterPruner",
    "TaylorFOWeightPruner",
    "WandaPruner",
    "load",
    "report",
    "save",
    "sensitivity_analysis",
    "shrink_checkpoint",
    "verify",
]
