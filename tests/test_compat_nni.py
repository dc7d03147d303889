"""config_lists and mask files of NNI: what they become, what is told, what is refused."""

from __future__ import annotations

import pickle
from copy import deepcopy

import pytest
import torch
from torch import nn

from compress import L1FilterPruner, LevelPruner, ModelSpeedup
from compress.compat import nni
from compress.errors import ConfigError, MaskError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 1))
        self.fc = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(self.conv1(x).relu()).mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net()


V3 = {"op_types": ["Conv2d"], "sparse_ratio": 0.5}


def refused(model, *entries):
    with pytest.raises(ConfigError) as caught:
        nni.translate(list(entries), model)
    return str(caught.value)


def test_selectors_of_v3_are_the_layers_that_nni_selects(model):
    entry = {
        "op_names": ["conv1"], "op_names_re": ["body"], "op_types": ["Conv2d", "ReLU"],
        "exclude_op_names": ["body.0"], "sparse_ratio": 0.25,
    }  # fmt: skip
    before = deepcopy(entry)
    found = nni.translate([entry], model)
    assert entry == before
    assert found.config_list == [{"op_names": ["conv1", "body.2"], "sparsity_per_layer": 0.25}]
    assert "1 selected modules have no weight" in str(found)  # body.1 is a ReLU
    # A pattern holds from the beginning of a name, unlike ours.
    assert "no layer with a weight" in refused(
        model, {"op_names_re": ["onv1"], "sparse_ratio": 0.5}
    )


def test_a_subclass_is_another_type_for_nni(model):
    class Own(nn.Conv2d):
        pass

    model.conv1 = Own(3, 8, 3, padding=1)
    found = nni.translate([V3], model)
    assert found.config_list[0]["op_names"] == ["body.0", "body.2"]
    (told,) = nni.translate([{"sparsity": 0.5, "op_types": ["Conv2d"]}], model).left_out
    assert "not in NNI: Own;" in told


def test_exclusion_is_of_its_own_entry_only(model):
    found = nni.translate([V3, {**V3, "exclude_op_types": ["Linear"], "exclude_op_names_re": ["b"],
                                "sparse_ratio": 0.25}], model)  # fmt: skip
    masks = L1FilterPruner(model, found.config_list).calc_masks()
    assert {name: mask["bias"].sum().item() for name, mask in masks.items()} == {
        "conv1": 6, "body.0": 4, "body.2": 8,
    }  # fmt: skip


def test_entries_of_a_global_group_are_one(model):
    first = {"op_names": ["conv1"], "sparse_ratio": 0.5, "global_group_id": 7}
    second = {"op_names": ["body.0", "body.2"], "max_sparse_ratio": 0.75}
    second["target_settings"] = {"weight": {"sparse_ratio": 0.5, "global_group_id": 7}}
    second["target_settings"]["weight"]["max_sparse_ratio"] = 0.8  # of the target: goes before
    found = nni.translate([first, second], model)
    assert found.arguments == {"mode": "global"}
    assert found.config_list == [
        {
            "op_names": ["conv1", "body.0", "body.2"],
            "total_sparsity": 0.5,
            "max_sparsity_per_layer": {"body.0": 0.8, "body.2": 0.8},
        }
    ]
    masks = L1FilterPruner(model, found.config_list, **found.arguments).calc_masks()
    assert masks["body.0"]["bias"].sum() >= 2
    assert "expected the same" in refused(model, first, {**first, "sparse_ratio": 0.25})


def test_a_global_group_of_dependencies(model):
    entry = {**V3, "global_group_id": 1, "dependency_group_id": 2}
    for entries in ([entry], [V3 | {"dependency_group_id": 2}, entry]):
        found = nni.translate(entries, model)
        assert found.arguments == {"mode": "dependency_aware"}
        assert any("ranks coupled layers" in line for line in found.left_out)
    x = torch.rand(1, 3, 8, 8)
    L1FilterPruner(model, found.config_list, dummy_input=x, **found.arguments).calc_masks()


def test_what_is_an_argument_here(model):
    found = nni.translate([{**V3, "dependency_group_id": "a"}], model)
    assert found.arguments == {"mode": "dependency_aware"}
    assert "found in the model" in str(found)
    x = torch.rand(1, 3, 8, 8)
    pruner = L1FilterPruner(model, found.config_list, dummy_input=x, **found.arguments)
    small = ModelSpeedup(model, x, pruner.compress()[1]).speedup_model()
    assert small.conv1.out_channels == 4
    found = nni.translate([{**V3, "granularity": [4, 1, 1, 1]}], Net())
    assert found.arguments == {"block_size": (4, 1)}
    LevelPruner(Net(), found.config_list, **found.arguments)
    told = refused(model, {**V3, "granularity": [4, 1]}, {**V3, "granularity": [2, 1]})
    assert "config_list[1]" in told and "block_size" in told


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({**V3, "sparse_threshold": 0.1}, "['sparse_threshold']"),
        ({**V3, "min_sparse_ratio": 0.1}, "['min_sparse_ratio']"),
        ({**V3, "internal_metric_block": 64}, "['internal_metric_block']"),
        ({**V3, "granularity": "per_channel"}, "['granularity']"),
        ({**V3, "apply_method": "add"}, "['apply_method']"),
        ({**V3, "align": {"module_name": "fc", "target_name": "weight", "dims": [0]}}, "['align']"),
        ({**V3, "max_sparse_ratio": 0.25}, "['max_sparse_ratio']"),
        ({**V3, "target_names": ["_input_0", "weight"]}, "'_input_0'"),
        ({**V3, "target_names": ["bias"]}, "['target_names']"),
        ({**V3, "target_settings": {"bias": {"sparse_ratio": 0.1}}}, "['bias']['sparse_ratio']"),
        ({**V3, "sparse_ratio": 1.0}, "['sparse_ratio']: got 1.0"),
        ({"op_types": ["Conv2d"], "target_names": ["weight"]}, "['sparse_ratio']: it is missing"),
        ({**V3, "op_names": ["conv2"]}, "no 'conv2'; did you mean 'conv1'?"),
        ({**V3, "spars_ratio": 0.1}, "did you mean 'sparse_ratio'?"),
        ({**V3, "sparsity": 0.1}, "of v1 and v2"),
        ({"op_types": ["Conv2d"], "quant_types": ["weight"]}, "quantization"),
        ({**V3, "op_names_re": ["("]}, "no regular expression"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_named(model, entry, words):
    assert words in refused(model, entry)


def test_what_makes_no_difference_is_told(model):
    entry = {**V3, "target_names": ["weight"], "apply_method": "mul", "granularity": "out_channel"}
    entry |= {"max_sparse_ratio": 0.9, "exclude_op_names": ["nowhere"], "min_sparse_ratio": 0.0}
    told = nni.translate([entry], model).left_out
    for word in ("target_names", "apply_method", "granularity", "max_sparse_ratio", "nowhere"):
        assert sum(word in line for line in told) == 1, word


def test_lists_of_v1_and_v2_stay(model):
    entries = [
        {"sparsity": 0.5, "op_types": ["default"]},
        {"total_sparsity": 0.5, "op_partial_names": ["body"], "max_sparsity_per_layer": 0.9},
        {"initial_sparsity": 0, "final_sparsity": 0.8, "start_epoch": 0, "end_epoch": 3,
         "frequency": 1, "op_types": ["Linear"]},
        {"exclude": True, "op_names": ["fc"]},
    ]  # fmt: skip
    assert nni.translate(entries, model).config_list == entries


# -- mask files ----------------------------------------------------------------------------------


def test_mask_files_of_all_versions(model, tmp_path):
    weight = torch.ones(8, 3, 3, 3)
    weight[2] = 0
    bias = weight[:, 0, 0, 0].clone()
    v2 = {
        "conv1": {"weight": weight, "bias": bias},
        "fc": {"weight": torch.ones(4, 16), "bias": None},
    }
    torch.save(v2, tmp_path / "v2.pth")
    masks = nni.load_masks(tmp_path / "v2.pth")
    assert not masks["conv1"]["weight"][2].any() and masks.sparsity_per_layer["fc"] == 0
    small = ModelSpeedup(model, torch.rand(1, 3, 8, 8), masks).speedup_model()
    assert small.conv1.out_channels == 7
    v3 = {"conv1": {"weight": weight, "_output_0": torch.ones(1), "_input_0": None}}
    torch.save(v3, tmp_path / "v3.pth")
    assert set(nni.load_masks(tmp_path / "v3.pth")["conv1"]) == {"weight"}
    v3["conv1"]["_output_0"] = torch.zeros(1)
    torch.save(v3, tmp_path / "v3.pth")
    with pytest.raises(MaskError, match="'conv1': a mask of '_output_0'"):
        nni.load_masks(tmp_path / "v3.pth")


class Hostile:
    def __reduce__(self):
        return print, ("executed",)


def test_nothing_in_a_mask_file_is_executed(tmp_path, capsys):
    torch.save({"conv1": {"weight": Hostile()}}, tmp_path / "torch.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Hostile()))
    (tmp_path / "cut.pth").write_bytes((tmp_path / "torch.pth").read_bytes()[:50])
    for name in ("torch.pth", "plain.pth", "cut.pth"):
        with pytest.raises(MaskError, match="cannot be read as tensors only") as told:
            nni.load_masks(tmp_path / name)
        assert "weights_only" not in str(told.value)  # no advice to execute it after all
        assert "\033" not in str(told.value)
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(MaskError, match="no such file"):
        nni.load_masks(tmp_path / "none.pth")
    torch.save({"conv1.weight": torch.ones(2)}, tmp_path / "flat.pth")
    with pytest.raises(MaskError, match="it holds dict"):
        nni.load_masks(tmp_path / "flat.pth")
    torch.save({"conv1": {"weight": torch.full((2,), 0.5)}}, tmp_path / "half.pth")
    with pytest.raises(MaskError, match=r"(?s)half\.pth.*neither 0 nor 1"):
        nni.load_masks(tmp_path / "half.pth")
