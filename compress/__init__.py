"""Prune trained PyTorch networks: masks first, then a smaller network that computes the same."""

from compress.graph.channels import ChannelGraph
from compress.masks import Masks
from compress.pruners import (
    FPGMPruner,
    L1FilterPruner,
    L2FilterPruner,
    LevelPruner,
    RandomFilterPruner,
)
from compress.speedup import ModelSpeedup
from compress.speedup.compare import verify

__version__ = "0.1.0"

__all__ = [
    "ChannelGraph",
    "FPGMPruner",
    "L1FilterPruner",
    "L2FilterPruner",
    "LevelPruner",
    "Masks",
    "ModelSpeedup",
    "RandomFilterPruner",
    "verify",
]
