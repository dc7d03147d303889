"""Exports compute what the model does, at other batch sizes, or nothing is written."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from oracle import assert_same_outputs, outputs, randomise
from torch import Tensor, nn
from torch.nn import functional as F

from compress import L1FilterPruner, ModelSpeedup
from compress.errors import ExportError, TraceError
from compress.export import (
    OnnxModel,
    Runtime,
    compare_runtimes,
    compiled,
    onnx_file,
    quantize_onnx,
    to_exported,
    to_onnx,
)

pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

X = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
OTHERS = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
HALF = [{"sparsity": 0.5, "op_types": ["default"]}, {"exclude": True, "op_names": ["fc"]}]


class Net(nn.Module):
    """A convolution with its norm, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits = self.fc(self.places(F.relu(self.norm(self.conv(x)))))
        return logits if scale is None else logits * scale, logits.softmax(1)

    def places(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 8).flatten(1)


class Sequence(Net):
    """With torch's attention over places and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.lstm = nn.LSTM(16, 16, batch_first=True)

    def places(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 4).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.lstm(x)[0][:, -1]


class Deceiving(nn.Module):
    """Its second output is another one while it is exported."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x + 1 if torch.compiler.is_compiling() else x


class Counting(nn.Module):
    """Takes the batch size for a number of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] == 2 else x


def masked(network: type[Net] = Net) -> nn.Module:
    torch.manual_seed(0)
    model = network()
    randomise(model)
    return L1FilterPruner(model, HALF, mode="dependency_aware", dummy_input=X).compress()[0]


def shrunk(network: type[Net] = Net) -> nn.Module:
    model = masked(network).eval()
    small = ModelSpeedup(model, X).speedup_model()
    assert small.conv.out_channels == 8
    return small


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- ONNX


@pytest.mark.parametrize("make", [masked, shrunk])
def test_onnx_computes_the_same_for_any_batch(make: Any, tmp_path: Path) -> None:
    model = make().train()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    report = to_onnx(model, X, tmp_path / "net.onnx")
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    file = OnnxModel(tmp_path / "net.onnx")
    assert file.session.get_inputs()[0].shape == ["batch", 1, 8, 8]
    expected = outputs(model.eval(), OTHERS)
    assert_same_outputs(expected, outputs(file, OTHERS), 1e-5)
    assert [run.batch_size for run in report.parity.runs] == [1, 1, 3]
    assert "net.onnx: 0.0" in str(report)
    assert "any batch size\nin onnxruntime the same: largest difference" in str(report)
    assert names(tmp_path) == ["net.onnx"]


def test_attention_and_recurrent_layers(tmp_path: Path) -> None:
    small = shrunk(Sequence)
    assert small.lstm.input_size == 8
    report = to_onnx(small, X, tmp_path / "net.onnx", batch_sizes=(5,))
    assert report.parity.relative_error < 1e-5


def test_onnx_of_one_batch_size(tmp_path: Path) -> None:
    report = to_onnx(shrunk(), X, tmp_path / "net.onnx", dynamic_batch=False, opset_version=18)
    assert (report.opset, report.dynamic_batch) == (18, False)
    file = OnnxModel(tmp_path / "net.onnx")
    assert file.session.get_inputs()[0].shape == [1, 1, 8, 8]
    with pytest.raises(Exception, match="Got: 5 Expected: 1"):
        file(OTHERS)


def test_keyword_arguments_go_by_name(tmp_path: Path) -> None:
    model, scale = shrunk(), torch.full((1, 5), 3.0)
    to_onnx(
        model, {"scale": scale, "x": X}, tmp_path / "net.onnx", output_names=["logits", "shares"]
    )
    file = OnnxModel(tmp_path / "net.onnx")
    assert [each.name for each in file.session.get_outputs()] == ["logits", "shares"]
    with torch.no_grad():
        wanted = model(x=OTHERS, scale=scale.expand(5, -1))
    for got in (file(x=OTHERS, scale=scale.expand(5, -1)), file(scale.expand(5, -1), x=OTHERS)):
        assert_same_outputs(list(wanted), got, 1e-5)
    with pytest.raises(ExportError, match=r"has the inputs \['scale', 'x'\]; got 0 tensors for"):
        file(x=OTHERS)


def test_what_differs_is_named_and_not_written(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_text("the old one")
    differs = r"(?s)Deceiving as ONNX in onnxruntime .*NOT the same.*: output 1 of 2 differs by"
    with pytest.raises(ExportError, match=differs):
        to_onnx(Deceiving(), X, tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx").read_text() == "the old one"
    assert names(tmp_path) == ["net.onnx"]
    assert to_onnx(Deceiving(), X, tmp_path / "net.onnx", check=False).parity is None
    report = to_onnx(Deceiving(), X, tmp_path / "net.onnx", tolerance=10.0)
    assert report.parity.relative_error > 0.1


def test_a_batch_that_is_a_constant_of_the_model(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"(?s)Counting .* any batch size.*dynamic_batch=False"):
        to_onnx(Counting(), X, tmp_path / "net.onnx")
    assert to_onnx(Counting(), X, tmp_path / "net.onnx", dynamic_batch=False).parity
    assert names(tmp_path) == ["net.onnx"]


def test_weights_beside_a_file_that_would_be_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "ONE_FILE_BYTES", 100)
    model = shrunk()
    first = to_onnx(model, X, tmp_path / "net.onnx").files
    second = to_onnx(model, X, tmp_path / "net.onnx").files
    assert first[0] == second[0] and first[1] != second[1]
    assert names(tmp_path) == sorted(path.name for path in second)  # the first one's is gone
    with pytest.raises(ExportError, match="does not compute"):
        to_onnx(model, X, tmp_path / "net.onnx", tolerance=-1.0)
    assert names(tmp_path) == sorted(path.name for path in second)
    file = OnnxModel(tmp_path / "net.onnx")
    assert_same_outputs(outputs(model, OTHERS), outputs(file, OTHERS), 1e-5)


def test_errors_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="Net does not run on dummy_input"):
        to_onnx(Net(), torch.rand(1, 3, 8, 8), tmp_path / "net.onnx")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*; make it first"):
        to_onnx(Counting(), X, tmp_path / "none" / "net.onnx", dynamic_batch=False)
    with pytest.raises(ExportError, match=r"of_doubles\.onnx: onnxruntime does not take") as caught:
        to_onnx(Net().double(), X.double(), tmp_path / "of_doubles.onnx")
    assert ".of_doubles" not in str(caught.value), "the name that was asked for"
    with pytest.raises(ExportError, match=r"got a OrderedDict; expected a torch\.nn\.Module"):
        to_exported(cast(Any, Net().state_dict()), X)
    with pytest.raises(ExportError, match="runtimes: got the text 'onnxruntime'; expected a list"):
        compare_runtimes(Net(), X, runtimes="onnxruntime")
    (tmp_path / "text.onnx").write_text("text")
    with pytest.raises(ExportError, match=r"text\.onnx: onnxruntime does not take this file"):
        OnnxModel(tmp_path / "text.onnx")


@pytest.mark.parametrize("extra", [3, 2.5, "words", True])
def test_onnx_has_no_outputs_but_tensors(extra: object, tmp_path: Path) -> None:
    class Told(Net):
        def forward(self, x: torch.Tensor) -> Any:
            return {"scores": super().forward(x), "extra": extra}

    words = f"Told cannot be written as ONNX.*: output 2 of 3 is {extra!r}; return a tensor"
    with pytest.raises(ExportError, match=words):
        to_onnx(Told(), X, tmp_path / "told.onnx")
    assert names(tmp_path) == []


def test_an_output_of_none_is_left_out(tmp_path: Path) -> None:
    class Empty(Net):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x), None

    assert to_onnx(Empty(), X, tmp_path / "empty.onnx").parity


def test_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    needs = r"needs onnx and onnxscript and onnxruntime, .*pip install compress-torch\[onnx\]"
    with pytest.raises(ExportError, match=needs):
        to_onnx(Net(), X, tmp_path / "net.onnx")
    found = compare_runtimes(Deceiving(), X, runtimes=["onnxruntime"], warmup=0, repeats=1)
    assert list(found.latencies) == ["eager"]
    assert "onnxruntime: ExportError: to_onnx needs onnx and onnxscript, not" in str(found)


# -- torch.export, torch.compile


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs(strict: bool) -> None:
    model = masked() if strict else shrunk()
    program = to_exported(model, X, strict=strict)
    expected = outputs(model.eval(), OTHERS)
    with torch.no_grad():
        model.fc.bias.add_(1.0)  # its own no more
    assert_same_outputs(expected, outputs(Runtime(program.module().__call__), OTHERS), 1e-5)
    assert not any("parametri" in name for name in program.state_dict)


def test_an_exported_program_that_differs() -> None:
    with pytest.raises(ExportError, match=r"a torch\.export program .*NOT the same"):
        to_exported(Deceiving(), X)


def test_compiled_is_plain_and_in_eval_mode() -> None:
    model = masked().train()
    fast = compiled(model, backend="eager")
    assert model.training and not fast.training
    assert not any("parametri" in name for name, _ in fast.named_parameters())
    with torch.no_grad():
        assert_same_outputs(outputs(model.eval(), OTHERS), outputs(fast, OTHERS), 1e-6)


def test_runtimes_side_by_side() -> None:
    runtimes = ("torch.export", "onnxruntime")
    found = compare_runtimes(shrunk(), OTHERS, runtimes=runtimes, warmup=1, repeats=3)
    assert list(found.latencies) == ["eager", *runtimes]
    assert all(each.repeats == 3 and each.batch == 5 for each in found.latencies.values())
    assert max(found.differences.values()) < 1e-5 and not found.missing
    assert [row[0] for row in found.table.rows] == ["eager", *runtimes]
    conv = nn.Conv2d(1, 2, 3)
    others = {"double": Runtime(lambda x: conv(x) * 2)}
    doubled = compare_runtimes(conv, OTHERS, runtimes=(), others=others, warmup=0, repeats=1)
    assert doubled.differences["double"] == pytest.approx(1, rel=1e-3)  # told, and timed
    wrong = compare_runtimes(Deceiving(), X, runtimes=runtimes, warmup=0, repeats=1)
    assert list(wrong.latencies) == ["eager"]  # what computes something else is not timed
    assert set(wrong.missing) == set(runtimes)
    with pytest.raises(ExportError, match=r"runtimes has \['tvm'\]; expected some of"):
        compare_runtimes(Deceiving(), X, runtimes=["tvm"])


# -- int8


class Wide(nn.Module):
    """Enough weights that their type shows in the size of the file."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 64, 3, padding=1), nn.BatchNorm2d(64)
        self.hidden, self.fc = nn.Linear(64 * 16, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        return self.fc(F.relu(self.hidden(x.flatten(1))))


@pytest.mark.parametrize("static", [True, False])
def test_int8(static: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Wide()
    randomise(model)
    source, target = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    to_onnx(model, X, source)
    calibration = torch.randn(4, 8, 1, 8, 8).unbind() if static else None
    quantize_onnx(source, target, calibration)
    assert target.stat().st_size < 0.35 * source.stat().st_size
    nodes = {node.op_type for node in onnx.load(target).graph.node}
    assert ("QuantizeLinear" in nodes, "MatMulInteger" in nodes) == (static, not static)
    expected, got = outputs(model.eval(), OTHERS)[0].detach(), OnnxModel(target)(OTHERS)
    error = float((expected - got).abs().max() / expected.abs().max())
    assert 1e-4 < error < 0.1
    assert names(tmp_path) == ["float.onnx", "int8.onnx"]


def test_int8_errors(tmp_path: Path) -> None:
    source = tmp_path / "float.onnx"
    to_onnx(Wide(), X, source)
    with pytest.raises(ExportError, match="calibration is empty"):
        quantize_onnx(source, tmp_path / "int8.onnx", [])
    with pytest.raises(ExportError, match=r"float\.onnx: onnxruntime cannot quantise it: .*"):
        quantize_onnx(source, tmp_path / "int8.onnx", [torch.rand(1, 3, 8, 8)])
    with pytest.raises(FileNotFoundError):
        quantize_onnx(tmp_path / "none.onnx", tmp_path / "int8.onnx")
    quantize_onnx(source, source)  # in place
    assert names(tmp_path) == ["float.onnx"]
