"""The examples run as a user starts them."""

import subprocess
import sys
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
