"""The command line: each command, its JSON, its errors and exit codes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_search_results import RESULT
from torch import nn
from typer.testing import CliRunner

import compress
from compress import Masks
from compress.cli.commands import app
from compress.cli.job import parse_job
from compress.cli.pruner_names import PRUNERS, parameters_of
from compress.errors import CompressError, ConfigError
from compress.export import OnnxModel
from compress.search import Sensitivity
from compress.search.results import write_results

ROOT = Path(__file__).parents[1]
MODULE = """
import warnings

import torch
from torch import nn
from compress import Evaluator


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.fc = nn.Linear(width, 4)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return self.fc((x + self.conv2(x)).mean((2, 3)))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.inner = nn.Embedding(50, 8), nn.Linear(8, 16)
        self.out = nn.Linear(16, 2)

    def forward(self, ids, scale):
        assert ids.max() >= 2, "drawn below 50"
        return self.out(self.inner(self.words(ids)).relu()) * scale


def net(width=8):
    print("the user's own print")
    return Net(width)


def warned():
    warnings.warn("look out")
    return Net()


def broken():
    raise KeyError("size")


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(50, 8), nn.Linear(8, 2)

    def forward(self, ids, labels=None):
        found = self.out(self.words(ids)).mean(1)
        return found if labels is None else nn.functional.cross_entropy(found, labels)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 8, bidirectional=True, batch_first=True)
        self.attention, self.out = nn.MultiheadAttention(16, 4), nn.Linear(16, 2)

    def forward(self, x):
        y = self.lstm(x)[0]
        return self.out(self.attention(y, y, y, need_weights=False)[0])


class MaskedWords(Words):
    def forward(self, ids, labels=None, attention_mask=None):
        return super().forward(ids, labels)


def masked_words():
    return MaskedWords()


def words_evaluator():
    batches = [{"ids": torch.arange(12).view(2, 6), "labels": torch.tensor([0, 1])}] * 3
    return Evaluator(batches, loss=lambda model, batch: model(**batch))


def evaluator():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(8, 3, 8, 8, generator=generator)
    loader = [(x, torch.arange(8) % 4)]
    return Evaluator(loader, nn.functional.cross_entropy, eval_fn=lambda m: m(x).std().item())


def train(model):
    nn.init.constant_(model.fc.bias, 7.0)
"""
NETS = ("--model", "cli_nets:net", "--input", "1,3,8,8")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with the user's module in it, which is the current one."""
    (tmp_path / "cli_nets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield tmp_path
    sys.modules.pop("cli_nets", None)


def run(*arguments, code=0):
    found = CliRunner().invoke(app, [str(each) for each in arguments])
    assert found.exit_code == code, (found.output, found.exception)
    return found


def data(*arguments):
    return json.loads(run(*arguments, "--json").stdout)


def told(*arguments):
    """What stderr says of an error of the user's."""
    found = run(*arguments, code=1)
    assert found.stdout == "" and "Traceback" not in found.stderr
    return found.stderr


def write(path, **job):
    job = {"model": "cli_nets:net", "dummy_input": [2, 3, 8, 8], **job}
    path.write_text(json.dumps(job))
    return path


CONFIG = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]


# -- commands --------------------------------------------------------------------------------


def test_inspect(folder):
    found = data("inspect", *NETS)
    layers = {each["layer"]: each for each in found["layers"]}
    assert layers["conv1"]["units"] == layers["conv1"]["free"] == 8
    assert layers["conv1"]["flops"] == 2 * 8 * 3 * 9 * 64
    assert layers["conv1"]["parameters"] == 8 * 3 * 9 + 8
    assert found["coupled"] == [["conv1", "conv2"]]
    assert layers["fc"]["free"] == 0 and "is an output" in next(iter(layers["fc"]["held"]))
    shown = run("inspect", *NETS)
    assert "go together: conv1, conv2" in shown.stdout
    assert "own print" in shown.stderr and "own print" not in shown.stdout


def test_hidden_units_and_heads(folder):
    job = folder / "job.json"
    types = ["LSTM", "MultiheadAttention"]
    options = {"model": "cli_nets:Tagger", "dummy_input": [2, 4, 3], "small": "s.safetensors"}
    write(job, config_list=[{"sparsity": 0.5, "op_types": types}], **options)
    found = {each["layer"]: each["type"] for each in data("inspect", job)["layers"]}
    assert found["lstm.weight_ih_l0_reverse"] == "LSTM"
    assert found["attention.in_proj_weight"] == "MultiheadAttention"
    run("prune", job)
    import cli_nets

    small = compress.load(cli_nets.Tagger, "s.safetensors")
    assert (small.lstm.hidden_size, small.attention.num_heads) == (4, 2)
    write(job, config_list=[{"sparsity": 0.5, "op_types": ["LTSM"]}], **options)
    assert "did you mean 'LSTM'?" in told("prune", job)


def test_inputs_by_name_and_of_whole_numbers(folder):
    inputs = ("--input", "ids=4,6:int64:50", "--input", "scale=1")
    found = data("inspect", "--model", "cli_nets:Two", *inputs)
    assert [each["layer"] for each in found["layers"]] == ["words", "inner", "out"]
    assert "for all of them" in told("inspect", "--model", "cli_nets:Two", *inputs[:2], *NETS[2:])
    assert "got '1x3'" in told("inspect", *NETS[:2], "--input", "1x3")


def test_the_model_has_its_arguments_and_weights(folder):
    run("inspect", *NETS)  # which makes the folder importable
    state = {name: t + 1 for name, t in _net(6).state_dict().items()}
    save_file(state, "w.safetensors")
    torch.save(state, "w.pth")
    for file in ("w.safetensors", "w.pth"):
        run("prune", *NETS, "--model-args", "width: 6", "--weights", file, "--sparsity", 0.5,
            "--exclude", "fc", "--small", "s.safetensors")  # fmt: skip
        small = compress.load(lambda: _net(6), "s.safetensors")
        assert torch.equal(small.fc.bias, state["fc.bias"])
    assert "got shape (6,); the model has (8,)" in told("inspect", *NETS, "--weights", "w.pth")
    torch.save(nn.Linear(2, 2), "whole.pth")  # a pickled model, whose code would be executed
    assert "cannot be read" in told("inspect", *NETS, "--weights", "whole.pth")
    assert "there is no file none.pth" in told("inspect", *NETS, "--weights", "none.pth")


def _net(width=8):
    import cli_nets

    return cli_nets.Net(width)


def test_prune_and_speedup_make_the_same_model(folder):
    run("prune", *NETS, "--sparsity", 0.5, "--exclude", "fc", "--masks", "m.safetensors",
        "--small", "small.safetensors", "--seed", 3)  # fmt: skip
    found = data("speedup", *NETS, "--masks", "m.safetensors", "--small", "2.safetensors",
                 "--seed", 3)  # fmt: skip
    assert found["wrote"] == ["2.safetensors"]
    one, two = (compress.load(_net, f"{name}.safetensors") for name in ("small", "2"))
    assert one.state_dict().keys() == two.state_dict().keys()
    assert all(torch.equal(t, two.state_dict()[n]) for n, t in one.state_dict().items())
    assert set(Masks.load("m.safetensors")) == {"conv1", "conv2"}
    report = found["report"]
    assert report["parameters_after"] == sum(p.numel() for p in one.parameters())
    assert "there are none" in told("speedup", *NETS, "--small", "x.safetensors")
    assert "nothing to write" in told("prune", *NETS, "--sparsity", 0.5)


def test_a_small_model_is_pruned_again(folder):
    some = ("--sparsity", 0.5, "--exclude", "fc")
    run("prune", *NETS, *some, "--small", "one.safetensors")
    run("prune", *NETS, *some, "--weights", "one.safetensors", "--small", "two.safetensors")
    sizes = [compress.load(_net, f"{n}.safetensors").conv1.out_channels for n in ("one", "two")]
    assert sizes[1] < sizes[0] < 8


def test_a_file_says_all_of_it(folder):
    job = write(
        folder / "job.json", config_list=CONFIG, evaluator="cli_nets:evaluator",
        train="cli_nets:train", masks="m.safetensors", small="s.safetensors",
        pruner={"name": "TaylorFOWeightFilterPruner", "arguments": {"mode": "dependency_aware"}},
    )  # fmt: skip
    assert data("prune", job)["wrote"] == ["m.safetensors", "s.safetensors"]
    small = compress.load(_net, "s.safetensors")
    assert small.conv1.out_channels == small.conv2.out_channels == 4
    assert (small.fc.bias == 7).all()  # trained
    found = data("bench", job, "--repeats", 2, "--warmup", 0)
    assert list(found)[:2] == ["dense", "small"]
    assert found["small"]["parameters"] < found["dense"]["parameters"]
    assert found["small"]["latency_ms"]["median"] > 0 and found["small"]["score"] > 0
    shown = run("report", "--small", "s.safetensors").stdout
    assert "conv1.weight" in shown and "TaylorFOWeightFilterPruner" in shown
    planned = data("report", job)["report"]
    assert (
        planned["planned"] and {x["layer"]: x["removed"] for x in planned["layers"]}["conv1"] == 4
    )


def test_options_go_before_the_file(folder):
    job = write(folder / "job.json", config_list=CONFIG, model={"factory": "x:y"}, seed=1)
    found = data("prune", job, *NETS, "--model-args", "width: 4", "--sparsity", 0.25,
                 "--pruner", "FPGMPruner", "--masks", "m.safetensors")  # fmt: skip
    assert found["pruner"] == "FPGMPruner"
    assert Masks.load("m.safetensors")["fc"]["bias"].tolist().count(False) == 1  # of all layers


def test_hooks_are_functions_of_the_users(folder):
    job = write(
        folder / "job.json", config_list=CONFIG, small="s.safetensors",
        pruner={"name": "LinearPruner", "hooks": {"finetuner": "cli_nets:train"},
                "arguments": {"total_iteration": 2, "pruning_algorithm": "l1", "speedup": True}},
    )  # fmt: skip
    run("prune", job)
    small = compress.load(_net, "s.safetensors")
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in _net().parameters())
    assert (small.fc.bias == 7).all()


def test_explain(folder):
    found = data("explain", "conv1", *NETS)
    assert found["coupled"] == ["bn1", "conv2"] and found["free"] == 8
    assert "conv2" in run("explain", "conv1", *NETS).stdout
    assert not data("explain", "fc", *NETS, "--channel", 1)["free"]
    Masks({"conv1": {"weight": torch.zeros(8, 3, 3, 3)}}).save("m.safetensors")
    under = data("explain", "conv1", *NETS, "--channel", 1, "--masks", "m.safetensors")
    assert under["state"] == "stays" and "is not masked in conv2" in under["reason"]
    assert "did you mean 'conv" in told("explain", "conv9", *NETS)
    assert "from 0 to 7" in told("explain", "conv1", *NETS, "--channel", 8)


def test_masks_of_nni_are_read(folder):
    weight = torch.ones(8, 3, 3, 3)
    weight[2] = 0
    torch.save({"conv1": {"weight": weight, "bias": None}}, "m.pt")
    (layer,) = data("report", *NETS, "--masks", "m.pt")["report"]["layers"]
    assert (layer["layer"], layer["units"], layer["masked"]) == ("conv1", 8, 1)


def test_sensitivity(folder):
    job = write(folder / "job.json", evaluator="cli_nets:evaluator")
    found = data("sensitivity", job, "--sparsities", "0.25,0.5", "--output", "curves.csv")
    assert list(found["performances"]["conv1"]) == ["0.25", "0.5"]
    assert found["wrote"] == ["curves.csv"]
    assert Path("curves.csv").read_text().startswith("layername,0.25,0.5")
    assert "eval_fn" in told("sensitivity", *NETS)
    assert "expected numbers" in told("sensitivity", job, "--sparsities", "a")
    wrong = told("sensitivity", job, "--sparsities", "1.5")
    assert "sensitivity analysis cannot be made" in wrong


def test_sensitivity_asks_for_matplotlib_before_it_measures(folder, monkeypatch):
    job = write(folder / "job.json", model="no_such_module:f")
    monkeypatch.setattr("compress.charts.figure.find_spec", lambda name: None)
    assert "figures need matplotlib" in told("sensitivity", job, "--output", "curves.png")


def export(target, *arguments):
    """What `compress export` says, without torch.compile, which takes seconds."""
    return data("export", "--to", target, "--repeats", 2, "--warmup", 0, *arguments)


def test_export_of_the_small_model(folder):
    run("prune", *NETS, "--sparsity", 0.5, "--exclude", "fc", "--small", "small.safetensors")
    small = compress.load(_net, "small.safetensors").eval()
    x = torch.rand(3, 3, 8, 8)
    some = (*NETS, "--small", "small.safetensors", "--runtimes", "onnxruntime")
    found = export("small.onnx", *some)  # the file itself is timed, and no other
    assert found["format"] == "ONNX" and found["wrote"] == ["small.onnx"]
    assert found["relative_error"] < 1e-5 and found["megabytes"] > 0 and not found["missing"]
    assert found["runtimes"]["onnxruntime"]["latency_ms"]["median"] > 0
    torch.testing.assert_close(OnnxModel("small.onnx")(x), small(x))
    found = export("small.pt2", *NETS, "--small", "small.safetensors", "--runtimes", "")
    assert list(found["runtimes"]) == ["eager", found["format"]] == ["eager", "torch.export"]
    torch.testing.assert_close(torch.export.load("small.pt2").module()(x), small(x))


def test_export_of_int8_calibrates_where_there_is_data(folder):
    quiet = ("--int8", "--runtimes", "")
    found = export("static.onnx", *NETS, *quiet, "--evaluator", "cli_nets:evaluator")
    assert "static, 1 calibration" in found["format"]
    assert found["runtimes"]["int8 onnxruntime"]["relative_error"] > 0
    assert "dynamic" in export("dynamic.onnx", *NETS, *quiet)["format"]
    ids = ("--model", "cli_nets:Words", "--input", "ids=2,6:int64:50")
    hook = ("--evaluator", "cli_nets:words_evaluator", "--calibration", 2)
    found = export("words.onnx", *ids, *quiet, *hook)  # the labels are no input of the file
    assert "static, 2 calibration" in found["format"]
    assert "attention_mask" in told(
        "export", "--to", "x.onnx", "--model", "cli_nets:masked_words", "--int8", *hook,
        *ids[2:], "--input", "attention_mask=2,6:int64",
    )  # fmt: skip


def test_export_errors(folder, monkeypatch):
    for arguments, words in (
        (("--to", "x.txt"), "expected a file .onnx, or .pt2"),
        (("--to", "x.pt2", "--int8"), "--int8: it is for ONNX"),
        (("--to", "no/x.onnx"), "there is no folder no"),
        (("--to", "x.pt2", "--runtimes", "tvm"), "--runtimes: got tvm; expected some of"),
        (("--to", "x.pt2", "--masks", "m.safetensors"), "No such option"),
    ):
        code = 2 if words == "No such option" else 1
        assert words in run("export", *NETS, *arguments, code=code).stderr
    job = write(folder / "job.json", masks="m.safetensors")
    assert "run compress speedup first" in told("export", job, "--to", "x.pt2")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "onnxruntime" else find(n)
    )
    assert "pip install compress-torch[onnx]" in told("export", *NETS, "--to", "x.onnx")
    assert not list(folder.glob("x.*"))


def test_report_as_a_page(folder):
    run("prune", *NETS, "--sparsity", 0.5, "--exclude", "fc", "--masks", "m.safetensors",
        "--small", "s.safetensors")  # fmt: skip
    curves = Sensitivity({"conv1": {0.5: 0.125}}, 0.5)
    curves.export("curves.json")
    write_results(RESULT, ".")
    quick = ("--repeats", 2, "--warmup", 0)
    found = data("report", *NETS, "--masks", "m.safetensors", "--evaluator", "cli_nets:evaluator",
                 "--sensitivity", "curves.json", "--search", ".", "--html", "page.html",
                 *quick)  # fmt: skip
    assert found["wrote"] == ["page.html"] and found["report"]["planned"]
    text = Path("page.html").read_text()
    for words in ("cli_nets:net", ">masked<", ">small<", ">score<", ">conv2<", "the same, up to",
                  "What a layer alone bears", "0.125", "Channel graph",
                  "Some: 5 trials"):  # fmt: skip
        assert words in text, words
    found = data("report", *NETS, "--small", "s.safetensors", "--markdown", "page.md", *quick)
    assert found["wrote"][0] == "page.md" and found["cuts"]
    text = Path("page.md").read_text()
    assert "## What was cut" in text and "| conv1.weight | (8, 3, 3, 3) | (4, 3, 3, 3) |" in text
    assert "for a page; pass --html" in told(
        "report", *NETS, "--masks", "m.safetensors", "--search", "."
    )
    assert "no search can be read" in told(
        "report", *NETS, "--masks", "m.safetensors", "--search", "none", "--html", "x.html"
    )


# -- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("inspect", "--model", "cli_nets:nett", *NETS[2:]), "did you mean 'net'?"),
        (("inspect", "--model", "nowhere.at:all", *NETS[2:]), "there is no module 'nowhere'"),
        (("inspect", "--model", "cli_nets.net", *NETS[2:]), "model.factory: got 'cli_nets.net'"),
        (("inspect", "--model", "cli_nets:evaluator", *NETS[2:]), "expected a torch.nn.Module"),
        (("inspect", "--model", "cli_nets:broken", *NETS[2:]), "it raised KeyError: 'size'"),
        (("inspect", *NETS[:2]), "dummy_input: it is missing"),
        (("inspect", *NETS[:2], "--input", "1,3,8,8:float"), "expected one of float32"),
        (("inspect", *NETS[:2], "--input", "1,4,8,8"), "4 channels"),
        (("inspect", *NETS, "--device", "nodevice"), "device: got 'nodevice'"),
        (("inspect", "none.yaml"), "none.yaml: it cannot be read"),
        (("prune", *NETS, "--small", "s"), "config_list: it is missing"),
        (("prune", *NETS, "--pruner", "L1Prune"), "did you mean 'L1"),
        (("prune", *NETS, "--exclude", "fc"), "--exclude goes with --sparsity"),
        (("bench", "--small", "s"), "model: it is missing"),
        (("report", *NETS), "nothing to report"),
        (("report", *NETS, "--html", "page.txt"), "--html: got page.txt; expected a file .html"),
        (("report", *NETS, "--masks", "none.safetensors"), "no such file"),
    ],
)
def test_errors_of_the_users_are_told(folder, arguments, words):
    assert words in told(*arguments)


def test_a_folder_that_is_not_there_is_told_before_the_work(folder):
    job = write(folder / "job.json", config_list=CONFIG, model="no_such_module:f")
    for arguments in (
        ("prune", job, "--small", "no/s.safetensors"),
        ("prune", job, "--masks", "no/m.safetensors"),
        ("speedup", job, "--small", "no/s.safetensors"),
        ("sensitivity", job, "--output", "no/c.csv"),
        ("report", job, "--html", "no/page.html"),
    ):
        assert "there is no folder no" in told(*arguments)
    assert "expected a file .csv" in told("sensitivity", job, "--output", "c.txt")


def test_a_file_that_cannot_be_written_is_told_before_the_work(folder, monkeypatch):
    job = write(folder / "job.json", config_list=CONFIG, model="no_such_module:f")
    Path("taken.html").mkdir()
    assert "taken.html: it is a folder" in told("report", job, "--html", "taken.html")
    assert "it is a folder" in told("prune", job, "--masks", ".")
    same = told("prune", job, "--masks", "a.safetensors", "--small", "./a.safetensors")
    assert "masks, small: got './a.safetensors' for both; expected two files" in same
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    assert "the folder . cannot be written" in told("export", job, "--to", "x.pt2")


def test_a_disk_that_is_full_is_no_traceback(folder, monkeypatch):
    def full(path, *_, **__):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    job = Path("job.yaml")
    with job.open("w") as file:
        json.dump({"model": "cli_nets:net", "dummy_input": [2, 3, 8, 8]}, file)
    run("prune", job, "--sparsity", 0.5, "--masks", "masks.safetensors")
    arguments = ("report", job, "--masks", "masks.safetensors", "--html", "page.html")
    assert "No space left on device: 'page.html'" in told(*arguments, "--repeats", 1)


def test_usage_errors_are_2_and_debug_shows_where(folder):
    assert "CONFIG file" in run("inspect", code=2).stderr
    run("inspekt", code=2)
    run("prune", *NETS, "--sparsity", "half", code=2)
    with pytest.raises(CompressError, match="KeyError"):
        CliRunner().invoke(
            app, ["inspect", "--model", "cli_nets:broken", *NETS[2:], "--debug"],
            catch_exceptions=False,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"modell": 1}, "modell: unknown key; did you mean 'model'?"),
        ({"model": {"factory": "a:b", "kwarg": {}}}, "model.kwarg: unknown key; did you mean 'kwa"),
        ({"model": {"args": [1]}}, "model.factory: it is missing; expected module:function"),
        ({"model": {"factory": "a:b", "args": 3}}, "model.args: got 3; expected a list of"),
        ({"dummy_input": [[1, 3], [0]]}, "dummy_input.1.shape.0: got 0; expected a list of sizes"),
        ({"dummy_input": {"ids": "x"}}, "dummy_input.ids: got 'x'; expected a shape"),
        ({"config_list": {"sparsity": 1}}, "config_list: got dict"),
        ({"config_list": [{"sparsity": 2, "op_types": ["default"]}]}, "config_list[0]['sparsity']"),
        ({"pruner": {"name": "L1FilterPruner", "arguments": {"mod": "x"}}}, "mean 'mode'?"),
        ({"pruner": {"name": "L1FilterPruner", "hooks": {"x": "a:b"}}}, "pruner.hooks: L1Filter"),
        ({"speedup": {"constants": "none"}}, "speedup.constants: got 'none'; expected one of exa"),
        ({"seed": "0"}, "seed: got '0'; expected a whole number"),
        ({"evaluator": "data.py"}, "evaluator: got 'data.py'; expected module:function"),
    ],
)
def test_a_file_is_checked_before_anything_is_imported(change, words):
    with pytest.raises(ConfigError) as caught:
        parse_job("job.yaml", {"model": "no_such_module:f", **change})
    assert words in str(caught.value) and "job.yaml" in str(caught.value)


def test_every_problem_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        parse_job("job.yaml", {"seed": -1, "device": 3, "small": []})
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("name", PRUNERS)
def test_every_pruner_can_be_named(name):
    assert set(parameters_of(PRUNERS[name])) & {"mode", "dummy_input", "pruning_params"}


# -- as a user starts it -------------------------------------------------------------------------


def start(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "compress", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_as_a_program(folder):
    found = start(folder, "explain", "conv1", *NETS, "--json")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["units"] == 8
    failed = start(folder, "explain", "conv9", "--model", "cli_nets:warned", *NETS[2:])
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("warning: look out\nerror: 'conv9'")


def test_without_typer_it_says_what_to_install(monkeypatch):
    from compress import cli

    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"typer and yaml.*compress-torch\[cli\]"):
        cli.main()
