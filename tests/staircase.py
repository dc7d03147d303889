"""A clock that goes by the sizes of convolutions and matrix products: measured times without noise.

A call takes as long as its channels, rounded up to a multiple of eight, are many. A model takes
the sum of its calls' times, half as much again and a fixed time, so that predictions have to learn.
"""

import math

import torch
from torch.overrides import TorchFunctionMode

from compress.cost import shrunk, table
from compress.graph.watch import function_name
from compress.measure import Latency

STEP, SLOWER, FIXED_MS = 8, 1.5, 0.5


def stairs(channels):
    return math.ceil(channels / STEP) * STEP


class Calls(TorchFunctionMode):
    """Sums up what the calls within it take."""

    def __init__(self):
        super().__init__()
        self.ms = 0.0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = function_name(func)
        if name in ("conv2d", "linear"):
            places = result.numel() // args[1].shape[0]
            self.ms += places * stairs(args[1].shape[0]) * stairs(args[1].shape[1]) * 1e-4
        elif name == "relu":
            self.ms += result.numel() * 1e-4
        return result


def time_of(run):
    with Calls() as calls, torch.no_grad():
        run()
    return calls.ms


def model_ms(model, x):
    return FIXED_MS + SLOWER * time_of(lambda: model(x))


class Clock:
    """In the place of the real one; counts what it was asked for."""

    def __init__(self, monkeypatch):
        self.calls = 0
        self.models = 0
        monkeypatch.setattr(table, "call_ms", self.call_ms)
        monkeypatch.setattr(shrunk, "latencies", self.latencies)

    def call_ms(self, run, device):
        self.calls += 1
        return time_of(run)

    def latencies(self, models, x, *, warmup, repeats, in_turn):
        self.models += 1
        return {name: self.latency(model, x, repeats) for name, model in models.items()}

    def latency(self, model, x, repeats):
        ms = model_ms(model, x)
        return Latency(ms, ms, ms, repeats, len(x), "cpu", 1, (ms,) * repeats)
