"""How long one forward pass takes: the only place of the package that reads a clock."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from compress.graph.run import as_arguments, evaluating, rng_kept
from compress.graph.watch import tensors_in

_PASSES_IN_TURN = 10
_CALLS_MS = 10.0  # so long a single call is repeated


@dataclass(frozen=True)
class Latency:
    """Wall time of forward passes in milliseconds; ``samples_ms`` are the raw measurements.

    ``batch`` is the first axis of the first input tensor, ``threads`` torch's CPU threads,
    ``warmup`` the passes before that are not counted, ``dtype`` that of the model's numbers,
    ``machine`` what the device is called, ``date`` when it was, with the time.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    repeats: int
    batch: int
    device: str
    threads: int
    samples_ms: tuple[float, ...] = field(repr=False, compare=False)
    warmup: int = 0
    dtype: str = ""
    machine: str = ""
    date: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.median_ms:.2f} ({self.p10_ms:.2f}–{self.p90_ms:.2f})"

    @property
    def conditions(self) -> str:
        """How it was measured, the line below a table of latencies."""
        return (
            f"latency: median of {self.repeats} passes, batch {self.batch}, {self.device}, "
            f"{self.threads} thread{'s' if self.threads != 1 else ''}"
        )


def latency(model: nn.Module, dummy_input: Any, *, warmup: int = 10, repeats: int = 50) -> Latency:
    """Time ``repeats`` forward passes on ``dummy_input`` after ``warmup`` that are not counted.

    ``dummy_input`` is a tensor, a tuple of positional or a dict of keyword arguments, on the
    model's device. Runs in eval mode without gradients; modes and RNG are left as they were. On
    CUDA the device's own events are read, so queueing is not mistaken for work. Raises ValueError
    when ``repeats`` is under 1 or ``warmup`` under 0.
    """
    return latencies({"model": model}, dummy_input, warmup=warmup, repeats=repeats)["model"]


def latencies(
    models: Mapping[str, nn.Module],
    dummy_input: Any,
    *,
    warmup: int = 10,
    repeats: int = 50,
    in_turn: int = _PASSES_IN_TURN,
) -> dict[str, Latency]:
    """`latency` of several models, taken in turn, a few passes of each at a time.

    Other work on the machine and the change of its clock rate then hit all models alike, so the
    ratio of two medians is steadier than that of two `latency` calls. ``in_turn``: how many passes
    of each that are counted follow one another; ``samples_ms`` has them in order.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(
            f"latency: repeats must be at least 1 and warmup at least 0, "
            f"got repeats={repeats}, warmup={warmup}"
        )
    for model in models.values():
        _passes_ms(model, dummy_input, warmup)
    samples: dict[str, list[float]] = {name: [] for name in models}
    for done in range(0, repeats, in_turn):
        for name, model in models.items():
            # The first pass finds another model's weights in the cache: not counted.
            count = 1 + min(in_turn, repeats - done)
            samples[name] += _passes_ms(model, dummy_input, count)[1:]
    return {name: _latency(samples[name], models[name], dummy_input, warmup) for name in models}


@contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """Give a function that returns the seconds since the begin; after the end, the whole time."""
    begin, end = time.perf_counter(), None

    def elapsed() -> float:
        return (time.perf_counter() if end is None else end) - begin

    try:
        yield elapsed
    finally:
        end = time.perf_counter()


def call_ms(run: Callable[[], object], device: torch.device) -> float:
    """The median time of one call, in milliseconds: long calls five times, short ones more often.

    The first call is not counted.
    """
    _time_ms(run, device)
    first = _time_ms(run, device)
    repeats = min(max(int(_CALLS_MS / max(first, 1e-3)), 5), 50)
    return float(np.median([first, *(_time_ms(run, device) for _ in range(repeats))]))


def device_name(device: torch.device) -> str:
    """What a device is called: measured times are of it, and of no other."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()


def _passes_ms(model: nn.Module, dummy_input: Any, count: int) -> list[float]:
    args, kwargs = as_arguments(dummy_input)
    device = _device_of(model, dummy_input)
    # no_grad and not inference_mode: a tensor that a module caches during the run must stay usable
    # when the model trains again.
    with torch.no_grad(), evaluating(model), rng_kept():
        return [_time_ms(lambda: model(*args, **kwargs), device) for _ in range(count)]


def _device_of(model: nn.Module, dummy_input: Any) -> torch.device:
    """Where a model runs: its first parameter's or buffer's device, else the input's, else CPU."""
    for tensor in (*model.parameters(), *model.buffers(), *tensors_in(dummy_input)):
        return tensor.device
    return torch.device("cpu")


def _time_ms(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        with torch.cuda.device(device):
            event = cast(Any, torch.cuda.Event)  # untyped in torch
            start, end = event(enable_timing=True), event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end))
    _synchronise(device)
    begin = time.perf_counter()
    run()
    _synchronise(device)
    return (time.perf_counter() - begin) * 1e3


def _synchronise(device: torch.device) -> None:
    """Wait for the device's queue; the CPU has none."""
    if device.type == "mps":
        torch.mps.synchronize()


def _latency(samples_ms: list[float], model: nn.Module, dummy_input: Any, warmup: int) -> Latency:
    p10, median, p90 = np.percentile(samples_ms, [10, 50, 90])
    batched = [tensor for tensor in tensors_in(dummy_input) if tensor.ndim]
    device = _device_of(model, dummy_input)
    tensors = (*model.parameters(), *model.buffers(), *tensors_in(dummy_input))
    dtypes = [t.dtype for t in tensors if t.is_floating_point()]
    return Latency(
        median_ms=float(median),
        p10_ms=float(p10),
        p90_ms=float(p90),
        repeats=len(samples_ms),
        batch=batched[0].shape[0] if batched else 1,
        device=str(device),
        threads=torch.get_num_threads(),
        samples_ms=tuple(samples_ms),
        warmup=warmup,
        dtype=str(dtypes[0]).removeprefix("torch.") if dtypes else "",
        machine=device_name(device),
        date=time.strftime("%Y-%m-%d %H:%M %Z"),
    )
