"""Seconds and memory to shrink a checkpoint in its files, beside a plain copy of the same bytes.

    python benchmarks/checkpoints.py                  # 1.1 billion parameters: 5 GB of disk for now
    python benchmarks/checkpoints.py --layers 2       # a small one

A Llama-shaped checkpoint with random numbers is written in shards, and each of the following is
done in a process of its own with one thread, ``--runs`` times in turn. Before it, the source is
dropped from the page cache (``posix_fadvise``, Linux only); the time ends when all is on the disk
(``fsync``).

  copy     the bytes of the source, file by file
  hidden   `shrink_checkpoint` without half of the hidden units of each MLP and half of the heads
  width    the same, and a quarter of the residual width: every matrix loses columns, too
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from provenance import commit, machine
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from compress import ModelSpeedup, shrink_checkpoint

RESULTS = Path(__file__).parent / "results"
STEPS = ("copy", "hidden", "width")
PACKAGES = ("torch", "safetensors", "transformers")
HEADS, KEY_HEADS, HEAD_DIM, HIDDEN = 32, 4, 64, 5632  # as TinyLlama has them


def main() -> None:
    args = arguments()
    if args.step:
        print(json.dumps(run(args.step, args.layers, Path(args.dir))))
        return
    found: dict[str, list[dict[str, float]]] = {step: [] for step in STEPS}
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        count = make(Path(folder) / "source", args.layers)
        for _ in range(args.runs):
            for step in STEPS:
                found[step].append(in_a_process(step, args.layers, folder))
                print(f"{step}: {found[step][-1]}", flush=True)
    lines = [*table(found), "", note(count, args.layers, args.runs)]
    print("\n".join(lines))
    if args.layers == 22:
        (RESULTS / "checkpoints.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        raw = json.dumps(found, indent=1)
        (RESULTS / "checkpoints.json").write_text(raw + "\n", encoding="utf-8")


# -- the checkpoint ------------------------------------------------------------------------


def empty_model(layers: int) -> nn.Module:
    """The model on the meta device, in bfloat16."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def make(folder: Path, layers: int, limit: int = 500_000_000) -> int:
    """Write shards of about ``limit`` bytes; returns how many parameters they have."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    parameters = dict(empty_model(layers).named_parameters())
    weight_map: dict[str, str] = {}
    for name, parameter in parameters.items():
        if sum(each.nbytes for each in shards[-1].values()) + parameter.nbytes > limit:
            write_shard(folder, shards, weight_map)
        values = torch.randn(parameter.shape, generator=generator) * 0.02
        shards[-1][name] = values.to(torch.bfloat16)
    write_shard(folder, shards, weight_map)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    return sum(parameter.numel() for parameter in parameters.values())


def write_shard(folder: Path, shards: list[Any], weight_map: dict[str, str]) -> None:
    """Write the last shard, and begin another one."""
    name = f"model-{len(shards):05d}.safetensors"
    save_file(shards[-1], folder / name)
    weight_map |= dict.fromkeys(shards[-1], name)
    shards[-1] = None
    shards.append({})


def masks_for(model: nn.Module, width: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Half of the hidden units and key heads, chosen at random; a quarter of the width.

    Rows that are expanded take no memory; the speedup has a copy that does.
    """
    generator = torch.Generator().manual_seed(0)

    def kept(count: int, share: float) -> torch.Tensor:
        return torch.randperm(count, generator=generator) < count * share

    stream = kept(HEADS * HEAD_DIM, 0.75)
    entries: dict[str, dict[str, torch.Tensor]] = {}
    for path, module in model.named_modules():
        end = path.rpartition(".")[2]
        if end == "mlp":
            hidden = kept(HIDDEN, 0.5)
            entries[f"{path}.gate_proj"] = entries[f"{path}.up_proj"] = rows(hidden, stream)
        elif end == "v_proj":
            entries[path] = rows(kept(KEY_HEADS, 0.5).repeat_interleave(HEAD_DIM), stream)
        elif width and end in ("o_proj", "down_proj"):
            entries[path] = rows(stream, torch.ones(module.in_features))
        elif width and end == "embed_tokens":
            entries[path] = {"weight": stream.expand(module.weight.shape)}
    return entries


def rows(keep: torch.Tensor, columns: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"weight": keep[:, None].expand(len(keep), len(columns))}


# -- one measurement -----------------------------------------------------------------------


def in_a_process(step: str, layers: int, folder: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--step", step, "--layers", str(layers), "--dir", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(step: str, layers: int, folder: Path) -> dict[str, float]:
    """Seconds, bytes read and written, and the largest resident memory in MB."""
    source, target = folder / "source", folder / "target"
    files = sorted(source.iterdir())
    imported, planning = peak_mb(), 0.0
    if step != "copy":
        began = time.perf_counter()
        model = empty_model(layers)
        words = torch.zeros(1, 8, dtype=torch.long, device="meta")
        # Without a cache, whose keys would be outputs; a mask as given, which no code looks at.
        mask = torch.ones(1, 1, 8, 8, dtype=torch.bool, device="meta")
        given = {"input_ids": words, "attention_mask": mask, "use_cache": False}
        speedup = ModelSpeedup(model, given, masks_for(model, step == "width"))
        left = speedup.report.parameters_after
        planning = time.perf_counter() - began
    planned = peak_mb()
    for file in files:
        drop_from_cache(file)
    began = time.perf_counter()
    if step == "copy":
        target.mkdir()
        for file in files:
            shutil.copyfile(file, target / file.name)
    else:
        shrink_checkpoint(source, target, speedup, max_shard_size="500MB")
    for file in target.iterdir():
        drop_from_cache(file)  # which writes it to the disk first
    seconds = time.perf_counter() - began
    written = sum(file.stat().st_size for file in target.iterdir())
    shutil.rmtree(target)
    return {
        "seconds": seconds,
        "read_mb": sum(file.stat().st_size for file in files) / 1e6,
        "written_mb": written / 1e6,
        "plan_s": planning,
        "peak_mb": peak_mb(),
        "imported_mb": imported,
        "planned_mb": planned,
        "parameters_left": left if step != "copy" else 0,
    }


def drop_from_cache(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak_mb() -> float:
    """The largest resident memory since the program began; needs Linux."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 / 1e6 if found else float("nan")


# -- the table -----------------------------------------------------------------------------


def table(found: dict[str, list[dict[str, float]]]) -> Iterator[str]:
    columns = ("seconds", "read MB", "written MB", "read + written MB/s", "plan s", "peak MB")
    yield f"| | {' | '.join(columns)} | libraries MB |"
    yield f"| --- |{' ---: |' * (len(columns) + 1)}"
    for step, runs in found.items():
        middle = {key: statistics.median(each[key] for each in runs) for key in runs[0]}
        seconds = [each["seconds"] for each in runs]
        moved = middle["read_mb"] + middle["written_mb"]
        yield (
            f"| {step} | {middle['seconds']:.1f} ({min(seconds):.1f}–{max(seconds):.1f}) "
            f"| {middle['read_mb']:,.0f} | {middle['written_mb']:,.0f} "
            f"| {moved / middle['seconds']:,.0f} | {middle['plan_s']:.1f} "
            f"| {middle['peak_mb']:,.0f} | {middle['imported_mb']:,.0f} |"
        )


def note(count: int, layers: int, runs: int) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        f"Median (min–max) of {runs} processes with one thread. {count:,} parameters in bfloat16, "
        f"{layers} layers, in shards of 500 MB that are in no cache before; seconds until all is "
        "on the disk, with the SHA-256 of all that is written. Plan: building on the meta device, "
        "masks and plan. Peak: resident memory of the process, with libraries, masks and the pages "
        f"of the files. {machine()}; compress {commit()}, {packages}; "
        f"{datetime.date.today().isoformat()}."
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dir", help="where there is room for twice the checkpoint")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
