"""Searches: how much of each layer can go, found out by trying."""

from compress.search.amc import AMCPruner
from compress.search.annealing import SimulatedAnnealingPruner
from compress.search.results import SearchResult
from compress.search.trials import Trial

__all__ = ["AMCPruner", "SearchResult", "SimulatedAnnealingPruner", "Trial"]
