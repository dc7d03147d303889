"""Small models in files: what comes back, what is kept beside, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from networks import draw_network
from oracle import SeededChoices, draw_masks, outputs, randomise
from safetensors.torch import load_file
from test_multihead_attention import Encoder, transformer_masks
from test_recurrent import Tagger, units_masked
from test_statistics import NORMS, Residual
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.ops import FrozenBatchNorm2d

import compress
from compress import L1FilterPruner, Masks, ModelSpeedup
from compress.checkpoint import building, read_recipe, weights
from compress.checkpoint.files import recipe_metadata
from compress.checkpoint.recipe import canonical
from compress.errors import CheckpointError
from compress.speedup.encoding import encode_plan
from compress.speedup.plan import Plan

X = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two convolutions with a norm, a buffer that is in no state_dict, and a head."""

    def __init__(self, width: int = 12, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, groups=groups, bias=False)
        self.fc = nn.Linear(width, 5)
        self.register_buffer("scale", torch.linspace(0.5, 2, width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv1(x))) * self.scale[:, None, None]
        return self.fc(self.conv2(x).mean((2, 3)))


def half(model: nn.Module, seed: int = 0, kinds: tuple[type, ...] = (nn.Conv2d,)) -> Masks:
    """Half of the filters of each layer, but for the last."""
    generator = torch.Generator().manual_seed(seed)
    entries = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, kinds) and path not in ("fc", "head"):
            keep = torch.rand(module.weight.shape[0], generator=generator) > 0.5
            keep[0] = True
            shape = (-1, *[1] * (module.weight.dim() - 1))
            entries[path] = {"weight": keep.view(shape).expand(module.weight.shape)}
            if module.bias is not None:
                entries[path]["bias"] = keep
    return Masks(entries)


def shrunk(build: Callable[[], nn.Module], x: Any = X, masks: Any = None) -> nn.Module:
    torch.manual_seed(1)
    model = build().eval()
    randomise(model)
    small = ModelSpeedup(model, x, half(model) if masks is None else masks(model)).speedup_model()
    return small.eval()


def call(model: nn.Module, x: Any) -> list[Tensor]:
    with torch.no_grad():
        return outputs(model, *x) if isinstance(x, tuple) else outputs(model, x)


def assert_comes_back(
    small: nn.Module, build: Callable[[], nn.Module], x: Any, path: Path, **options: Any
) -> nn.Module:
    compress.save(small, path, **options)
    loaded = compress.load(build, path).eval()
    for one, other in zip(call(small, x), call(loaded, x), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    mine, theirs = small.state_dict(), loaded.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert all(value.stride() == theirs[name].stride() for name, value in mine.items())
    flags = [p.requires_grad for p in small.parameters()]
    assert [p.requires_grad for p in loaded.parameters()] == flags
    return loaded


# --- what comes back


def frozen() -> nn.Module:
    return torchvision.models.resnet18(num_classes=4, norm_layer=FrozenBatchNorm2d)


def normed_weights() -> nn.Module:
    model = Net()
    parametrizations.weight_norm(model.conv1)
    parametrizations.weight_norm(model.fc)
    return model


def raw_rows(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    keep = torch.arange(12) % 2 == 0
    raw = {"original0": keep.view(-1, 1, 1, 1)}
    both = {"weight": keep, "bias": keep}
    return {"conv1.parametrizations.weight": raw, "conv1": {"bias": keep}, "norm": both}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.down(torch.relu(self.up(x))))


def tied_masks(model: nn.Module) -> Masks:
    width = torch.arange(8) % 2 == 0
    return half(model, kinds=(nn.Linear,)) & Masks(
        {
            "embed": {"weight": width.expand(9, 8)},
            "down": {"weight": width[:, None].expand(8, 16), "bias": width},
        }
    )


def attention() -> nn.Module:
    return Encoder(padded=False)


def recurrent() -> nn.Module:
    return Tagger(nn.LSTM, num_layers=2, bidirectional=True)


def hidden(model: nn.Module) -> Any:
    return {"recurrent": units_masked(model.recurrent, [1, 4, 5])}


MODELS: dict[str, tuple[Callable[[], nn.Module], Any, Any]] = {
    "net": (Net, X, None),
    "groups": (lambda: Net(groups=3), X, lambda m: Masks({"conv1": half(m, 3)["conv1"]})),
    "frozen norms": (frozen, X, None),
    "mobilenet": (lambda: torchvision.models.mobilenet_v3_small(num_classes=4), X, None),
    "shufflenet": (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=4), X, None),
    "weight norm": (normed_weights, X, raw_rows),
    "tied": (Tied, torch.tensor([[1, 2, 8]]), tied_masks),
    "lstm": (recurrent, torch.randn(4, 2, 5), hidden),
    "attention": (attention, torch.rand(2, 5, 16, dtype=torch.float64), transformer_masks),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_loaded_computes_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    build, x, masks = MODELS[name]
    small = shrunk(build, x, masks)
    whole = sum(p.numel() for p in build().parameters())
    assert sum(p.numel() for p in small.parameters()) < whole
    assert_comes_back(small, build, x, tmp_path / "small")


@pytest.mark.parametrize("name", ["layer_norm", "layer_norm_over_axis_1", "rms_norm_default_eps"])
def test_counted_norms_and_epsilons_come_back(name: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return Residual(NORMS[name], channels_first=name == "layer_norm_over_axis_1")

    torch.manual_seed(0)
    model, x = build().eval(), torch.rand(2, 5, 7)
    config = [{"sparsity": 0.5, "op_types": ["Linear"]}, {"exclude": True, "op_names": ["head"]}]
    pruner = L1FilterPruner(model, config, mode="dependency_aware", dummy_input=x)
    small = ModelSpeedup(model, x, pruner.calc_masks()).speedup_model()
    assert small.embed.out_features < 16
    assert_comes_back(small, build, x, tmp_path / "small")


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_drawn_networks_come_back(seed: int, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return draw_network(SeededChoices(seed), 6, torch.float32)[0]

    choices = SeededChoices(seed)
    model, x = draw_network(choices, 6, torch.float32)
    small = ModelSpeedup(model, x, draw_masks(choices, model), verify=False).speedup_model()
    compress.save(small, tmp_path / "small")
    loaded = compress.load(build, tmp_path / "small").eval()
    for one, other in zip(call(small.eval(), x), call(loaded, x), strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_of_numbers_and_layouts_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    small = shrunk(Net).to(dtype).to(memory_format=torch.channels_last)
    loaded = assert_comes_back(small, Net, X.to(dtype), tmp_path / "small")
    # A buffer outside of the state_dict lost digits with the model, and has lost them here.
    assert torch.equal(loaded.scale, small.scale)
    assert loaded.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_several_speedups_and_a_training_are_one_file(tmp_path: Path) -> None:
    small = shrunk(Net)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small.train()
    small(X).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    small.eval()
    again = ModelSpeedup(small, X, half(small, seed=5)).speedup_model()
    assert len(read(assert_saved(again, tmp_path / "small")).plans) == 2
    loaded = assert_comes_back(again, Net, X, tmp_path / "small")
    # The loaded model knows it, too, and can be cut and saved again; so does a copy of it.
    third = ModelSpeedup(copy.deepcopy(loaded), X, half(loaded, seed=7)).speedup_model()
    assert third.conv1.out_channels < loaded.conv1.out_channels
    assert_comes_back(third, Net, X, tmp_path / "small")
    assert_comes_back(loaded, Net, X, tmp_path / "small")


def assert_saved(model: nn.Module, path: Path) -> Path:
    compress.save(model, path)
    return path


def read(path: Path) -> Any:
    return read_recipe(path)


def test_parts_and_wrappers_know_of_each_other(tmp_path: Path) -> None:
    wrapper = nn.Sequential(Net(), nn.Softmax(-1)).eval()
    ModelSpeedup(wrapper, X, {"0.conv1": half(wrapper[0])["conv1"]}).speedup_model()
    assert_comes_back(wrapper[0], Net, X, tmp_path / "part")
    ModelSpeedup(wrapper[0], X, {"conv2": half(wrapper[0], 4)["conv2"]}).speedup_model()
    build = lambda: nn.Sequential(Net(), nn.Softmax(-1))  # noqa: E731
    assert_comes_back(wrapper, build, X, tmp_path / "whole")
    assert_comes_back(wrapper[0], Net, X, tmp_path / "part")


def test_a_masked_model_comes_back_masked(tmp_path: Path) -> None:
    small = shrunk(Net)
    mask = torch.rand(small.conv2.weight.shape) > 0.5
    Masks({"conv2": {"weight": mask}}).apply(small)
    loaded = assert_comes_back(small, Net, X, tmp_path / "small")
    assert torch.equal(loaded.conv2.parametrizations.weight[0].mask, mask)
    whole = Net()
    half(whole).apply(whole)  # never shrunk: the masks are known, and no plan
    assert_comes_back(whole.eval(), Net, X, tmp_path / "masked")


def test_the_model_is_unharmed(tmp_path: Path) -> None:
    small = shrunk(Net)
    state = {name: value.clone() for name, value in small.state_dict().items()}
    assert_comes_back(copy.deepcopy(small), Net, X, tmp_path / "small")
    unpickled = pickle.loads(pickle.dumps(small))
    assert_comes_back(unpickled, Net, X, tmp_path / "small")
    assert b"compress." not in pickle.dumps(small)  # it can be unpickled without this package
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(small)
    assert all(torch.equal(value, state[name]) for name, value in small.state_dict().items())


def test_a_model_that_does_not_know_its_plans_is_told_them(tmp_path: Path) -> None:
    model = Net().eval()
    speedup = ModelSpeedup(model, X, half(model))
    small = speedup.speedup_model()
    stranger = Net()
    for name, module in small.named_children():
        setattr(stranger, name, module)
    stranger.scale = small.scale
    del small._compress_plans
    with pytest.raises(CheckpointError, match=r"nothing is known of how this Net was.*plan=\[\]"):
        compress.save(stranger, tmp_path / "small")
    for plan in (speedup, speedup.plan, [speedup.plan]):
        assert_comes_back(stranger.eval(), Net, X, tmp_path / "small", plan=plan)
    with pytest.raises(CheckpointError, match=r"conv1.weight: it is of shape \(12, 3, 3, 3\), the"):
        compress.save(Net(), tmp_path / "other", plan=speedup)
    with pytest.raises(CheckpointError, match="expected a ModelSpeedup, its plan"):
        compress.save(Net(), tmp_path / "other", plan=[1])  # type: ignore[list-item]
    assert [file.name for file in tmp_path.iterdir()] == ["small"]
    assert_comes_back(Net().eval(), Net, X, tmp_path / "whole", plan=[])


def test_provenance_is_kept(tmp_path: Path) -> None:
    given = {"config_list": [{"sparsity": 0.5}], "pruner": "L1FilterPruner", "accuracy": 0.93}
    compress.save(shrunk(Net), tmp_path, provenance=given)
    recipe = read_recipe(tmp_path)
    assert recipe.provenance == given
    assert recipe.model == "Net"
    assert recipe.versions == {"compress": compress.__version__, "torch": torch.__version__}
    # Other libraries read the weights as ever.
    assert set(load_file(tmp_path / "model.safetensors")) >= set(shrunk(Net).state_dict())
    for wrong in ({"f": Net}, {"x": float("nan")}, {"m": {1, 2}}):
        with pytest.raises(CheckpointError, match=r"provenance: .*expected JSON"):
            compress.save(shrunk(Net), tmp_path / "other", provenance=wrong)
    with pytest.raises(CheckpointError, match="expected a dict"):
        compress.save(shrunk(Net), tmp_path / "other", provenance=[1])  # type: ignore[arg-type]


# --- building without memory


def test_a_model_is_built_without_its_weights(tmp_path: Path, monkeypatch: Any) -> None:
    small = shrunk(Net)
    compress.save(small, tmp_path / "small")
    monkeypatch.setattr("compress.checkpoint.loading.build_whole", None)
    loaded = compress.load(Net, tmp_path / "small").eval()
    assert torch.equal(loaded(X), small(X))
    light = building.build_light(Net)
    assert light is not None
    assert light.conv1.weight.is_meta
    assert not light.scale.is_meta


class Reads(Net):
    """Looks at the values of its weights, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        weight = self.fc.weight
        if how == "number":
            self.largest = float(weight.detach().abs().max())
        elif how == "attribute":
            self.first = weight.detach()[0].clone()
        elif how == "buffer":
            self.register_buffer("copied", weight.detach().clone(), persistent=False)
        elif how == "hook":
            weight.register_hook(lambda gradient: gradient)
        elif how == "pretrained":
            self.load_state_dict(Net().state_dict())


@pytest.mark.parametrize("how", ["number", "attribute", "buffer", "hook", "pretrained"])
def test_what_looks_at_weights_is_built_with_them(how: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(3)
        return Reads(how)

    light = building.build_light(build)
    assert (light is not None) == (how in ("pretrained", "buffer"))
    small = shrunk(build)
    loaded = assert_comes_back(small, build, X, tmp_path / "small")
    if how == "number":
        assert loaded.largest == small.largest
    if how == "attribute":
        assert torch.equal(loaded.first, small.first)
    if how == "buffer":
        assert torch.equal(loaded.copied, small.copied)


def test_what_the_function_does_wrong_is_said(tmp_path: Path) -> None:
    compress.save(shrunk(Net), tmp_path / "small")
    with pytest.raises(CheckpointError, match="got a Net as what builds the model"):
        compress.load(Net(), tmp_path / "small")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="returned a int"):
        compress.load(lambda: 3, tmp_path / "small")  # type: ignore[arg-type,return-value]
    with pytest.raises(ZeroDivisionError):
        compress.load(lambda: 1 / 0, tmp_path / "small")  # type: ignore[arg-type,return-value]
    with pytest.raises(CheckpointError, match=r"weight: the parameter is lazy; run the model once"):
        compress.load(lambda: nn.LazyLinear(3), tmp_path / "small")


# --- what is refused


def saved(tmp_path: Path) -> Path:
    return assert_saved(shrunk(Net), tmp_path / "small")


class Ungated(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(12, 12, 3)
        self.conv2.groups = 2


class Longer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (
            lambda: Net(10),
            r"conv1.weight: it is of shape \(10, 3, 3, 3\), expected \(12",
        ),
        (lambda: nn.Sequential(Net()), "conv1.weight: there is no such parameter.*did you mean"),
        (lambda: nn.Linear(2, 2), "the Linear that was built .it is of a Net"),
        (Longer, "more.weight: the weights lack it"),
        (Ungated, "conv2.bias: "),
        (lambda: torchvision.models.resnet18(), "and [0-9]+ more"),
    ],
)
def test_another_model_is_refused(build: Any, expected: str, tmp_path: Path) -> None:
    path, model = saved(tmp_path), build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"(?s){expected}"):
        compress.load(lambda: model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match=f"(?s){expected}"):
        compress.load(build, path)


def test_tied_and_untied_are_told_apart(tmp_path: Path) -> None:
    def untied() -> nn.Module:
        model = Tied()
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
        return model

    x = torch.tensor([[1, 2]])
    compress.save(shrunk(Tied, x, tied_masks), tmp_path / "tied")
    with pytest.raises(CheckpointError, match=r"head\.weight: "):
        compress.load(untied, tmp_path / "tied")
    compress.save(shrunk(untied, x, lambda m: half(m, kinds=(nn.Linear,))), tmp_path / "two")
    with pytest.raises(CheckpointError, match=r"head\.weight"):
        compress.load(Tied, tmp_path / "two")


def test_parameters_that_files_cannot_hold_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()
    meta = nn.Linear(2, 2, device="meta")
    sparse = nn.Linear(2, 2)
    sparse.weight = nn.Parameter(sparse.weight.detach().to_sparse())
    lazy = nn.LazyLinear(2)
    complicated = nn.Linear(2, 2, dtype=torch.complex128)
    for model, why in (
        (meta, "meta device"), (sparse, "sparse"), (lazy, "no shape yet"), (complicated, "complex"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=f"weight: .*{why}"):
            compress.save(model, path, plan=[])
    with pytest.raises(CheckpointError, match=r"around your model; pass model.module"):
        compress.save(nn.DataParallel(Net()), path, plan=[])
    with pytest.raises(CheckpointError, match="cannot be saved"):
        compress.save(Net(), tmp_path / "nowhere" / "small", plan=[])
    assert path.read_bytes() == before


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: Any) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(weights, "bytes_of", fail)
    monkeypatch.setattr("compress.checkpoint.saving.record_of", lambda t, p: weights.TensorRecord(
        dtype=weights.NAMES[t.dtype], shape=list(t.shape), sha256=""))  # fmt: skip
    with pytest.raises(CheckpointError, match="No space left"):
        compress.save(shrunk(Net), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["small"]


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        compress.load(Net, tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file"):
        compress.load(Net, tmp_path)
    (tmp_path / "text").write_text("weights")
    with pytest.raises(CheckpointError, match="cannot be read as a safetensors file"):
        compress.load(Net, tmp_path / "text")
    Masks({"a": {"weight": torch.ones(2)}}).save(tmp_path / "masks")
    with pytest.raises(CheckpointError, match="these weights have no recipe"):
        compress.load(Net, tmp_path / "masks")


def rewritten(path: Path, change: Callable[[Any], None], **metadata: str) -> Path:
    """The file with another recipe, and a digest that fits it: what an attacker would write."""
    recipe = read_recipe(path)
    data = recipe.model_dump(mode="json")
    change(data)
    own = recipe_metadata(canonical(data)) | metadata
    places, _ = weights.read_header(path)
    tensors = {name: weights.read_tensor(place) for name, place in places.items()}
    layouts = {name: weights.layout_of(tensor) for name, tensor in tensors.items()}
    other = path.with_name("rewritten")
    weights.write_file(other, layouts, own, lambda name: [tensors[name]])
    return other


def test_a_newer_file_is_refused(tmp_path: Path) -> None:
    envelope = json.dumps({"format": "compress.checkpoint", "version": 2, "sha256": ""})
    path = saved(tmp_path)
    with pytest.raises(CheckpointError, match="format version 2; this release reads up to 1"):
        compress.load(Net, rewritten(path, lambda data: None, compress=envelope))
    for text, why in (('{"a": NaN}', "NaN is not JSON"), ("[" * 10**5, "no JSON"), ("{}", "SHA")):
        with pytest.raises(CheckpointError, match=why):
            compress.load(Net, rewritten(path, lambda data: None, **{"compress.recipe": text}))


def at(*keys: Any, value: Any) -> Callable[[Any], None]:
    """Sets one value deep in a recipe."""

    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


def attribute(**changes: Any) -> Callable[[Any], None]:
    given = {"module": "fc", "name": "in_features", "old": 12, "new": 3} | changes
    return lambda data: data["plans"][0]["attributes"].insert(0, given)


def replacement(**changes: Any) -> Callable[[Any], None]:
    given = {"module": "fc", "kind": "CountedLayerNorm", "state": {}} | changes
    return lambda data: data["plans"][0]["replacements"].append(given)


SLICE = ("plans", 0, "slices", "conv1.weight")
HOSTILE = {
    "forward": (attribute(name="forward", old=None, new=1), "fc.forward: expected an attribute"),
    "dunder": (attribute(name="__class__", old=None, new=1), "expected an attribute that holds"),
    "private": (attribute(name="_version", old=1, new=2), "expected an attribute that holds"),
    "method": (attribute(name="train", old=None, new="x"), "expected an attribute that holds"),
    "text": (attribute(new="3"), "'3' is of another type"),
    "texts": (attribute(new={"tuple": ["x"]}), "of another type|are no sizes"),
    "zero": (attribute(new=0), "fc.in_features: 0 are no sizes, as 12 are"),
    "size": (attribute(new=11), r"fc.in_features: 11 is not \d, which the tensors"),
    "old": (attribute(old=11), "fc.in_features: it is 12, expected 11"),
    "float": (attribute(old=12.0, new=3.0), "fc.in_features: it is 12, expected 12.0"),
    "dict": (attribute(new={"a": 1}), "expected a number, a string"),
    "module": (attribute(module="fc.../etc"), "there is no such module"),
    "kind": (replacement(kind="Module"), "'Module' is none of MultiheadAttention, Counted"),
    "class": (replacement(), "it is a Linear, expected a LayerNorm"),
    "negative": (at("plans", 0, "indices", 0, value=[-1, 2]), "greater than or equal to 0"),
    "duplicate": (at("plans", 0, "indices", 0, value=[1, 1]), "are no positions of 12, in order"),
    "beyond": (at("plans", 0, "indices", 0, value=[3, 12]), "are no positions of 12, in order"),
    "fractions": (at("plans", 0, "indices", 0, value=[0.5]), "indices.0.0"),
    "huge": (at("plans", 0, "indices", 0, value=[2**70]), "indices.0.0"),
    "long": (at("plans", 0, "indices", 0, value=[0] * 10**6), "are no positions"),
    "number": (at(*SLICE, "keep", 0, value=99), "there are no indices of number 99"),
    "axes": (at(*SLICE, "keep", value=[None]), "it has 4 axes, the recipe cuts 1"),
    "gather": (at(*SLICE, "gather", value={"axis": 7, "positions": [[0]]}), "do not fit"),
    "ragged": (at(*SLICE, "gather", value={"axis": 1, "positions": [[0], []]}), "one length"),
    "path": (at("plans", 0, "slices", "../x", value={"keep": [0]}), "no such parameter"),
    "bias": (at("plans", 0, "new_biases", value={"fc.x": {"weight": "fc.weight", "size": 9}}),
             "fc.x: expected a module there that can have a bias"),
    "bias size": (at("plans", 0, "new_biases", value={
        "conv2.bias": {"weight": "conv2.weight", "size": 10**14}}), "are too many for"),
    "extra": (at("code", value="print()"), "code: Extra inputs are not permitted"),
    "plan": (at("plans", 0, value=[]), "plans.0"),
    "plans": (at("plans", value={}), "plans: "),
    "dtype": (at("tensors", "fc.bias", "dtype", value="I32"), "the recipe says I32"),
    "shape": (at("tensors", "fc.bias", "shape", value=[2**40]), "the recipe says F32"),
    "stride": (at("tensors", "fc.bias", "stride", value=[2**40]), "a stride of .* is none of"),
    "digest": (at("tensors", "fc.bias", "sha256", value="0"), "the numbers of fc.bias are not"),
    "mask": (at("masks", value={"fc.bias": "fc.bias"}), "fc.bias is no mask|weights lack"),
    "unknown": (at("tensors", value={}), "the recipe does not know it"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_recipe_is_refused(name: str, tmp_path: Path) -> None:
    change, expected = HOSTILE[name]
    path = saved(tmp_path)
    with pytest.raises(CheckpointError, match=expected):
        compress.load(Net, rewritten(path, change))


@pytest.mark.parametrize("part", ["header", "recipe", "weights"])
def test_flipped_bytes_never_make_another_model(part: str, tmp_path: Path) -> None:
    path, draw = saved(tmp_path), random.Random(part)
    whole, expected = path.read_bytes(), shrunk(Net)(X)
    end = 8 + int.from_bytes(whole[:8], "little")
    start = whole.index(b"recipe")
    first, last = {"header": (0, 40), "recipe": (start, end), "weights": (end, len(whole))}[part]
    refused = 0
    for _ in range(60):
        flipped = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            flipped[draw.randrange(first, last)] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            loaded = compress.load(Net, path).eval()
        except CheckpointError:
            refused += 1
        else:
            assert torch.equal(loaded(X), expected)
    assert refused > 30


def test_files_cut_short_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    whole = path.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            compress.load(Net, path)
    path.write_bytes((2**62).to_bytes(8, "little") + whole[8:])
    with pytest.raises(CheckpointError):
        compress.load(Net, path)


def mutated(draw: random.Random, data: Any) -> Any:
    """A recipe with one value of it replaced, deleted or doubled."""
    junk = [None, -1, 0, 2**63, 1e308, "", "x" * 1000, [], {}, [[]], True, "fc", "__class__"]
    if draw.random() < 0.15 or not isinstance(data, (dict, list)) or not data:
        return draw.choice(junk)
    data = copy.copy(data)
    keys = list(data) if isinstance(data, dict) else range(len(data))
    key = draw.choice(list(keys))
    if draw.random() < 0.1:
        del data[key]
    else:
        data[key] = mutated(draw, data[key])
    return data


def test_mutated_recipes_are_refused_or_fit(tmp_path: Path) -> None:
    path, draw = saved(tmp_path), random.Random(0)
    refused = 0
    for _ in range(150):

        def change(data: Any) -> None:
            other = mutated(draw, data)
            data.clear()
            data.update(other if isinstance(other, dict) else {"junk": other})

        try:
            compress.load(Net, rewritten(path, change))
        except CheckpointError:
            refused += 1
    assert refused > 75


def test_an_empty_plan_is_a_plan() -> None:
    model = Net()
    assert encode_plan(Plan())["slices"] == {}
    small = ModelSpeedup(model, X, {}).speedup_model()
    assert small._compress_plans[0]["slices"] == {}
