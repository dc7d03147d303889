"""Do shrunk models export, and compute the same in onnxruntime at other batch sizes?

    python benchmarks/export.py                       # the 25 families: about a quarter of an hour
    python benchmarks/export.py --model resnet18 vit_b_32

Each of the zoo's torchvision families gets drawn weights and statistics, loses half of the filters
of each layer (`L1FilterPruner`, "dependency_aware"), and is shrunk. Then

  torch.export  `to_exported` with a batch of any size
  ONNX          `to_onnx` with a batch of any size, run in onnxruntime

are held against the *masked* model on inputs of batch sizes 2, 1 and 3. Where one fails, the dense
model is exported, too: is it the shrinking, or the model? Latencies are of batch 1 on one thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from provenance import commit, machine
from torch import nn
from zoo import TooLong, line_of, outputs_last, randomise, seeded, time_limit
from zoo_models import FAMILIES, Entry, zoo

from compress import L1FilterPruner, ModelSpeedup
from compress.errors import ExportError
from compress.export import OnnxModel, to_exported, to_onnx
from compress.export.parity import Runtime, parity
from compress.measure import latencies, model_size_mb
from compress.measure.latency import stopwatch
from compress.measure.table import Table

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime")
COLUMNS = (
    "model", "left", "torch.export: difference", "ONNX: difference", "s", "MB",
    "dense ms", "small ms", "torch.export ms", "onnxruntime ms",
)  # fmt: skip
SIZES = (1, 3)
Record = dict[str, Any]


def main() -> None:
    args = arguments()
    version_of_ours = commit()  # of what runs, whatever is edited meanwhile
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    path = Path(args.out).with_suffix(".json")
    records: dict[str, Record] = json.loads(path.read_text()) if path.is_file() else {}
    for name in args.model:
        records[name] = measure(name, args.limit) | {"commit": version_of_ours}
        print(name, records[name], flush=True)
        path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    text = markdown(records)
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)


# -- measuring -----------------------------------------------------------------------------


def measure(name: str, limit_s: float) -> Record:
    """What one family does; why not, where it does not."""
    try:
        with time_limit(limit_s):
            return _measure(name)
    except TooLong:
        return {"error": f"not done in {limit_s:.0f} s"}


def _measure(name: str) -> Record:
    torch.manual_seed(0)
    entry = zoo().builders[name]()
    randomise(entry)
    dense = copy.deepcopy(entry.model)
    masked, small = pruned(entry)
    pair = seeded(entry.inputs, 2, 0)
    record: Record = {"left": round(model_size_mb(small) / model_size_mb(dense), 4)}
    runtimes: dict[str, nn.Module] = {"dense": dense, "small": small}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        for kind, export in (("torch.export", exported), ("ONNX", as_onnx)):
            with stopwatch() as elapsed:
                record[kind] = held(export, small, masked, pair, file, runtimes, kind)
            record[f"{kind}: s"] = round(elapsed(), 1)
            if isinstance(record[kind], str):
                record[f"{kind}: dense"] = held(export, dense, dense, pair, file, {}, kind)
        if file.is_file():
            record["megabytes"] = round(file.stat().st_size / 1e6, 2)
        times = latencies(runtimes, seeded(entry.inputs, 1, 0), warmup=3, repeats=30)
    record["ms"] = {each: round(taken.median_ms, 2) for each, taken in times.items()}
    return record


def pruned(entry: Entry) -> tuple[nn.Module, nn.Module]:
    """The masked model and the small one: half of the filters, but for those of the outputs."""
    config_list: list[dict[str, Any]] = [
        {"sparsity": 0.5, "op_types": ["default"]},
        {"exclude": True, "op_names": sorted(outputs_last(entry))},
    ]
    one = seeded(entry.inputs, 1, 0)
    pruner = L1FilterPruner(entry.model, config_list, mode="dependency_aware", dummy_input=one)
    masked, masks = pruner.compress()
    small = ModelSpeedup(copy.deepcopy(masked), one, masks).speedup_model()
    return masked, small


def exported(model: nn.Module, pair: Any, file: Path) -> nn.Module:
    return Runtime(to_exported(model, pair, check=False).module().__call__)


def as_onnx(model: nn.Module, pair: Any, file: Path) -> nn.Module:
    to_onnx(model, pair, file, check=False)
    return OnnxModel(file)


def held(
    export: Callable[[nn.Module, Any, Path], nn.Module],
    model: nn.Module,
    reference: nn.Module,
    pair: Any,
    file: Path,
    runtimes: dict[str, nn.Module],
    kind: str,
) -> float | str:
    """The largest relative difference to ``reference``, or what went wrong.

    What computes the same joins ``runtimes``.
    """
    try:
        runtime = export(model, pair, file)
    except ExportError as error:
        return line_of(error)
    found = parity(runtime, reference, pair, batch_sizes=SIZES)
    if not found:
        return str(found)
    runtimes[kind] = runtime
    return found.relative_error


# -- the table -----------------------------------------------------------------------------


def row(name: str, record: Record) -> tuple[str, ...]:
    if "error" in record:
        return (name, record["error"], *[""] * (len(COLUMNS) - 2))
    ms = [record["ms"].get(each) for each in ("dense", "small", "torch.export", "ONNX")]
    return (
        name,
        f"{record['left']:.0%}",
        difference(record, "torch.export"),
        difference(record, "ONNX"),
        f"{record['ONNX: s']:.0f}",
        f"{record['megabytes']:.1f}" if "megabytes" in record else "–",
        *("–" if each is None else f"{each:.1f}" for each in ms),
    )


def difference(record: Record, kind: str) -> str:
    """The number; where there is none, why, and whether the dense model fares better."""
    found = record[kind]
    if not isinstance(found, str):
        return f"{found:.0e}"
    dense = record[f"{kind}: dense"]
    also = "the dense model, too" if isinstance(dense, str) else "not the dense model"
    return f"{found} ({also})"


def markdown(records: dict[str, Record]) -> str:
    done = {name: each for name, each in records.items() if "error" not in each}
    lines = [
        f"- {kind}: {sum(not isinstance(each[kind], str) for each in done.values())} of "
        f"{len(records)} compute what the masked model does, at batch sizes 2, 1 and 3"
        for kind in ("torch.export", "ONNX")
    ]
    commits = ", ".join(sorted({each["commit"] for each in records.values()}))
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    note = (
        "`difference`: the largest, of the output's scale. `s`: to export and to compare. `left`: "
        "of the size in memory. Latencies: median of 30 passes, batch 1, one thread, in turn, on a "
        f"machine with other work.\n\n`benchmarks/export.py`, commit {commits}, {machine()}, "
        f"{packages}"
    )
    table = Table(COLUMNS, tuple(row(name, each) for name, each in records.items()), note)
    return "\n".join([*lines, "", table.markdown()])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", nargs="+", default=FAMILIES.split(), metavar="NAME")
    parser.add_argument("--limit", type=float, default=120, help="seconds for one model")
    parser.add_argument("--out", default=str(RESULTS / "export"), help="two files: .json and .md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
