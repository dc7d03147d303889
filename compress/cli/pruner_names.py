"""The pruners by name, and what each may be given: known without a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import compress
from compress.config_entry import Entry, parse
from compress.pruners.base import Pruner

PRUNERS: dict[str, type[Any]] = {
    name: getattr(compress, name) for name in compress.__all__ if name.endswith("Pruner")
}


def parameters_of(kind: type[Any]) -> list[str]:
    """The arguments of a class's constructor, with those that it hands on to its bases."""
    found: dict[str, None] = {}
    for each in kind.__mro__:
        init = vars(each).get("__init__")
        if init is None:
            continue
        parameters = list(inspect.signature(init).parameters.values())[1:]
        named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        found |= dict.fromkeys(named)
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return [name for name in found if name not in ("model", "config_list")]


def entry_problems(pruner: str, config_list: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is wrong with the entries by themselves, where all the pruner's entries are plain ones.

    The others (schedules, searches) have further keys, and check them before they begin.
    """
    problems: list[str] = []
    if issubclass(PRUNERS[pruner], Pruner):
        for index, raw in enumerate(config_list):
            parse(f"config_list[{index}]", raw, problems, Entry)
    return problems
