"""Schedules against values by hand, and config_lists that have them."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from compress.errors import ConfigError
from compress.pruners import LevelPruner
from compress.schedule import Cubic, Cyclic, Exponential, Linear, OneShot, Schedule
from compress.schedule.entries import Extent, plain_config, resolve_scheduled


def values(schedule: Schedule, steps: range) -> list[float]:
    return [round(schedule(step), 6) for step in steps]


def test_cubic_by_hand() -> None:
    # eq. 1 with s_i = 0.1, s_f = 0.9, n = 4: 0.9 - 0.8 · (1, 27/64, 8/64, 1/64, 0)
    schedule = Cubic(0.9, 0.1, begin=2, changes=4)
    assert values(schedule, range(8)) == [0, 0, 0.1, 0.5625, 0.8, 0.8875, 0.9, 0.9]


def test_frequency_keeps_the_value_between_changes() -> None:
    schedule = Linear(0.8, 0.2, begin=1, changes=3, frequency=2)
    assert values(schedule, range(9)) == [0, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8]
    assert (schedule.start, schedule.end) == (1, 7)
    assert Linear(0.8, 0, begin=1, changes=3, frequency=2).start == 3


def test_exponential_takes_the_same_share_of_what_is_left() -> None:
    # 0.2 of 1 is left after 2 steps of √0.2 each; from 0.5: 0.5 · 0.4^(k/2)
    assert values(Exponential(0.8, changes=2), range(3)) == [0, round(1 - 0.2**0.5, 6), 0.8]
    assert values(Exponential(0.8, 0.5, changes=2), range(3))[1] == round(1 - 0.5 * 0.4**0.5, 6)
    assert values(Exponential(0.488, changes=3), range(4)) == [0, 0.2, 0.36, 0.488]


def test_cyclic_climbs_again_in_each_cycle_and_ends_at_the_top() -> None:
    # Two cycles of two changes: 0.8 - 0.8 · (1/2)³ and 0.8.
    schedule = Cyclic(0.8, changes=4)
    assert values(schedule, range(6)) == [0, 0.7, 0.8, 0.7, 0.8, 0.8]
    # ⌈5/2⌉ = 3 and 2.
    third = [round(0.8 - 0.8 * (1 - j / 3) ** 3, 6) for j in (1, 2, 3)]
    assert values(Cyclic(0.8, changes=5), range(6)) == [0, *third, 0.7, 0.8]
    assert not schedule.monotone


def test_one_shot_and_no_changes() -> None:
    assert values(OneShot(0.5, begin=1), range(3)) == [0, 0.5, 0.5]
    assert OneShot(0.5, begin=1).start == 1
    assert values(Cubic(0.5, 0.1, begin=3, changes=0), range(5)) == [0, 0, 0, 0.5, 0.5]


@pytest.mark.parametrize("kind", [OneShot, Linear, Cubic, Exponential])
def test_monotone_schedules_never_fall(kind: type[Schedule]) -> None:
    schedule = kind(0.95, 0.05, begin=3, changes=7, frequency=3)
    found = [schedule(step) for step in range(40)]
    assert found == sorted(found)
    assert found[schedule.end - 1] < 0.95 or kind is OneShot
    assert found[schedule.end] == 0.95


def test_what_is_no_schedule() -> None:
    with pytest.raises(ConfigError) as error:
        Cubic(1.0, -0.1, begin=-1, changes=2, frequency=0)
    for part in (
        "final: got 1.0; expected a number in [0, 1)",
        "initial: got -0.1",
        "begin: got -1",
    ):
        assert part in str(error.value)
    assert "frequency: got 0; expected a whole number ≥ 1" in str(error.value)
    with pytest.raises(ConfigError, match=r"initial: got 0.6, above final=0.5"):
        Linear(0.5, 0.6)
    with pytest.raises(ConfigError, match="cycles: got 0"):
        Cyclic(0.5, cycles=0)


# --- in a config_list


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 2))


def scheduled(*entries: Any, rounds: int | None = None) -> Any:
    return resolve_scheduled(network(), list(entries), LevelPruner, Cubic, rounds, {})


def test_epochs_end_as_in_nni_before_end_epoch() -> None:
    entry = {"initial_sparsity": 0.1, "final_sparsity": 0.9, "start_epoch": 1, "end_epoch": 6}
    config = scheduled({**entry, "op_types": ["Linear"]})
    assert config.schedules == {0: Cubic(0.9, 0.1, begin=1, changes=4, frequency=1)}
    config = scheduled({**entry, "frequency": 3, "op_types": ["Linear"]})
    assert config.schedules[0] == Cubic(0.9, 0.1, begin=1, changes=1, frequency=3)
    assert config.end == 4


def test_each_entry_has_its_own_schedule() -> None:
    config = scheduled(
        {"sparsity": 0.5, "end_epoch": 2, "op_types": ["default"]},
        {"total_sparsity": 0.8, "start_epoch": 2, "end_epoch": 4, "op_names": ["0", "1"]},
        {"exclude": True, "op_names": ["0"]},
    )
    assert [config.sparsities(step) for step in (0, 1, 2, 3)] == [
        {0: 0, 1: 0}, {0: 0.5, 1: 0}, {0: 0.5, 1: 0}, {0: 0.5, 1: 0.8},
    ]  # fmt: skip
    extents = {name: Extent(100, 100, 1) for name in ("0", "1", "2")}
    assert plain_config(config.targets, config.sparsities(3), extents) == [
        {"sparsity": 0.5, "op_names": ["2"]},
        {"total_sparsity": 0.8, "op_names": ["1"], "max_sparsity_per_layer": {"1": 1.0}},
    ]


def test_rounds_reach_the_sparsity_in_the_last() -> None:
    config = scheduled({"sparsity": 0.8, "op_types": ["Linear"]}, rounds=2)
    assert [config.sparsities(step)[0] for step in (1, 2)] == [pytest.approx(0.7), 0.8]


def test_units_that_are_gone_count_as_masked() -> None:
    config = scheduled(
        {"sparsity": 0.55, "op_names": ["0"]},
        {"total_sparsity": 0.5, "op_names": ["1", "2"], "max_sparsity_per_layer": {"1": 0.6}},
        rounds=1,
    )
    # Of 10 units 4 are gone: 1 of the 6 left goes. Of 20·3 weights 4·3 are gone: 18 of the 48 left.
    extents = {"0": Extent(6, 10, 7), "1": Extent(6, 10, 3), "2": Extent(10, 10, 3)}
    first, second = plain_config(config.targets, {0: 0.55, 1: 0.5}, extents)
    assert first["sparsity"] == pytest.approx(1 / 6)
    assert second["total_sparsity"] == pytest.approx(18 / 48)
    assert second["max_sparsity_per_layer"] == {"1": pytest.approx(2 / 6), "2": 1.0}
    gone = {name: Extent(1, 10, 1) for name in ("0", "1", "2")}
    first, second = plain_config(config.targets, {0: 0.55, 1: 0.5}, gone)
    assert first["sparsity"] == second["total_sparsity"] == 0


def test_every_problem_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        scheduled(
            {"final_sparsity": 1.5, "op_types": ["Linear"]},
            {"sparsity": 0.5, "final_sparsity": 0.6, "op_types": ["Linear"]},
            {"final_sparsity": 0.5, "initial_sparsity": 0.6, "op_names": ["0"]},
            {"final_sparsity": 0.5, "start_epoch": 5, "end_epoch": 5, "op_names": ["0"]},
            {"final_sparsity": 0.5, "start_epocs": 5, "frequency": 0, "op_names": ["0"]},
            {"exclude": True, "end_epoch": 5, "op_names": ["0"]},
            {"final_sparsity": 0.5, "op_names": ["nowhere"]},
        )
    for part in (
        "config_list[0]['final_sparsity']: got 1.5; expected a number in [0, 1)",
        "config_list[1]: got final_sparsity and sparsity; expected exactly one of final_sparsity",
        "config_list[2]['initial_sparsity']: got 0.6; expected at most final_sparsity=0.5",
        "config_list[3]['end_epoch']: got 5; expected more than start_epoch=5",
        "config_list[4]: unknown key 'start_epocs'; did you mean 'start_epoch'?",
        "config_list[4]['frequency']: got 0; expected a whole number ≥ 1",
        "config_list[5]: exclude is True, but end_epoch is given",
        "config_list[6]['op_names']: got 'nowhere'; the model has no module of this name",
    ):
        assert part in str(error.value)
    assert len(error.value.problems) == 8


def test_epochs_and_rounds_are_told_apart() -> None:
    with pytest.raises(ConfigError, match=r"config_list\[0\]: got no end_epoch; a schedule over"):
        scheduled({"sparsity": 0.5, "op_types": ["Linear"]})
    with pytest.raises(ConfigError, match=r"\['frequency'\]: it counts epochs, and total_iterat"):
        scheduled({"sparsity": 0.5, "frequency": 2, "op_types": ["Linear"]}, rounds=3)
    with pytest.raises(ConfigError, match="unknown key 'final_sparsity'"):
        LevelPruner(network(), [{"final_sparsity": 0.5, "op_types": ["Linear"]}])
