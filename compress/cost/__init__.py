"""What a model costs without some of its channels, and pruning to what it shall cost."""

from compress.cost.latency import LatencyCost
from compress.cost.model import CostModel, cost_model
from compress.cost.pruner import GlobalPruner
from compress.cost.table import LatencyTable

__all__ = ["CostModel", "GlobalPruner", "LatencyCost", "LatencyTable", "cost_model"]
