"""The examples run as a user starts them."""

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


def test_the_demo_reads_cifar10(tmp_path):
    write_cifar(tmp_path / "cifar-10-batches-py", count=20)
    arguments = ("--data", "cifar10", "--data-dir", str(tmp_path), "--epochs", "1")
    done = run("examples/digits_resnet18.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "from scratch  epoch 2/2" in done.stdout


def test_the_demo_says_where_cifar10_is_missing(tmp_path):
    done = run("examples/digits_resnet18.py", "--data", "cifar10", "--data-dir", str(tmp_path))
    assert done.returncode != 0
    assert f"CIFAR-10: {tmp_path} lacks data_batch_1" in done.stderr


SMALL = ("--images", "64", "--epochs", "1")


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
        ("during", ("--last-epochs", "1"), ["dense", "masked", "small", "trained on"]),
        ("during", ("--last-epochs", "1", "--method", "group-lasso"), ["dense", "masked"]),
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


DIGITS, WORDS = ["1,226,442", "201,425"], ["109,444", "59,844"]
SENTENCES = ("--sentences", "64", "--fine-tuning-epochs", "1")


@pytest.mark.filterwarnings("ignore")  # what the libraries warn of is theirs
@pytest.mark.parametrize(
    ("library", "script", "options", "sizes"),
    [
        ("lightning", "lightning_digits.py", SMALL, DIGITS),
        ("lightning", "lightning_digits.py", (*SMALL, "--pruner", "slim"), DIGITS),
        ("accelerate", "transformers_trainer.py", (*SENTENCES, "--epochs", "1"), WORDS),
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
