"""Measured times of single calls, in memory and in a file.

The file is JSON: for each machine (device, threads, torch's version) the milliseconds of each call,
by its function and its arguments' shapes, dtypes and layouts. It is read once, and written whole.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from compress.errors import StateError
from compress.files import write_atomically
from compress.measure.latency import call_ms, device_name

_TURNS = 3


class LatencyTable:
    """Times calls that it does not know, and remembers those that it does.

    Args:
        path: of the file to read and to write; None: what is measured is forgotten.

    Raises:
        StateError: the file is there and is no table.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._times: dict[str, dict[str, float]] = self._read()

    def __getitem__(self, call: tuple[str, torch.device]) -> float:
        """The milliseconds of a call on a device; `measure` it first."""
        name, device = call
        return self._times[machine(device)][name]

    def measure(
        self, calls: Mapping[str, Callable[[], Callable[[], object]]], device: torch.device
    ) -> None:
        """Time those calls that are not known.

        They are timed three times, in turn, and the least of the three medians counts: other work
        on the machine comes in bursts, and only ever adds.

        Args:
            calls: for each, what makes the function to time.
        """
        known = self._times.setdefault(machine(device), {})
        news = {name: make for name, make in calls.items() if name not in known}
        for _ in range(_TURNS):
            for name, make in news.items():
                known[name] = min(known.get(name, math.inf), call_ms(make(), device))
        if news:
            self._save()

    def _save(self) -> None:
        """Write what is new to the file, beside what other processes have written meanwhile."""
        if self.path is None:
            return
        for name, times in self._read().items():
            self._times[name] = times | self._times.get(name, {})
        text = json.dumps(self._times, indent=1, sort_keys=True)
        write_atomically(self.path, lambda path: path.write_text(text))

    def _read(self) -> dict[str, dict[str, float]]:
        if self.path is None or not self.path.exists():
            return {}
        try:
            found = json.loads(self.path.read_text())
            return {
                name: {call: float(ms) for call, ms in times.items()}
                for name, times in found.items()
            }
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise StateError(
                f"{self.path}: is no table of latencies ({type(error).__name__}: {error}); expected"
                " a file that LatencyTable wrote: delete it, or name another"
            ) from error


def machine(device: torch.device) -> str:
    """What times depend on besides the call: device, threads, torch's version."""
    return f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}"
