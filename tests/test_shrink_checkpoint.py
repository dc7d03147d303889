"""Checkpoints that are shrunk in their files, against the model that is shrunk in memory."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_checkpoint import Net, Tied, X, half, outputs, tied_masks
from torch import Tensor, nn
from torch.nn import functional as F

import compress
from compress import Masks, ModelSpeedup
from compress.checkpoint import read_recipe, shrinking
from compress.errors import CheckpointError

WORDS = torch.tensor([[1, 2, 8, 3]])


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.gate, self.up = nn.Linear(width, hidden, False), nn.Linear(width, hidden, False)
        self.down = nn.Linear(hidden, width, False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Words(nn.Module):
    """A language model without attention, whose head is its embedding."""

    def __init__(self, width: int = 16, hidden: int = 24) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, width)
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(2))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.head = nn.Linear(width, 9, False)
        self.head.weight = self.embed.weight
        self.register_buffer("unit", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) * self.unit
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def word_masks(model: nn.Module) -> Masks:
    """A quarter of the width, half of the hidden units, and single weights beside."""
    generator = torch.Generator().manual_seed(0)
    width, hidden = torch.arange(16) % 4 != 1, torch.arange(24) % 2 == 0
    entries: dict[str, dict[str, Tensor]] = {"embed": {"weight": width.expand(9, 16)}}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != "head":
            rows = width if path.endswith("down") else hidden
            single = torch.rand(module.weight.shape, generator=generator) > 0.2
            entries[path] = {"weight": rows[:, None] & single}
    return Masks(entries)


@pytest.fixture
def words() -> Words:
    torch.manual_seed(0)
    return random_weights(Words().eval())


def random_weights(model: Any) -> Any:
    """Everything random that is in a checkpoint."""
    kept = {name: b.clone() for name, b in model.named_buffers() if name not in model.state_dict()}
    randomise(model)
    for name, value in kept.items():
        model.get_buffer(name).copy_(value)
    return model


def on_meta(model: nn.Module, masks: Masks, x: Tensor = WORDS, build: Any = Words) -> ModelSpeedup:
    """The speedup of a model that was never in memory."""
    with torch.device("meta"):
        empty = build().to(next(model.parameters()).dtype).eval()
    return ModelSpeedup(empty, x.to("meta"), masks)


def write(model: nn.Module, path: Path, shards: int = 1, names: Any = None) -> Path:
    """A checkpoint as others write them: tied tensors once."""
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    state |= {n: b for n, b in model.named_buffers() if n in model.state_dict()}
    state = {(names or {}).get(name, name): value for name, value in state.items()}
    path.mkdir()
    if shards == 1:
        save_file(state, path / "model.safetensors")
        return path
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(state.items())[shard::shards])
        save_file(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shards", "size"), [(1, "5GB"), (3, 900), (2, "1.5KB")])
def test_it_gives_what_a_speedup_in_memory_gives(
    shards: int, size: Any, dtype: torch.dtype, words: Words, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(shrinking, "_PIECE", 100 if shards == 3 else 10**6)
    words.to(dtype)
    masks = word_masks(words)
    source = write(words, tmp_path / "source", shards)
    compress.shrink_checkpoint(
        source, tmp_path / "small", on_meta(words, masks), max_shard_size=size,
        provenance={"of": "words"},
    )  # fmt: skip
    loaded = compress.load(lambda: Words().to(dtype), tmp_path / "small").eval()
    small = ModelSpeedup(words, WORDS, masks).speedup_model().eval()
    assert loaded.embed.embedding_dim == 12
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(loaded(WORDS), small(WORDS))
    mine, theirs = small.state_dict(), loaded.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert not (loaded.blocks[0].gate.weight != 0).all()  # what is masked and stays is 0
    assert read_recipe(tmp_path / "small").provenance == {"of": "words"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["small", "source"]


def test_shards_are_as_others_read_them(words: Words, tmp_path: Path) -> None:
    source = write(words, tmp_path / "source")
    speedup = on_meta(words, word_masks(words))
    compress.shrink_checkpoint(source, tmp_path / "small", speedup, max_shard_size=900)
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 3
    total = 0
    for name in files:
        state = load_file(tmp_path / "small" / name)
        assert all(index["weight_map"][each] == name for each in state)
        size = sum(tensor.nbytes for tensor in state.values())
        assert size <= 900 or len(state) == 1
        total += size
        with safe_open(tmp_path / "small" / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert index["metadata"]["total_size"] == total
    assert len(index["weight_map"]) == len(list(words.parameters()))


@pytest.mark.parametrize("both", [False, True])
def test_a_tied_tensor_may_have_another_name(both: bool, words: Words, tmp_path: Path) -> None:
    source = write(words, tmp_path / "source", names={"embed.weight": "head.weight"})
    if both:
        state = load_file(source / "model.safetensors")
        state["embed.weight"] = state["head.weight"].clone()
        save_file(state, source / "model.safetensors")
    compress.shrink_checkpoint(source, tmp_path / "small", on_meta(words, word_masks(words)))
    loaded = compress.load(Words, tmp_path / "small").eval()
    small = ModelSpeedup(words, WORDS, word_masks(words)).speedup_model().eval()
    assert torch.equal(loaded(WORDS), small(WORDS))
    assert len(read_recipe(tmp_path / "small").tensors) == len(list(words.parameters()))
    if both:
        state["embed.weight"][0, 0] += 1
        save_file(state, source / "model.safetensors")
        with pytest.raises(CheckpointError, match="are one tensor in the model, and not the same"):
            compress.shrink_checkpoint(source, tmp_path / "no", on_meta(words, Masks()))


@pytest.mark.parametrize("build", [Net, Tied])
def test_a_plan_with_values_moves_constants(build: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = random_weights(build().eval()), X if build is Net else WORDS
    masks = half(model) if build is Net else tied_masks(model)
    source = write(model, tmp_path / "source")
    speedup = ModelSpeedup(copy.deepcopy(model), x, masks)
    plan = speedup.plan
    assert plan.carries or plan.biases or build is Tied
    if build is Tied:
        compress.shrink_checkpoint(source, tmp_path / "small", plan, masks=masks)
    else:  # a plan does not know that no checkpoint has the buffer
        with pytest.raises(CheckpointError, match=r"scale: the checkpoint lacks it \(the Model"):
            compress.shrink_checkpoint(source, tmp_path / "small", plan, masks=masks)
    compress.shrink_checkpoint(source, tmp_path / "too", speedup)
    small = speedup.speedup_model().eval()
    compress.shrink_checkpoint(source, tmp_path / "after", speedup)
    for folder in sorted(file.name for file in tmp_path.iterdir() if file != source):
        loaded = compress.load(build, tmp_path / folder).eval()
        for one, other in zip(outputs(small, x), outputs(loaded, x), strict=True):
            assert torch.equal(one, other)


def test_new_biases_are_written(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3, bias=False))

    model, keep, x = build(), torch.arange(8) < 4, torch.rand(2, 4)
    masks = Masks({"0": {"weight": keep[:, None].expand(8, 4), "bias": keep}})
    source = write(model, tmp_path / "source")
    speedup = ModelSpeedup(model, x, masks)
    compress.shrink_checkpoint(source, tmp_path / "small", speedup)
    small = speedup.speedup_model()
    loaded = compress.load(build, tmp_path / "small")
    assert small[2].bias is not None
    assert torch.equal(loaded(x), small(x))
    compress.save(small, tmp_path / "file")
    assert torch.equal(compress.load(build, tmp_path / "file")(x), small(x))
    with pytest.raises(CheckpointError, match=r"2\.bias: the plan moves constants into it"):
        compress.shrink_checkpoint(source, tmp_path / "no", on_meta(model, masks, x, build))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.pop("norm.weight"), r"norm\.weight: the checkpoint lacks it"),
        (lambda s: s.update(more=torch.ones(2)), "more: the model has no such tensor"),
        (lambda s: s.update({"norm.weight": torch.ones(3)}), r"it is of shape \(3,\), and the pl"),
    ],
)
def test_another_checkpoint_is_refused(
    change: Any, expected: str, words: Words, tmp_path: Path
) -> None:
    source = write(words, tmp_path / "source")
    state = load_file(source / "model.safetensors")
    change(state)
    save_file(state, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"(?s)is not of the model.*{expected}"):
        compress.shrink_checkpoint(source, tmp_path / "no", on_meta(words, word_masks(words)))
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_what_cannot_be_done_is_said(words: Words, tmp_path: Path, monkeypatch: Any) -> None:
    source, speedup = write(words, tmp_path / "source"), on_meta(words, word_masks(words))
    shrink = compress.shrink_checkpoint
    with pytest.raises(CheckpointError, match="it exists; pass a folder"):
        shrink(source, source, speedup)
    with pytest.raises(CheckpointError, match="no such file"):
        shrink(tmp_path / "none", tmp_path / "no", speedup)
    with pytest.raises(CheckpointError, match="got a dict; expected a ModelSpeedup"):
        shrink(source, tmp_path / "no", {})  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="knows its own"):
        shrink(source, tmp_path / "no", speedup, masks=Masks())
    for size in (0, -1, "many", "5 XB", True):
        with pytest.raises(CheckpointError, match="max_shard_size: got"):
            shrink(source, tmp_path / "no", speedup, max_shard_size=size)
    compress.save(words, tmp_path / "saved", plan=[])
    with pytest.raises(CheckpointError, match=r"compress\.load it"):
        shrink(tmp_path / "saved", tmp_path / "no", speedup)

    def fail(*_: Any) -> Tensor:
        raise OSError("No space left on device")

    monkeypatch.setattr(shrinking, "map_tensor", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        shrink(source, tmp_path / "no", speedup)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["saved", "source"]


def damaged_index(folder: Path, **changes: Any) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = changes["shard"]
    file.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("shard", "expected"),
    [
        ("../source/model.safetensors", "is not the name of a safetensors file"),
        ("/etc/passwd", "is not the name of a safetensors file"),
        (3, "is not the name of a safetensors file"),
        ("model-00009-of-00009.safetensors", "no such file"),
        ("last", "it is not in model-"),
    ],
)
def test_a_hostile_index_is_refused(
    shard: Any, expected: str, words: Words, tmp_path: Path
) -> None:
    source, small = write(words, tmp_path / "source"), tmp_path / "small"
    speedup = on_meta(words, word_masks(words))
    compress.shrink_checkpoint(source, small, speedup, max_shard_size=900)
    files = sorted(file.name for file in small.glob("*.safetensors"))
    damaged_index(small, shard=files[-1] if shard == "last" else shard)
    with pytest.raises(CheckpointError, match=expected):
        compress.load(Words, small)


def test_shards_of_another_checkpoint_are_refused(words: Words, tmp_path: Path) -> None:
    other = random_weights(copy.deepcopy(words))
    for name, model in (("one", words), ("two", other)):
        source, speedup = write(model, tmp_path / f"of {name}"), on_meta(model, word_masks(model))
        compress.shrink_checkpoint(source, tmp_path / name, speedup)
    (tmp_path / "two" / "recipe.json").replace(tmp_path / "one" / "recipe.json")
    with pytest.raises(CheckpointError, match="are not those that were written"):
        compress.load(Words, tmp_path / "one")
    with pytest.raises(CheckpointError, match="these weights have no recipe"):
        compress.load(Words, tmp_path / "two")
    for text in ("", "[]", "{}", '{"format": 3}', "\udc80"):
        (tmp_path / "one" / "recipe.json").write_text(text, errors="surrogateescape")
        with pytest.raises(CheckpointError):
            compress.load(Words, tmp_path / "one")
