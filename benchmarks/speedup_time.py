"""Seconds and memory to cut half of the channels: `ModelSpeedup` beside Torch-Pruning.

    python benchmarks/speedup_time.py                 # make bench
    python benchmarks/speedup_time.py --models resnet50 residual_128 --runs 3

Every number comes from a process of its own, with one thread, and the tools take turns, so that
what else runs on the machine meets them alike. What is timed:

  compress           trace + plan + cut: ``ModelSpeedup(..., verify=False).speedup_model()``
  compress, checked  the same with the verification, which the peer does not have
  torch-pruning      constructor + ``step()``, which also scores the channels; ``compress`` scores
                     them in the pruner, before: the column "masks" says what that takes
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchvision
from provenance import commit, machine
from torch import nn

RESULTS = Path(__file__).parent / "results"
TOOLS = ("compress", "compress, checked", "torch-pruning")
PACKAGES = ("torch-pruning", "torch", "torchvision", "numpy", "networkx")


class Residual(nn.Module):
    """conv-norm-relu-conv-norm added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(self.conv1(x)).relu()
        return (x + self.norm2(self.conv2(y))).relu()


def residual(blocks: int, width: int = 16) -> nn.Sequential:
    """A chain of residual blocks: how the time grows with depth."""
    stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    return nn.Sequential(stem, *(Residual(width) for _ in range(blocks)), *head)


def build(name: str) -> tuple[nn.Module, torch.Tensor, str]:
    """The model in eval mode, an input, and the path of the last layer, which keeps its outputs."""
    torch.manual_seed(0)
    if match := re.fullmatch(r"residual_(\d+)", name):
        model, size = residual(int(match[1])), 8
    else:
        model, size = torchvision.models.get_model(name, weights=None), 224
    last = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    return model.eval(), torch.rand(1, 3, size, size), last


def cut_with_compress(name: str, verify: bool) -> dict[str, float]:
    from compress import L1FilterPruner, ModelSpeedup

    model, x, last = build(name)
    config_list = [
        {"sparsity_per_layer": 0.5, "op_types": ["Conv2d", "Linear"]},
        {"exclude": True, "op_names": [last]},
    ]

    def mask() -> tuple[nn.Module, Any]:
        pruner = L1FilterPruner(model, config_list, mode="dependency_aware", dummy_input=x)
        return pruner.compress()

    (masked, masks), making = metered(mask)
    small, cutting = metered(lambda: ModelSpeedup(masked, x, masks, verify=verify).speedup_model())
    return {**cutting, "masks_s": making["cpu_s"], "parameters_left": parameters(small)}


def cut_with_torch_pruning(name: str) -> dict[str, float]:
    import torch_pruning

    model, x, last = build(name)

    def cut() -> None:
        torch_pruning.pruner.BasePruner(
            model,
            x,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=1),
            pruning_ratio=0.5,
            ignored_layers=[model.get_submodule(last)],
        ).step()

    _, cutting = metered(cut)
    return {**cutting, "parameters_left": parameters(model)}


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def metered(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What ``work`` returns; its wall and CPU seconds and its peak memory above the present."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # memory that the allocator holds would hide what the work takes
    # Sets the peak of this process back to what it has now (man proc_pid_clear_refs).
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_mb("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return result, {"wall_s": wall, "cpu_s": cpu, "peak_mb": resident_mb("VmHWM") - before}


def resident_mb(field: str) -> float:
    line = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert line is not None, f"no {field} in /proc/self/status"
    return int(line[1]) * 1024 / 1e6


def child(tool: str, name: str) -> None:
    """One measurement, printed as JSON; after a tiny network, so that imports are not counted."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cut = {
        "compress": lambda name: cut_with_compress(name, verify=False),
        "compress, checked": lambda name: cut_with_compress(name, verify=True),
        "torch-pruning": cut_with_torch_pruning,
    }[tool]
    cut("residual_1")
    print(json.dumps(cut(name)))


def measure(tool: str, name: str, limit_s: float) -> dict[str, Any]:
    """The numbers of one fresh process, or ``{"error": why}``."""
    command = [sys.executable, __file__, "--child", tool, name]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=limit_s
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done in {limit_s:.0f} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def row(name: str, raw: dict[str, list[dict[str, Any]]]) -> list[str]:
    """One line of the table: medians of the CPU seconds, with the smallest and largest."""

    def values(tool: str, key: str) -> list[float]:
        return [run[key] for run in raw[tool] if key in run]

    def median(tool: str, key: str) -> float:
        return statistics.median(values(tool, key) or [float("nan")])

    def spread(tool: str, key: str = "cpu_s") -> str:
        if not (numbers := values(tool, key)):
            return raw[tool][0]["error"]
        return f"{statistics.median(numbers):.3g} ({min(numbers):.3g}–{max(numbers):.3g})"

    ours, checked, peer = TOOLS
    return [
        name,
        spread(ours),
        spread(peer),
        f"{median(peer, 'cpu_s') / median(ours, 'cpu_s'):.1f}",
        spread(ours, "masks_s"),
        spread(checked),
        f"{median(ours, 'peak_mb'):.0f}",
        f"{median(peer, 'peak_mb'):.0f}",
        f"{median(ours, 'parameters_left') / 1e6:.2f}",
        f"{median(peer, 'parameters_left') / 1e6:.2f}",
    ]


COLUMNS = (
    "model",
    "compress s",
    "torch-pruning s",
    "times faster",
    "masks s",
    "with check s",
    "compress peak MB",
    "torch-pruning peak MB",
    "compress left M",
    "torch-pruning left M",
)


def markdown(record: dict[str, Any]) -> str:
    rule = ["---"] + ["---:"] * (len(COLUMNS) - 1)
    rows = [row(name, raw) for name, raw in record["raw"].items()]
    lines = [f"| {' | '.join(cells)} |" for cells in (COLUMNS, rule, *rows)]
    conditions = (
        f"CPU seconds, median (min–max) of {record['arguments']['runs']} fresh processes; peak MB "
        f"above the loaded model; millions of parameters left. One thread of {record['machine']}; "
        + ", ".join(f"{name} {number}" for name, number in record["versions"].items())
        + f"; {record['date']}."
    )
    return "\n".join([*lines, "", conditions, ""])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="NAME",
        help="torchvision names, or residual_N for N residual blocks",
        default=[
            *("resnet50", "mobilenet_v2", "densenet201", "vgg11_bn"),
            *("residual_128", "residual_512"),
        ],
    )
    parser.add_argument("--runs", type=int, default=3, help="processes for each model and tool")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one process")
    parser.add_argument("--quick", action="store_true", help="resnet18, one run: does it work?")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.child:
        child(*args.child)
        return
    if args.quick:
        args.models, args.runs = ["resnet18"], 1
    raw: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name in args.models:
        raw[name] = {tool: [] for tool in TOOLS}
        for _ in range(args.runs):
            for tool in TOOLS:
                raw[name][tool].append(measure(tool, name, args.limit))
        print(" | ".join(row(name, raw[name])), flush=True)
    record = {
        "arguments": {"models": args.models, "runs": args.runs, "seed": 0},
        "machine": machine(),
        "versions": {"compress": commit()} | {package: version(package) for package in PACKAGES},
        "date": datetime.date.today().isoformat(),
        "raw": raw,
    }
    print("\n" + markdown(record))
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "speedup_time.json").write_text(json.dumps(record, indent=1) + "\n")
        (RESULTS / "speedup_time.md").write_text(markdown(record))


if __name__ == "__main__":
    main()
