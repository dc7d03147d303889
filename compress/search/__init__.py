"""Searches: how much of each layer can go, found out by trying."""

from compress.search.amc import AMCPruner
from compress.search.annealing import SimulatedAnnealingPruner
from compress.search.autocompress import AutoCompressPruner
from compress.search.base import SearchPruner
from compress.search.netadapt import NetAdaptPruner
from compress.search.optuna_pruner import OptunaPruner
from compress.search.results import SearchResult
from compress.search.sensitivity import Sensitivity
from compress.search.sensitivity_pruner import SensitivityPruner, sensitivity_analysis
from compress.search.trials import Trial

__all__ = [
    "AMCPruner",
    "AutoCompressPruner",
    "NetAdaptPruner",
    "OptunaPruner",
    "SearchPruner",
    "SearchResult",
    "Sensitivity",
    "SensitivityPruner",
    "SimulatedAnnealingPruner",
    "Trial",
    "sensitivity_analysis",
]
