"""A config_list whose entries have schedules, and the plain one that it is at a step.

Besides the keys of `compress.config` an entry may have:

| key | meaning |
|---|---|
| ``final_sparsity`` | another name of ``sparsity``: the fraction of each layer at the end |
| ``initial_sparsity`` | the fraction at ``start_epoch``, of what the entry's sparsity is of; 0 |
| ``start_epoch`` | the first epoch in which anything is masked; 0 |
| ``end_epoch`` | the epoch before which the final sparsity is reached; counted from 0 as in NNI v1,
so that epochs ``range(end_epoch)`` end with it |
| ``frequency`` | epochs from one change to the next; 1 |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import nn

from compress.allocate import prune_count
from compress.config import Target, Targets
from compress.config_entry import Entry, Fraction, parse
from compress.errors import ConfigError
from compress.pruners.base import Pruner
from compress.schedule.schedules import Schedule

_Count = Annotated[int, Field(ge=0)]
_CALENDAR = ("start_epoch", "end_epoch", "frequency")


class ScheduledEntry(Entry):
    """One dict of a scheduled pruner's config_list; None = not given."""

    SPARSITIES: ClassVar[tuple[str, ...]] = ("final_sparsity", *Entry.SPARSITIES)
    EXPECTED: ClassVar[Mapping[str, str]] = {
        **Entry.EXPECTED,
        "final_sparsity": "a number in [0, 1)",
        "initial_sparsity": "a number in [0, 1)",
        "start_epoch": "a whole number ≥ 0",
        "end_epoch": "a whole number ≥ 1",
        "frequency": "a whole number ≥ 1",
    }

    final_sparsity: Fraction | None = None
    initial_sparsity: Fraction | None = None
    start_epoch: _Count | None = None
    end_epoch: Annotated[int, Field(ge=1)] | None = None
    frequency: Annotated[int, Field(ge=1)] | None = None

    def contradictions(self, where: str) -> list[str]:
        problems = super().contradictions(where)
        given = self.sparsities()
        times = [k for k in ("initial_sparsity", *_CALENDAR) if getattr(self, k) is not None]
        if self.exclude and times:
            problems.append(
                f"{where}: exclude is True, but {', '.join(times)} is given; an excluded layer has "
                "no schedule: remove one of the two"
            )
        elif len(given) == 1 and (self.initial_sparsity or 0) > (final := min(given.values())):
            problems.append(
                f"{where}['initial_sparsity']: got {self.initial_sparsity}; expected at most "
                f"{next(iter(given))}={final}: masks grow"
            )
        if self.end_epoch is not None and self.end_epoch <= (self.start_epoch or 0):
            problems.append(
                f"{where}['end_epoch']: got {self.end_epoch}; expected more than start_epoch="
                f"{self.start_epoch or 0}: it is the epoch before which all is masked"
            )
        return problems

    def schedule(self, kind: type[Schedule], options: Mapping[str, Any]) -> Schedule:
        """By the epochs that the entry names: eq. 1 of Zhu & Gupta, n·Δt < end − start."""
        begin, frequency = self.start_epoch or 0, self.frequency or 1
        (final,) = self.sparsities().values()
        changes = ((self.end_epoch or begin + 1) - 1 - begin) // frequency
        initial = self.initial_sparsity or 0.0
        return kind(final, initial, begin, changes, frequency, **options)

    def rounds(self, kind: type[Schedule], count: int, options: Mapping[str, Any]) -> Schedule:
        """Over so many rounds, of which the last has the final sparsity."""
        (final,) = self.sparsities().values()
        return kind(final, self.initial_sparsity or 0.0, 0, count, 1, **options)


@dataclass(frozen=True)
class ScheduledConfig:
    """What a scheduled config_list asks for: the layers, and a schedule for each entry.

    Attributes:
        targets: with the final sparsities.
        schedules: by index of the entry.
    """

    targets: Targets
    schedules: Mapping[int, Schedule]

    @property
    def start(self) -> int:
        """The first step at which anything is masked."""
        return min(schedule.start for schedule in self.schedules.values())

    @property
    def end(self) -> int:
        """The first step at which all sparsities are final."""
        return max(schedule.end for schedule in self.schedules.values())

    def sparsities(self, step: int) -> dict[int, float]:
        """By index of the entry."""
        return {index: schedule(step) for index, schedule in self.schedules.items()}


def resolve_scheduled(
    model: nn.Module,
    config_list: Sequence[Mapping[str, Any]],
    base: type[Pruner],
    schedule: type[Schedule],
    rounds: int | None,
    options: Mapping[str, Any],
) -> ScheduledConfig:
    """The layers and schedules of a config_list.

    Args:
        base: the pruner that will mask the layers.
        schedule: the kind of all schedules.
        rounds: a schedule takes so many, where epochs are not counted; None: an entry has its own
            epochs.
        options: further fields of the schedule.

    Raises:
        ConfigError: lists every problem of the config_list.
    """
    targets = base.resolve(model, config_list, ScheduledEntry)
    used = {target.entry for target in targets}
    problems: list[str] = []
    schedules = {}
    for index in sorted(used):
        entry = parse("", config_list[index], [], ScheduledEntry)
        assert isinstance(entry, ScheduledEntry), "resolve has read it"
        problems += _calendar_problems(f"config_list[{index}]", entry, rounds)
        try:
            if rounds is None:
                schedules[index] = entry.schedule(schedule, options)
            else:
                schedules[index] = entry.rounds(schedule, rounds, options)
        except TypeError as error:
            raise ConfigError(
                f"schedule_params: {schedule.__name__} does not take them: {error}"
            ) from error
    if problems:
        raise ConfigError("this config_list cannot be carried out:", problems)
    return ScheduledConfig(targets, schedules)


def _calendar_problems(where: str, entry: ScheduledEntry, rounds: int | None) -> list[str]:
    if rounds is None:
        if entry.end_epoch is None:
            return [
                f"{where}: got no end_epoch; a schedule over epochs needs it, such as end_epoch=10 "
                "for a training of at least 10 epochs, or pass total_iteration for rounds"
            ]
        return []
    return [
        f"{where}[{key!r}]: it counts epochs, and total_iteration={rounds} counts rounds; give one"
        for key in _CALENDAR
        if getattr(entry, key) is not None
    ]


@dataclass(frozen=True)
class Extent:
    """How large a target is now, and was when the pruner was made.

    Attributes:
        units: what the pruner counts in, now.
        before: units at first.
        size: weights of a unit at first.
    """

    units: int
    before: int
    size: int


def plain_config(
    targets: Targets, sparsities: Mapping[int, float], extents: Mapping[str, Extent]
) -> list[dict[str, Any]]:
    """A config_list that masks the targets to the sparsities of a step, counted as at first.

    Units that a speedup has removed since count as masked: of n units at first, of which n' are
    left, ⌊s·n⌋ − (n − n') are still to be masked.
    """
    entries = []
    for one in targets:
        if one.group is None:
            share = _left(sparsities[one.entry], extents[one.name])
            entries.append({"sparsity": share, "op_names": [one.name, *one.tied]})
    for number, group in enumerate(targets.groups):
        members = [one for one in targets if one.group == number]
        entries.append(_group_entry(members, sparsities[group.entry], extents))
    return entries


def _left(sparsity: float, extent: Extent) -> float:
    """The sparsity of what is left of a layer."""
    if extent.units == extent.before:
        return sparsity
    wanted = prune_count(extent.before, sparsity) - (extent.before - extent.units)
    return max(0.0, wanted / extent.units)


def _group_entry(
    members: Sequence[Target], sparsity: float, extents: Mapping[str, Extent]
) -> dict[str, Any]:
    found = {one.name: extents[one.name] for one in members}
    total = sum(each.before * each.size for each in found.values())
    left = sum(each.units * each.size for each in found.values())
    share = sparsity if left == total else max(0.0, (sparsity * total - (total - left)) / left)
    limits = {
        one.name: one.max_sparsity if one.max_sparsity == 1 else _left(one.max_sparsity, each)
        for one, each in zip(members, found.values(), strict=True)
    }
    names = [name for one in members for name in (one.name, *one.tied)]
    every = {name: limits[one.name] for one in members for name in (one.name, *one.tied)}
    return {"total_sparsity": share, "op_names": names, "max_sparsity_per_layer": every}
