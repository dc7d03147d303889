"""State: an object that a model returns and takes back, such as a cache of keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import masked_copy, randomise
from torch import Tensor, nn
from torch.nn import functional as F

from compress import ModelSpeedup, verify

HEADS, DIM = 4, 3


class Cache:
    """What attention has seen so far: keys and values (n, heads, tokens, dim)."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extended(self, keys: Tensor, values: Tensor) -> Cache:
        longer = Cache()
        longer.keys = keys if self.keys is None else torch.cat([self.keys, keys], 2)
        longer.values = values if self.values is None else torch.cat([self.values, values], 2)
        return longer


class Decoder(nn.Module):
    """One layer of attention over all tokens so far; ``name`` is where it returns the cache."""

    def __init__(self, name: str = "cache") -> None:
        super().__init__()
        self.name, self.dim = name, DIM
        self.q, self.k, self.v = (nn.Linear(8, HEADS * DIM) for _ in range(3))
        self.out = nn.Linear(HEADS * DIM, 5)

    def forward(self, x: Tensor, cache: Cache | None = None) -> dict[str, Any]:
        made = (each(x).unflatten(-1, (-1, self.dim)) for each in (self.q, self.k, self.v))
        q, k, v = (each.transpose(1, 2) for each in made)
        cache = (cache or Cache()).extended(k, v)
        seen = F.scaled_dot_product_attention(q, cache.keys, cache.values)
        return {"logits": self.out(seen.transpose(1, 2).flatten(2)), self.name: cache}


def without_heads(*heads: int) -> dict[str, dict[str, Tensor]]:
    keep = torch.ones(HEADS, DIM, dtype=torch.bool)
    keep[list(heads)] = False
    rows = keep.flatten()
    entry = {"weight": rows[:, None].expand(-1, 8), "bias": rows}
    return {name: dict(entry) for name in ("q", "k", "v")}


def decoded(model: nn.Module, tokens: Tensor) -> Tensor:
    """Token by token, with the model's own cache."""
    cache, logits = None, []
    with torch.no_grad():
        for token in tokens.split(1, dim=1):
            made = model(token, cache=cache)
            cache = made["cache"]
            logits.append(made["logits"])
    return torch.cat(logits, 1)


def test_heads_go_though_the_cache_is_returned() -> None:
    torch.manual_seed(0)
    model = Decoder().eval()
    randomise(model)
    masks, x = without_heads(1, 2), torch.randn(2, 6, 8)
    masked = masked_copy(model, masks).eval()
    small = ModelSpeedup(model, x, masks).speedup_model()
    assert small.k.out_features == 2 * DIM
    assert verify(small, masked, x).same  # compares what is read: the logits
    cache = small(x)["cache"]
    assert cache.keys.shape == (2, 2, 6, DIM)
    assert torch.allclose(decoded(small, x), decoded(masked, x), rtol=1e-5, atol=1e-6)
    small.out.bias.data[0] += 1
    assert not verify(small, masked, x).same


def test_an_object_that_the_model_does_not_take_back_is_a_result() -> None:
    torch.manual_seed(0)
    model = Decoder(name="seen").eval()
    speedup = ModelSpeedup(model, torch.randn(2, 6, 8), without_heads(1, 2))
    small = speedup.speedup_model()
    assert small.k.out_features == HEADS * DIM
    kept = {layer.layer: layer.kept for layer in speedup.report.layers}
    assert any("its column is an output of the model" in reason for reason in kept["k"])


def test_tensors_under_the_name_of_an_argument_are_results() -> None:
    class Refiner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, x: Tensor, hidden: Tensor | None = None) -> dict[str, Tensor]:
            return {"hidden": self.layer(x)}

    mask = {"layer": {"weight": torch.arange(6)[:, None].expand(6, 4) > 2}}
    small = ModelSpeedup(Refiner(), torch.randn(2, 4), mask).speedup_model()
    assert small.layer.out_features == 6


@pytest.mark.filterwarnings("ignore")
def test_a_small_language_model_generates_with_and_without_its_cache() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    keep = (torch.arange(16) < 8)[:, None].expand(16, 32)  # two of four groups
    masks = {f"model.layers.{i}.self_attn.v_proj": {"weight": keep} for i in range(2)}
    words = torch.randint(3, 20, (2, 5))
    small = ModelSpeedup(model, {"input_ids": words}, masks).speedup_model()
    assert small.model.layers[0].self_attn.q_proj.out_features == 16
    made = [small.generate(words, max_new_tokens=6, use_cache=use) for use in (True, False)]
    assert torch.equal(*made)
