"""Pruning in steps: schedules, and the pruners that follow them with any one-shot pruner."""

from compress.schedule.admm import ADMMPruner
from compress.schedule.iterative import AGPPruner, IterativePruner, LinearPruner
from compress.schedule.lottery import LotteryTicketPruner
from compress.schedule.schedules import Cubic, Cyclic, Exponential, Linear, OneShot, Schedule

__all__ = [
    "ADMMPruner",
    "AGPPruner",
    "Cubic",
    "Cyclic",
    "Exponential",
    "IterativePruner",
    "Linear",
    "LinearPruner",
    "LotteryTicketPruner",
    "OneShot",
    "Schedule",
]
