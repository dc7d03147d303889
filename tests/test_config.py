"""What a config_list selects, and what is said about a wrong one."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from compress.config import Target, Targets, TotalGroup, resolve
from compress.errors import ConfigError
from compress.masks import Masks

TYPES = (nn.Conv2d, nn.Linear)


class Odd(nn.Conv2d):
    """A user's own kind of convolution."""


def net() -> nn.Module:
    block = nn.Sequential()
    block.add_module("conv1", nn.Conv2d(3, 4, 1))
    block.add_module("bn", nn.BatchNorm2d(4))
    block.add_module("conv2", Odd(4, 4, 1))
    return nn.ModuleDict({"block": block, "fc": nn.Linear(4, 2)})


def names(config_list: Any, model: nn.Module | None = None) -> dict[str, float | None]:
    model = net() if model is None else model
    return {one.name: one.sparsity for one in resolve(model, config_list, TYPES)}


def problem(config_list: Any, model: nn.Module | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(
            net() if model is None else model,
            config_list,
            TYPES,
            pruner="L1FilterPruner",
            granularity="whole filters",
        )
    return str(caught.value)


@pytest.mark.parametrize(
    ("selector", "selected"),
    [
        ({"op_types": ["default"]}, ["block.conv1", "block.conv2", "fc"]),
        ({"op_types": ("Conv2d",)}, ["block.conv1", "block.conv2"]),
        ({"op_types": ["Odd"]}, ["block.conv2"]),
        ({"op_names": ["fc", "block.conv1"]}, ["block.conv1", "fc"]),
        ({"op_partial_names": ["block."]}, ["block.conv1", "block.conv2"]),
        ({"op_partial_names": ["conv1", "f"]}, ["block.conv1", "fc"]),
        ({"op_names_re": [r"conv\d$"]}, ["block.conv1", "block.conv2"]),
        ({"op_names_re": r"2|^fc"}, ["block.conv2", "fc"]),
        ({"op_types": ["Conv2d"], "op_partial_names": ["conv2", "fc"]}, ["block.conv2"]),
    ],
)
def test_selectors(selector: dict[str, Any], selected: list[str]) -> None:
    assert list(names([{"sparsity": 0.5, **selector}])) == selected


def test_both_spellings_and_every_kind_of_number() -> None:
    for sparsity in (0, 0.0, 0.5, np.float32(0.5), np.float64(0.25)):
        for key in ("sparsity", "sparsity_per_layer"):
            assert names([{key: sparsity, "op_names": ["fc"]}]) == {"fc": float(sparsity)}


def test_the_last_match_wins() -> None:
    every = {"sparsity": 0.5, "op_types": ["default"]}
    conv = {"sparsity": 0.2, "op_types": ["Conv2d"]}
    no_fc = {"exclude": True, "op_names": ["fc"]}
    assert names([every, conv]) == {"block.conv1": 0.2, "block.conv2": 0.2, "fc": 0.5}
    assert names([conv, every]) == {"block.conv1": 0.5, "block.conv2": 0.5, "fc": 0.5}
    assert names([every, no_fc]) == {"block.conv1": 0.5, "block.conv2": 0.5}
    assert names([no_fc, every])["fc"] == 0.5
    assert names([every, {**conv, "exclude": False}])["block.conv1"] == 0.2


def test_norms_can_be_excluded_though_they_are_never_pruned() -> None:
    every = {"sparsity": 0.5, "op_types": ["default"]}
    assert len(names([every, {"exclude": True, "op_types": ["BatchNorm2d"]}])) == 3
    assert len(names([every, {"exclude": True, "op_partial_names": ["bn", "fc"]}])) == 2


def test_total_sparsity_makes_groups() -> None:
    config_list = [
        {"total_sparsity": 0.4, "op_types": ["default"], "max_sparsity_per_layer": {"fc": 0.5}},
        {"total_sparsity": 0.3, "op_names": ["block.conv2"], "max_sparsity_per_layer": 0.8},
    ]
    assert resolve(net(), config_list, TYPES) == Targets(
        (
            Target("block.conv1", None, 0),
            Target("block.conv2", None, 1, 0.8),
            Target("fc", None, 0, 0.5),
        ),
        (TotalGroup(0, 0.4, ("block.conv1", "fc")), TotalGroup(1, 0.3, ("block.conv2",))),
    )
    overridden = [config_list[0], {"sparsity": 0.1, "op_types": ["default"]}]
    assert resolve(net(), overridden, TYPES).groups == ()


def test_the_list_is_not_changed() -> None:
    config_list = [{"sparsity": 0.5, "op_types": ("Conv2d",), "op_names_re": "conv"}]
    before = copy.deepcopy(config_list)
    resolve(net(), config_list, TYPES)
    assert config_list == before


def test_root_module_shared_modules_and_masked_models() -> None:
    assert names([{"sparsity": 0.5, "op_names": [""]}], nn.Linear(2, 2)) == {"": 0.5}
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert names([{"sparsity": 0.5, "op_names": ["b"]}], model) == {"a": 0.5}
    limit = {"total_sparsity": 0.1, "op_types": ["Linear"], "max_sparsity_per_layer": {"b": 0.2}}
    assert resolve(model, [limit], TYPES).layers[0].max_sparsity == 0.2
    masked = net()
    Masks({"fc": {"weight": torch.ones(2, 4)}}).apply(masked)
    assert names([{"sparsity": 0.5, "op_types": ["Linear"]}], masked) == {"fc": 0.5}


def test_tied_layers_are_one_target() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    every = {"sparsity": 0.5, "op_types": ["Linear"]}
    assert resolve(model, [every], TYPES).layers == (Target("a", 0.5, tied=("b",)),)
    text = problem([every, {"sparsity": 0.2, "op_names": ["b"]}], model)
    assert "Linear 'b' has the same weight as 'a', but another sparsity" in text
    text = problem([every, {"exclude": True, "op_names": ["b"]}], model)
    assert "Linear 'b' is excluded, but has the same weight as 'a', which is not" in text


# --- what is wrong


@pytest.mark.parametrize(
    "value", [1, 1.0, 1.5, -0.1, True, False, "0.5", float("nan"), float("inf"), [0.5]]
)
@pytest.mark.parametrize("key", ["sparsity", "sparsity_per_layer", "total_sparsity"])
def test_wrong_sparsities(key: str, value: object) -> None:
    text = problem([{key: value, "op_names": ["fc"]}])
    assert f"config_list[0][{key!r}]: got " in text
    assert "expected a number in [0, 1)" in text


@pytest.mark.parametrize(
    ("config_list", "expected"),
    [
        ([], "config_list: got list []; expected a list of dicts"),
        ({"sparsity": 0.5}, "config_list: got dict {'sparsity': 0.5}; expected a list of dicts"),
        (None, "config_list: got NoneType None; expected"),
        (["Conv2d"], "config_list[0]: got 'Conv2d'; expected a dict"),
        ([{"sparsity": 0.5}], "config_list[0]: it selects no layer; add a selector"),
        ([{"sparsity": 0.5}], '"op_types": ["default"]'),
        ([{"op_names": ["fc"]}], "config_list[0]: got no sparsity; expected exactly one of"),
        ([{"op_names": ["fc"], "exclude": False}], "config_list[0]: got no sparsity"),
        (
            [{"sparsity": 0.5, "total_sparsity": 0.5, "op_names": ["fc"]}],
            "config_list[0]: got sparsity and total_sparsity; expected exactly one of",
        ),
        (
            [{"sparsity": 0.5, "sparsity_per_layer": 0.5, "op_names": ["fc"]}],
            "got sparsity and sparsity_per_layer",
        ),
        (
            [{"sparsity": 0.5, "exclude": True, "op_names": ["fc"]}],
            "config_list[0]: exclude is True, but sparsity is given",
        ),
        ([{"exclude": 1, "op_names": ["fc"]}], "['exclude']: got 1; expected True or False"),
        (
            [{"sparsity": 0.5, "op_names": ["fc"], "max_sparsity_per_layer": 0.9}],
            "['max_sparsity_per_layer']: it limits layers under a total_sparsity",
        ),
        (
            [{"total_sparsity": 0.5, "op_names": ["fc"], "max_sparsity_per_layer": {"fc": 2}}],
            "['max_sparsity_per_layer']: got dict {'fc': 2}; expected a number in [0, 1], or a",
        ),
        (
            [{"total_sparsity": 0.5, "op_names": ["fc"], "max_sparsity_per_layer": {"fd": 0.2}}],
            "got 'fd', which is no layer of this entry; did you mean 'fc'?",
        ),
        (
            [{"sparsity": 0.5, "op_type": ["Conv2d"]}],
            "config_list[0]: unknown key 'op_type'; did you mean 'op_types'?",
        ),
        (
            [{"sparsity": 0.5, "op_names": "fc"}],
            "['op_names']: got 'fc'; expected a list of module",
        ),
        (
            [{"sparsity": 0.5, "op_types": []}],
            "['op_types']: got list []; expected a list of class",
        ),
        ([{"sparsity": 0.5, "op_types": [nn.Linear]}], 'such as ["Conv2d"] or ["default"]'),
        ([{"sparsity": 0.5, "op_partial_names": [""]}], "expected a list of parts of module paths"),
        (
            [{"sparsity": 0.5, "op_names": ["block.conv3"]}],
            "['op_names']: got 'block.conv3'; the model has no module of this name; did you mean "
            "'block.conv",
        ),
        (
            [{"exclude": True, "op_names": ["fcc"]}],
            "['op_names']: got 'fcc'; the model has no module of this name; did you mean 'fc'?",
        ),
        (
            [{"sparsity": 0.5, "op_types": ["conv2d"]}],
            "the model has no module of this type; did you mean 'Conv2d'?",
        ),
        ([{"sparsity": 0.5, "op_partial_names": ["conf"]}], "no module name of the model matches"),
        ([{"sparsity": 0.5, "op_names_re": ["^conv"]}], "no module name of the model matches"),
        ([{"sparsity": 0.5, "op_names_re": ["("]}], "['op_names_re']: got '('; it is no regular"),
        (
            [{"sparsity": 0.5, "op_types": ["BatchNorm2d"]}],
            "['op_types']: got 'BatchNorm2d'; L1FilterPruner masks whole filters of Conv2d, Linear"
            "; BatchNorm2d 'block.bn' has none",
        ),
        (
            [{"sparsity": 0.5, "op_names": ["block.bn"]}],
            "L1FilterPruner masks whole filters of Conv2d, Linear; BatchNorm2d 'block.bn' has none",
        ),
        (
            [{"sparsity": 0.5, "op_names": ["block"]}],
            "Sequential 'block' has none; for the layers inside, use \"op_partial_names\"",
        ),
        (
            [{"exclude": True, "op_names": ["block"]}],
            "it excludes no layer, only Sequential 'block', which holds others",
        ),
        (
            [{"sparsity": 0.5, "op_partial_names": ["bn"]}],
            "it selects no layer that can be pruned (BatchNorm2d 'block.bn')",
        ),
        (
            [{"sparsity": 0.5, "op_types": ["Linear"], "op_partial_names": ["conv"]}],
            "no module matches all of op_types (1 modules) and op_partial_names (2 modules)",
        ),
        (
            [{"sparsity": 0.5, "op_names": ["fc"]}, {"exclude": True, "op_names": ["fc"]}],
            "it selects no layer: every one that it selects is excluded again",
        ),
    ],
)
def test_messages(config_list: Any, expected: str) -> None:
    assert expected in problem(config_list)


def test_all_problems_come_in_one_error_in_order() -> None:
    text = problem(
        [
            {"sparsity": 2, "op_names": ["fc"]},
            {"sparsity": 0.5, "op_names": ["fd", "block.bn"]},
            7,
            {"sparsity": 0.5, "exclude": True, "op_types": ["Conv3d"]},
        ]
    )
    lines = text.splitlines()
    assert lines[0] == "this config_list cannot be carried out:"
    assert [line.strip()[:14] for line in lines[1:]] == [
        f"config_list[{index}]" for index in (0, 1, 1, 2, 3, 3)
    ]


def test_default_without_a_layer_for_it() -> None:
    text = problem([{"sparsity": 0.5, "op_types": ["default"]}], nn.Sequential(nn.ReLU()))
    assert (
        "got 'default'; the model has no layer for it: L1FilterPruner masks whole filters" in text
    )


def test_weights_that_cannot_be_pruned() -> None:
    model = nn.ModuleDict(
        {
            "normed": weight_norm(nn.Linear(2, 2)),
            "lazy": nn.LazyLinear(2),
            "meta": nn.Linear(2, 2, device="meta"),
            "whole": nn.Linear(2, 2),
        }
    )
    model["whole"].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    every = {"sparsity": 0.5, "op_types": ["default"]}
    text = problem([every], model)
    assert "Linear 'normed': its weight is computed from other parameters (weight_norm" in text
    assert "LazyLinear 'lazy': its weight has no shape yet; run the model once" in text
    assert "Linear 'meta': its weight is on the meta device" in text
    assert "Linear 'whole': its weight is torch.int8; expected a floating-point one" in text
    excluded = {"exclude": True, "op_names": ["normed", "lazy", "meta"]}
    model["whole"] = nn.Linear(2, 2)
    assert names([every, excluded], model) == {"whole": 0.5}


@pytest.mark.parametrize("key", ["sparse_ratio", "sparse_threshold", "target_settings"])
def test_a_config_list_of_nni_v3_is_called_one(key: str) -> None:
    text = problem([{key: 0.5, "op_types": ["Conv2d"]}])
    assert f"unknown key {key!r}; it is NNI v3's: compress.compat.nni.translate" in text
