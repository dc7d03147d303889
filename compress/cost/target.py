"""How small a model shall be: a fraction of what it costs, or so much."""

from __future__ import annotations

import re
from dataclasses import dataclass
from numbers import Real
from typing import Any

from compress.config_entry import short
from compress.cost.model import check_cost
from compress.errors import ConfigError

_COUNT = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9}
# The units that a target may have, in those of the cost.
UNITS = {
    "params": _COUNT,
    "flops": _COUNT,
    "memory": {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9},
    "latency": {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3},
}
_EXAMPLES = {"params": "1.5 M", "flops": "300 M", "memory": "20 MB", "latency": "12 ms"}


@dataclass(frozen=True)
class Target:
    """What a model shall cost.

    Attributes:
        cost: its kind.
        value: a fraction of the dense model's cost, or a number in the cost's unit.
        relative: which of the two.
    """

    cost: str
    value: float
    relative: bool

    def of(self, dense: float) -> float:
        """The cost that is asked for, where the dense model costs so much."""
        return self.value * dense if self.relative else self.value

    def __str__(self) -> str:
        if self.relative:
            return f"{self.value:.1%} of the dense model's {self.cost}"
        return in_words(self.cost, self.value)


def parse_target(cost: str, given: Any) -> Target:
    """A number is a fraction; text is a number with a unit: "12 ms", "300 M", "20 MB".

    Raises:
        ConfigError: it is none of these, or not between nothing and the whole.
    """
    check_cost(cost)
    expected = f"expected a fraction in (0, 1), such as 0.5, or text like {_EXAMPLES[cost]!r}"
    if isinstance(given, Real) and not isinstance(given, bool) and 0 < float(given) < 1:
        return Target(cost, float(given), relative=True)
    found = None
    if isinstance(given, str):
        found = re.fullmatch(r"\s*(\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+)\s*([^\W\d]*)\s*", given)
    if found is None:
        raise ConfigError(f"target: got {short(given)}; {expected}")
    number, unit = float(found[1]), found[2]
    if unit not in UNITS[cost]:
        known = ", ".join(name or "none" for name in UNITS[cost])
        raise ConfigError(f"target: got {given!r}; {cost} has the units {known}")
    if number <= 0:
        raise ConfigError(f"target: got {given!r}; {expected}")
    return Target(cost, number * UNITS[cost][unit], relative=False)


def in_words(cost: str, value: float) -> str:
    """A cost with its unit, for people."""
    if cost == "latency":
        if value < 0.1:
            return f"{value:.2g} ms"
        return f"{value:.2f} ms" if value < 1e3 else f"{value / 1e3:.2f} s"
    suffix = {"params": "", "flops": "", "memory": "B"}[cost]
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.2f} {name}{suffix}"
    return f"{value:.0f} {suffix}".strip()
