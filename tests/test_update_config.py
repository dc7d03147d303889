"""transformers' own files of small models: the config that says their sizes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import randomise
from torch import Tensor, nn

from compress import Masks, ModelSpeedup
from compress.checkpoint import update_config
from compress.errors import CheckpointError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # what the library warns of is its own
IDS = torch.tensor([[1, 5, 7, 3, 2], [4, 9, 8, 0, 6]])
TOKENS = {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, **TOKENS,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **TOKENS
    )
    return transformers.BertForSequenceClassification(config)


def rows(model: nn.Module, *ends: str, parts: int = 0) -> dict[str, dict[str, Tensor]]:
    """Every other row, or every other one of so many parts, of the layers of these names."""
    masks = {}
    for path, module in model.named_modules():
        if path.endswith(ends):
            size = module.out_features
            keep = torch.arange(size) // (size // (parts or size)) % 2 == 0
            masks[path] = {"weight": keep[:, None].expand(module.weight.shape)}
            if module.bias is not None:
                masks[path]["bias"] = keep
    return masks


def shrunk(build: Any, masks: Any) -> nn.Module:
    torch.manual_seed(0)
    model = build().eval()
    randomise(model)
    for name, buffer in build().named_buffers():  # what the class makes of its config
        model.get_buffer(name).copy_(buffer)
    return ModelSpeedup(model, {"input_ids": IDS}, masks(model)).speedup_model()


HIDDEN = {"intermediate_size": (48, 24)}
HEADS = {"num_attention_heads": (8, 4), "num_key_value_heads": (4, 2)}


@pytest.mark.parametrize(
    ("build", "masks", "expected"),
    [
        (llama, lambda m: rows(m, "gate_proj", "up_proj"), HIDDEN),
        # Half as many heads, or heads of half the width: only one of them computes the same.
        (llama, lambda m: rows(m, "v_proj", parts=4), HEADS),
        (llama, lambda m: rows(m, "up_proj") | rows(m, "v_proj", parts=4), HIDDEN | HEADS),
        (bert, lambda m: rows(m, "intermediate.dense"), HIDDEN),
        (bert, lambda m: {}, {}),
    ],
)
def test_pretrained_files_come_back(
    build: Any, masks: Any, expected: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    small = shrunk(build, masks)
    given = {"input_ids": IDS}
    before = small(**given).logits
    assert update_config(small, given) == expected
    assert torch.equal(small(**given).logits, before)
    small.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**given).logits, before)
    assert update_config(small, given) == {}


def one_layer(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    return rows(model, "1.mlp.gate_proj", "1.mlp.up_proj")


@pytest.mark.parametrize(
    ("build", "masks", "expected"),
    [
        (llama, one_layer, "no numbers of it leave 1/2 of axis 0 of model.layers.1.mlp.gate_proj"),
        (bert, lambda m: rows(m, "attention.self.value", parts=4), "no numbers of it leave 1/2"),
    ],
)
def test_what_no_config_says_is_refused(build: Any, masks: Any, expected: str) -> None:
    small = shrunk(build, masks)
    before = small.config.to_dict()
    with pytest.raises(CheckpointError, match=rf"{expected}.*compress\.save, which takes any"):
        update_config(small, {"input_ids": IDS})
    assert small.config.to_dict() == before


def test_other_models_are_refused() -> None:
    with pytest.raises(CheckpointError, match="got a Linear, which has no config of transformers"):
        update_config(nn.Linear(2, 2), torch.rand(1, 2))
    model = bert()
    Masks(rows(model, "intermediate.dense")).apply(model)
    with pytest.raises(CheckpointError, match="masks are on the model; write them into"):
        update_config(model, {"input_ids": IDS})
