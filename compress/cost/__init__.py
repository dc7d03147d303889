"""What a model costs without some of its channels: parameters, FLOPs, memory, time."""

from compress.cost.model import CostModel, cost_model

__all__ = ["CostModel", "cost_model"]
