"""Shrink every model of the zoo, each in a process of its own, and see whether it stays the same.

    python benchmarks/zoo.py                     # all (an hour or more on one core)
    python benchmarks/zoo.py --group timm
    python benchmarks/zoo.py --only resnet18 hf/bert --json /tmp/out.json
    python benchmarks/zoo.py --jobs 2            # two models at a time

For each model: random weights, BatchNorm statistics, biases and scales (defaults hide mistakes);
masks on half of the filters of every Conv and Linear layer but those that make the outputs; then
``ModelSpeedup``. The reference is independent of it: a copy whose parameters are multiplied by the
masks, run on another input with another batch size.

The columns:

- ended: speedup ended without an error
- error: max |small - reference| / max |reference|, the worst output; in float32, and in float64
  where that is more than 1e-5, beside what a change of the last bit of every weight does
- left: parameters after / before, with masks drawn layer by layer (``mode="normal"``). Embeddings
  are no layers here, as no entry names them, so that language models keep their width
- s: CPU seconds of ``ModelSpeedup`` without its check, one thread; forward: those of one forward
- train: forward and backward in train mode run after
- coupled: the same with ``mode="dependency_aware"``: parameters left, megabytes above the loaded
  model at the peak, and which share of the masked units is gone
- Torch-Pruning: its CPU seconds for the same model, ratio and excluded layers (constructor and
  step), and how many times those of the coupled speedup they are; or why it has no result: an
  error, more than PEER_LIMIT seconds, or a model that does not run after
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from speedup_time import metered
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from zoo_models import Entry, Inputs, zoo
from zoo_table import EXACT, Record, brief, keep, markdown

RESULTS = Path(__file__).parent / "results"
LAYERS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear),
)
NORMS = nn.modules.batchnorm._BatchNorm

PEER_LIMIT = 30.0  # wall seconds for Torch-Pruning
REASONS = 12  # why masked units stayed: so many of the most frequent are kept for each model


# -- the model -----------------------------------------------------------------------------


def randomise(entry: Entry) -> None:
    """Give every parameter and every statistic values that a trained model could have."""
    with torch.no_grad():
        for name, parameter in entry.model.named_parameters():
            if parameter.is_floating_point():
                parameter.copy_(drawn(name, parameter))
        calibrate(entry)
        for module in entry.model.modules():
            mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
            if isinstance(mean, Tensor) and isinstance(var, Tensor):
                mean += 0.3 * torch.randn_like(mean) * var.sqrt()
                var *= torch.empty_like(var).uniform_(0.7, 1.4)
                for name, buffer in module.named_buffers(recurse=False):  # a frozen norm
                    if name in ("weight", "bias"):
                        buffer.copy_(drawn(name, buffer))


def drawn(name: str, parameter: Tensor) -> Tensor:
    constant = parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all())
    vector = parameter.numel() == max(parameter.shape, default=1)
    if name.endswith("bias") and vector:
        return 0.3 * torch.randn_like(parameter)
    if vector and (constant or parameter.numel() == 1):  # scales of norms, LayerScale
        return torch.empty_like(parameter).uniform_(0.5, 1.5)
    if vector:
        return parameter + 0.1 * torch.randn_like(parameter)
    usual = float((parameter.numel() / parameter.shape[0]) ** -0.5)
    if constant:  # starts at zero, so that a branch does
        return usual * torch.randn_like(parameter)
    std = float(parameter.std())
    return parameter * (usual / std) if std < 0.5 * usual else parameter


def calibrate(entry: Entry) -> None:
    """BatchNorm statistics of one batch, so that the values neither vanish nor explode."""
    norms = [m for m in entry.model.modules() if isinstance(m, NORMS) and m.track_running_stats]
    momenta = [m.momentum for m in norms]
    entry.model.eval()
    for module in norms:
        module.momentum = 1.0
        module.train()
    try:
        call(entry.model, entry.inputs(2))
    except ValueError:  # one value per channel: the random statistics do
        pass
    finally:
        for module, momentum in zip(norms, momenta, strict=True):
            module.momentum = momentum
    entry.model.eval()


def outputs_last(entry: Entry) -> set[str]:
    """Paths of the layers that make the outputs: those named, and the last that runs."""
    paths = {id(m): path for path, m in entry.model.named_modules() if isinstance(m, LAYERS)}
    ran: list[str] = []
    handles = [
        m.register_forward_hook(lambda m, *_: ran.append(paths[id(m)]))
        for m in entry.model.modules()
        if id(m) in paths
    ]
    with torch.no_grad():
        call(entry.model, entry.inputs(1))
    for handle in handles:
        handle.remove()
    named = {p for p in paths.values() if entry.heads and re.search(entry.heads, p)}
    return named | set(ran[-1:])


def computed(model: nn.Module) -> set[str]:
    """Paths of layers whose weight is computed (weight norm), which the pruners refuse."""
    return {path for path, m in model.named_modules() if is_parametrized(m)}


def call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            yield from tensors_in(getattr(value, each.name))


def doubled(value: Any) -> Any:
    """Inputs in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: doubled(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(doubled(item) for item in value)
    return value


def seeded(make: Inputs, batch: int, seed: int) -> Any:
    torch.manual_seed(seed)
    return make(batch)


# -- one model -----------------------------------------------------------------------------


def evaluate(model: nn.Module, inputs: Any) -> list[Tensor]:
    model.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        return [t.detach().clone() for t in tensors_in(call(model, inputs))]


def masked_copy(model: nn.Module, masks: Any) -> nn.Module:
    """The reference: the masks multiplied into the parameters, without the library."""
    reference = copy.deepcopy(model)
    for path, entries in masks.items():
        for name, mask in entries.items():
            getattr(reference.get_submodule(path), name).data.mul_(mask)
    return reference


def relative_error(expected: list[Tensor], got: list[Tensor]) -> float | str:
    """The worst output's; a string where they cannot be compared."""
    if [t.shape for t in expected] != [t.shape for t in got]:
        return f"shapes {[tuple(t.shape) for t in expected]} -> {[tuple(t.shape) for t in got]}"
    worst = 0.0
    for left, right in zip(expected, got, strict=True):
        a, b = left.double(), right.double()
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            return "not finite"
        if not bool(finite.all()):
            a, b = a[finite], b[finite]
        if a.numel():
            scale = float(a.abs().max()) or 1.0
            worst = max(worst, float((a - b).abs().max()) / scale)
    return worst


def blind(reference: nn.Module, make: Inputs) -> str | None:
    """Why the comparison says nothing: outputs that are not finite or do not feel the input."""
    first, second = (evaluate(reference, seeded(make, 1, seed)) for seed in (5, 6))
    floats = [t for t in first if t.is_floating_point()]
    if not all(bool(t.isfinite().all()) for t in floats):
        return "not finite"
    same = relative_error(first, second)
    return "the output does not feel the input" if isinstance(same, float) and same < 1e-6 else None


def units(report: Any) -> tuple[int, int, int]:
    """Masked units, removed ones, and those masked that are gone."""
    masked = sum(layer.masked for layer in report.layers)
    removed = sum(layer.removed for layer in report.layers)
    kept = sum(sum(layer.kept.values()) for layer in report.layers)
    return masked, removed, masked - kept


def why_kept(report: Any) -> dict[str, int]:
    reasons: Counter[str] = Counter()
    for layer in report.layers:
        reasons.update(layer.kept)
    return dict(reasons.most_common(REASONS))


class Run:
    """All measurements of one model; the record is printed after each, for what comes after."""

    def __init__(self, name: str, entry: Entry) -> None:
        self.name, self.entry, self.record = name, entry, Record()

    def note(self, **values: Any) -> None:
        self.record |= values
        print(json.dumps(self.record), flush=True)

    def all(self) -> None:
        self.prepare()
        self.shrink("normal")
        self.shrink("dependency_aware")
        self.note(stage="Torch-Pruning", peer=self.peer())
        self.note(stage="done")

    def prepare(self) -> None:
        self.note(stage="prepare")
        torch.manual_seed(0)
        randomise(self.entry)
        model = self.entry.model
        self.heads = outputs_last(self.entry) | computed(model)
        self.dummy = seeded(self.entry.inputs, 1, 1)
        self.other = seeded(self.entry.inputs, 2, 2)
        start = time.process_time()
        evaluate(model, self.dummy)
        forward = time.process_time() - start
        self.note(
            parameters=count(model), forward_s=forward, excluded=sorted(self.heads),
            trains_before=self.train(copy.deepcopy(model)),
        )  # fmt: skip

    def shrink(self, mode: str) -> None:
        from compress import L1FilterPruner, ModelSpeedup

        self.note(stage=f"{mode}: masks", **{mode: {}})
        found: Record = {}
        model = copy.deepcopy(self.entry.model)
        config = [
            {"sparsity_per_layer": 0.5, "op_types": ["default"]},
            {"exclude": True, "op_names": sorted(self.heads)},
        ]
        options: Record = {"mode": mode}
        if mode != "normal":
            options["dummy_input"] = self.dummy
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            start = time.process_time()
            pruner = L1FilterPruner(model, config, **options)
            masks = pruner.calc_masks()
            found["masks_s"] = time.process_time() - start
        untouched = [str(w.message) for w in heard if "masks nothing" in str(w.message)]
        found |= {"untouched": len(untouched), "untouched_first": untouched[:3]}
        reference = masked_copy(model, masks)
        self.note(stage=f"{mode}: speedup", **{mode: found})
        twin = copy.deepcopy(model)
        speedup = ModelSpeedup(twin, self.dummy, masks, verify=False)
        _, cost = metered(speedup.speedup_model)
        found |= {"s": cost["cpu_s"], "peak_mb": cost["peak_mb"]}
        del twin, speedup
        self.note(stage=f"{mode}: checked speedup", **{mode: found})
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            speedup = self.checked(model, masks, found)
        small = speedup.model
        found["warnings"] = sorted({f"{w.category.__name__}: {w.message}"[:200] for w in heard})
        found |= {"left": count(small) / self.record["parameters"]}
        found["units"] = units(speedup.report)
        found["kept"] = why_kept(speedup.report)
        self.note(stage=f"{mode}: compare", **{mode: found})
        found["blind"] = blind(reference, self.entry.inputs)
        found["error"] = self.compare(reference, small)
        self.note(stage=f"{mode}: compare in float64", **{mode: found})
        if not isinstance(found["error"], float) or found["error"] > EXACT[torch.float32]:
            found["rounding"] = self.rounding(reference)
            found["error64"] = self.in_float64(masks)
        self.note(stage=f"{mode}: train", **{mode: found})
        found["trains"] = self.train(small)
        self.note(**{mode: found})

    def peer(self) -> Record:
        """Torch-Pruning on the same model: CPU seconds, parameters left, or why there are none."""
        import torch_pruning

        model = copy.deepcopy(self.entry.model)
        ignored = [model.get_submodule(path) for path in self.heads]

        def cut() -> None:
            torch_pruning.pruner.BasePruner(
                model,
                self.dummy,
                importance=torch_pruning.importance.GroupMagnitudeImportance(p=1),
                pruning_ratio=0.5,
                ignored_layers=ignored,
            ).step()

        try:
            with time_limit(PEER_LIMIT):
                _, cost = metered(cut)
        except TooLong:
            return {"failed": f"not done in {PEER_LIMIT:.0f} s"}
        except Exception as error:
            return {"failed": line_of(error)}
        found: Record = {"s": cost["cpu_s"], "peak_mb": cost["peak_mb"]}
        if count(model) == self.record["parameters"]:
            return found | {"failed": "prunes nothing"}
        try:
            evaluate(model, self.other)
        except Exception as error:
            found["failed"] = f"does not run after: {line_of(error)}"
        return found | {"left": count(model) / self.record["parameters"]}

    def checked(self, model: nn.Module, masks: Any, found: Record) -> Any:
        """The speedup with its check; without it where the check fails, so that we see more."""
        from compress import ModelSpeedup
        from compress.errors import VerificationError

        try:
            speedup = ModelSpeedup(model, self.dummy, masks)
            speedup.speedup_model()
        except VerificationError as error:
            found["refused"] = line_of(error)
            speedup = ModelSpeedup(model, self.dummy, masks, verify=False)
            speedup.speedup_model()
        return speedup

    def compare(
        self, reference: nn.Module, small: nn.Module, cast: Callable[[Any], Any] = lambda x: x
    ) -> float | str:
        inputs = cast(self.other)
        try:
            expected = evaluate(reference, inputs)
        except Exception as error:
            return f"the reference does not run: {line_of(error)}"
        try:
            return relative_error(expected, evaluate(small, inputs))
        except Exception as error:
            return f"does not run: {line_of(error)}"

    def in_float64(self, masks: Any) -> float | str:
        """The error where all of it, the speedup too, is in float64."""
        from compress import ModelSpeedup

        model = copy.deepcopy(self.entry.model).double()
        reference = masked_copy(model, masks)
        try:
            ModelSpeedup(model, doubled(self.dummy), masks, verify=False).speedup_model()
        except Exception as error:
            return line_of(error)
        return self.compare(reference, model, doubled)

    def rounding(self, reference: nn.Module) -> float | str:
        """How far the reference moves when its weights move by the last bit."""
        moved = copy.deepcopy(reference)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in moved.parameters():
                if parameter.is_floating_point():
                    parameter.mul_(1 + 6e-8 * torch.randn_like(parameter).sign())
        return self.compare(reference, moved)

    def train(self, model: nn.Module) -> bool | str:
        """Whether forward and backward run in train mode."""
        model.train()
        inputs = seeded(self.entry.train_inputs or self.entry.inputs, 2, 3)
        try:
            outputs = list(tensors_in(call(model, inputs)))
            total = sum((t.sum() for t in outputs if t.requires_grad), torch.zeros(()))
            torch.autograd.backward(total)
            return True
        except Exception as error:
            return line_of(error)


class TooLong(BaseException):
    """Not an Exception, so that nobody takes it for one of their own."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TooLong in the body after so many wall seconds."""

    def ring(number: int, frame: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def line_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def warm_up() -> None:
    """Imports and first calls, so that no model pays for them."""
    from compress import L1FilterPruner, ModelSpeedup

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)).eval()
    x = torch.randn(1, 3, 8, 8)
    masks = L1FilterPruner(model, [{"sparsity": 0.5, "op_names": ["0"]}]).calc_masks()
    ModelSpeedup(model, x, masks).speedup_model()


def child(name: str, limit_s: float) -> None:
    faulthandler.dump_traceback_later(limit_s - 3, exit=True)
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)
    warm_up()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = Run(name, zoo().builders[name]())
        try:
            run.all()
        except Exception as error:
            frames = traceback.format_exc().splitlines()
            run.note(failed=line_of(error), traceback=frames[-30:])


# -- all models ----------------------------------------------------------------------------


def measure(name: str, limit_s: float, limit_mb: float) -> Record:
    """The record of one process, with ``failed`` where it did not come to its end."""
    command = [sys.executable, __file__, "--child", name, "--limit", str(limit_s)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    peak, why = 0.0, None
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=err, text=True)
        end = time.monotonic() + limit_s
        while process.poll() is None and why is None:
            time.sleep(0.1)
            peak = max(peak, resident_mb(process.pid))
            if peak > limit_mb:
                why = f"more than {limit_mb:.0f} MB"
            elif time.monotonic() > end:
                why = f"not done in {limit_s:.0f} s"
        if process.poll() is None:
            process.kill()
        process.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    record = last_record(texts[0]) | {"peak_mb": peak, "commit": commit()}
    if record.get("stage") != "done" and "failed" not in record:
        lines = texts[1].strip().splitlines()
        if why is None and "Timeout (" in texts[1]:
            why = f"not done in {limit_s:.0f} s"
        record["failed"] = why or (lines or [f"ended with {process.returncode}"])[-1]
        record["traceback"] = lines[-60:]
    return record


def commit() -> str:
    """Which version of the library ran, "-dirty" when it had changes."""
    spec = importlib.util.find_spec("compress")
    assert spec is not None
    place = Path(str(spec.origin)).parent
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    found = subprocess.run(command, cwd=place, capture_output=True, text=True)
    return found.stdout.strip() or place.parent.name


def last_record(text: str) -> Record:
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            record: Record = json.loads(line)
            return record
    return {"stage": "build"}


def resident_mb(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"VmRSS:\s+(\d+)", status)
    return int(found[1]) / 1024 if found else 0.0


# -- the command --------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models")
    parser.add_argument("--group", choices=tuple(dict.fromkeys(zoo().groups.values())))
    parser.add_argument("--json", type=Path, default=RESULTS / "zoo.json", help="raw results")
    parser.add_argument("--limit", type=float, default=120, help="seconds for one model")
    parser.add_argument("--memory", type=float, default=9000, help="MB for one model")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--list", action="store_true", help="print the names of the models")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def chosen(args: argparse.Namespace) -> list[str]:
    models = zoo()
    if args.only:
        unknown = sorted(set(args.only) - set(models.builders))
        if unknown:
            sys.exit(f"no such model: {', '.join(unknown)}; --list prints them")
        return list(args.only)
    names = [n for n in models.builders if n not in models.heavy]
    return [n for n in names if args.group in (None, models.groups[n])]


def main() -> None:
    args = arguments()
    if args.child:
        child(args.child, args.limit)
        return
    names, groups = chosen(args), zoo().groups
    if args.list:
        print("\n".join(names))
        return
    records: dict[str, Record] = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        found = pool.map(lambda name: measure(name, args.limit, args.memory), names)
        for name, record in zip(names, found, strict=True):
            records[name] = record
            print(brief(name, record), flush=True)
            keep(records, groups, args.json)
    print("\n" + markdown(records, groups))


if __name__ == "__main__":
    main()
