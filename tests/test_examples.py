"""The examples run as a user starts them."""

import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import speedup_time
from test_data import write_cifar

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the tests run without an install, too
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(script, *arguments):
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def run_here(monkeypatch, capsys):
    """An example's output, run in this process: what takes long is to start another one."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_the_demo_prints_one_table_of_all_five_models():
    done = run("examples/digits_resnet18.py", "--quick", "--epochs", "1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    heading = next(number for number, line in enumerate(lines) if "parameters" in line)
    rows = [line.split("  ")[1].strip() for line in lines[heading + 2 : heading + 7]]
    assert rows == ["dense", "masked", "small", "fine-tuned", "from scratch"]
    assert "11.17 M" in lines[heading + 2]


def test_the_demo_reads_cifar10(run_here, tmp_path):
    write_cifar(tmp_path / "cifar-10-batches-py", count=20)
    arguments = ("--data", "cifar10", "--data-dir", str(tmp_path), "--epochs", "1")
    assert "from scratch  epoch 2/2" in run_here("digits_resnet18.py", *arguments)


def test_the_demo_says_where_cifar10_is_missing(run_here, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"CIFAR-10: {tmp_path} lacks data_batch_1"):
        run_here("digits_resnet18.py", "--data", "cifar10", "--data-dir", str(tmp_path))


SMALL = ("--quick", "--epochs", "1")


@pytest.mark.parametrize(
    ("layer", "parameters", "mult_adds"),
    [("layer2.0.conv1", "11,138,392", "36.33"), ("conv1", "11,136,798", "34.56")],
)
def test_one_layer_by_its_activation(layer, parameters, mult_adds, run_here):
    # A fifth of 128 filters is 25.6, of which 25 go; each is 576 + 2 + 1,152 parameters.
    arguments = (*SMALL, "--fine-tuning-epochs", "1", "--layer", layer)
    output = run_here("resnet18_activation.py", *arguments)
    lines = [line.split() for line in output.splitlines()]
    assert [line[-1] for line in lines if line[:2] == ["Total", "params:"]] == [
        "11,181,642",
        parameters,
    ]
    assert [line[-1] for line in lines if line[:2] == ["Total", "mult-adds"]] == [
        "37.03",
        mult_adds,
    ]
    trained = next(line for line in output.splitlines() if line.startswith("trained on: "))
    assert trained.startswith(f"trained on: {layer}.weight, ")
    assert trained.endswith("fc.weight, fc.bias")


@pytest.mark.parametrize(
    ("script", "options", "rows"),
    [
        ("before", ("--pruner", "snip-filters"), ["dense", "pruned first"]),
        ("before", ("--pruner", "grasp"), ["dense", "pruned first"]),
        ("during", ("--fine-tuning-epochs", "1"), ["dense", "masked", "small", "trained on"]),
        ("during", ("--fine-tuning-epochs", "1", "--method", "group-lasso"), ["dense", "masked"]),
        ("after", ("--fine-tuning-epochs", "1"), ["dense", "small", "fine-tuned"]),
    ],
)
def test_before_during_and_after_training(script, options, rows, run_here):
    output = run_here(f"prune_{script}_training.py", *SMALL, *options)
    lines = output.splitlines()
    heading = next(number for number, line in enumerate(lines) if "mult-adds" in line)
    found = [line.split("  ")[1].strip() for line in lines[heading + 2 : heading + 2 + len(rows)]]
    assert found == rows
    if "grasp" not in options:  # which masks single weights
        assert "0.20 M (16%)" in output


DIGITS, WORDS = ["1,226,442", "201,425"], ["301,894", "219,270"]


@pytest.mark.filterwarnings("ignore")  # what the libraries warn of is theirs
@pytest.mark.parametrize(
    ("library", "script", "options", "sizes"),
    [
        ("lightning", "lightning_digits.py", SMALL, DIGITS),
        ("lightning", "lightning_digits.py", (*SMALL, "--pruner", "slim"), DIGITS),
        ("accelerate", "transformers_trainer.py", (*SMALL, "--fine-tuning-epochs", "1"), WORDS),
    ],
)
def test_the_trainers_of_other_libraries(library, script, options, sizes, run_here):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(library)
    lines = [line.split() for line in run_here(script, *options).splitlines()]
    found = {line[0]: line for line in lines if "parameters" in line}
    assert [found[name][1] for name in ("dense", "small")] == sizes
    assert found["masked"][3] == found["small"][3]  # the same accuracy


def table_in(output):
    """``{row: cells}`` of the table that an example prints, and its heading."""
    lines = output.splitlines()
    start = next(number for number, line in enumerate(lines) if "mult-adds" in line)
    rows = [re.split(r"  +", line.strip()) for line in lines[start + 2 :]]
    end = next(number for number, row in enumerate(rows) if row[0].startswith("latency"))
    return {row[0]: row[1:] for row in rows[:end]}


@pytest.mark.filterwarnings("ignore")  # what the libraries warn of is theirs
@pytest.mark.parametrize(
    ("library", "script", "shares", "says"),
    [
        ("timm", "vit_heads.py", ("51%", "55%"), "small: 4×8 + 128, 4×8 + 128"),
        ("transformers", "bert_text.py", ("73%", "73%"), "301,894 -> 219,270 parameters"),
        ("torchvision", "lstm_digits.py", ("26%", "26%"), "hidden units: 48 of 96"),
        ("torchvision", "detector.py", None, "489,456 -> 298,816 parameters"),
    ],
)
def test_masked_and_small_are_as_good(library, script, shares, says, run_here):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(library)
    output = run_here(script, *SMALL, "--fine-tuning-epochs", "1")
    table = table_in(output)
    assert list(table) == ["dense", "masked", "small", "fine-tuned"]
    assert table["masked"][0] == table["small"][0]  # the same accuracy
    if shares:
        assert [cell.split("(")[1] for cell in table["small"][1:3]] == [f"{s})" for s in shares]
    assert says in output


@pytest.mark.filterwarnings("ignore")
def test_a_language_model_is_pruned_saved_and_loaded(run_here, tmp_path):
    pytest.importorskip("transformers")
    output = run_here(
        "llama_text.py", *SMALL, "--fine-tuning-epochs", "1", "--folder", str(tmp_path)
    )
    table = table_in(output)
    assert table["masked"][0] == table["small"][0]
    assert "num_key_value_heads: 4 -> 2" in output
    assert "num_attention_heads: 8 -> 4" in output
    assert "intermediate_size: 256 -> 128" in output
    assert f"loaded: perplexity {table['fine-tuned'][0]};" in output
    assert {"config.json", "model.safetensors"} <= {file.name for file in tmp_path.iterdir()}


@pytest.mark.parametrize("cost", ["flops", "memory"])  # times would be those of other tests
def test_a_target_is_met(cost, run_here):
    options = ("--cost", cost, "--target", "0.5", "--fine-tuning-epochs", "1")
    output = run_here("latency_target.py", *SMALL, *options)
    line = next(line for line in output.splitlines() if line.startswith("target: 50.0%"))
    reached = float(re.search(r"\((\d+\.\d)%\), predicted", line)[1])
    assert 40 < reached <= 50
    assert list(table_in(output)) == ["dense", "small", "fine-tuned"]


def test_saving_and_loading(run_here, tmp_path):
    arguments = (*SMALL, "--fine-tuning-epochs", "1", "--file", str(tmp_path / "small"))
    output = run_here("save_and_load.py", *arguments)
    assert "bit for bit the same: True" in output
    assert "made of a ResNet by 2 speedups" in output
    assert "fc.weight: it is of shape (7, 256), expected (10, 256)" in output
    assert (tmp_path / "small").is_file()


def test_the_road_to_int8(run_here):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    output = run_here("to_int8.py", *SMALL, "--fine-tuning-epochs", "1", "--without-torchao")
    rows = [line.split("  ") for line in output.splitlines()]
    table = {row[1]: [cell.strip() for cell in row[2:] if cell] for row in rows if len(row) > 4}
    sizes = [float(table[name][1]) for name in ("dense", "pruned", "ONNX")]
    assert sizes == [4.92, 1.24, pytest.approx(1.24, abs=0.1)]
    for kind in ("dynamic", "static"):
        assert float(table[f"ONNX int8, {kind}"][1]) < 0.5


def test_the_benchmark_measures_in_a_fresh_process():
    done = speedup_time.measure("compress", "residual_2", limit_s=120)
    assert done["wall_s"] > 0
    assert done["parameters_left"] < speedup_time.parameters(speedup_time.residual(2))


def test_the_benchmark_tells_why_there_is_no_number():
    done = speedup_time.measure("compress", "no_such_model", limit_s=120)
    assert "Unknown model no_such_model" in done["error"]


def test_a_row_of_the_benchmark():
    def run(seconds):
        numbers = {"cpu_s": seconds, "wall_s": 9.0, "peak_mb": 10.4, "parameters_left": 2e6}
        return numbers | {"masks_s": 0.5}

    ours, checked, peer = speedup_time.TOOLS
    raw = {ours: [run(2), run(1), run(3)], checked: [run(4)], peer: [run(8), run(10)]}
    assert speedup_time.row("net", raw) == [
        "net",
        "2 (1–3)",
        "9 (8–10)",
        "4.5",
        "0.5 (0.5–0.5)",
        "4 (4–4)",
        *("10", "10", "2.00", "2.00"),
    ]
    raw[peer] = [{"error": "not done in 1 s"}]
    assert speedup_time.row("net", raw)[2:4] == ["not done in 1 s", "nan"]


def test_every_example_is_short_in_the_index_and_run_by_a_test():
    index = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    tests = "".join(file.read_text(encoding="utf-8") for file in Path(__file__).parent.glob("*.py"))
    for file in sorted((ROOT / "examples").glob("[a-z]*.py")):
        assert f"[{file.name}]({file.name})" in index
        assert file.name in tests or file.name.startswith("prune_"), file.name
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 150, file.name
