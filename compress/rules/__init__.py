"""What each family of torch functions does to labels and to known values."""

from compress.rules import (
    attention,
    contraction,
    creation,
    elementwise,
    indexing,
    movement,
    normalization,
    recurrent,
    reduction,
    statistics,
    transforms,
)
from compress.rules.registry import RULES, Rule, rule, rule_for

__all__ = [
    "RULES",
    "Rule",
    "attention",
    "contraction",
    "creation",
    "elementwise",
    "indexing",
    "movement",
    "normalization",
    "recurrent",
    "reduction",
    "rule",
    "rule_for",
    "statistics",
    "transforms",
]
