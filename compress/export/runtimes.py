"""The latency of one model in several runtimes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from compress.errors import ExportError
from compress.export.exported import compiled, plain_copy, to_exported
from compress.export.onnx_file import OnnxModel, to_onnx
from compress.export.parity import Runtime, parity, raise_unless_same
from compress.measure import Latency, Table, latencies

RUNTIMES = ("torch.export", "torch.compile", "onnxruntime")


@dataclass(frozen=True)
class RuntimeComparison:
    """Latencies by runtime, and each one's largest relative difference to eager mode.

    ``missing``: the runtimes without, and why. Prints as a table.
    """

    latencies: Mapping[str, Latency]
    differences: Mapping[str, float]
    missing: Mapping[str, str]

    @property
    def table(self) -> Table:
        """A row for each runtime that was timed."""
        eager = self.latencies["eager"]
        rows = tuple(
            (
                name,
                str(each),
                f"{eager.median_ms / each.median_ms:.2f}",
                f"{self.differences[name]:.0e}",
            )
            for name, each in self.latencies.items()
        )
        columns = ("", "latency ms (p10–p90)", "times faster", "difference")
        return Table(columns, rows, eager.conditions)

    def __str__(self) -> str:
        reasons = [f"{name}: {reason}" for name, reason in self.missing.items()]
        return "\n".join([str(self.table), *reasons])


def compare_runtimes(
    model: nn.Module,
    dummy_input: Any,
    *,
    runtimes: Sequence[str] = RUNTIMES,
    others: Mapping[str, nn.Module] | None = None,
    warmup: int = 10,
    repeats: int = 50,
) -> RuntimeComparison:
    """Time a plain copy of a model in eager mode, in the ``runtimes`` and in ``others``.

    Passes are taken in turn (see `compress.measure.latencies`), on the device of the model but for
    onnxruntime, which runs on the CPU. A runtime that is not installed, does not take the model, or
    computes something else is in ``missing``. Each takes the one batch size of ``dummy_input``.
    ``others`` are called as the model is, such as the `OnnxModel` of an int8 file; how far off they
    are is only told.

    Errors: ``TraceError`` where the model does not run on ``dummy_input``; ``ExportError`` for a
    runtime that there is not.
    """
    if isinstance(runtimes, str):
        raise ExportError(f"runtimes: got the text {runtimes!r}; expected a list of names")
    if unknown := set(runtimes) - set(RUNTIMES):
        raise ExportError(f"runtimes has {sorted(unknown)}; expected some of {list(RUNTIMES)}")
    plain = plain_copy(model)
    parity(plain, plain, dummy_input)  # it runs: what fails from here on is a runtime's
    models, differences = {"eager": plain}, {"eager": 0.0}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        makers = _makers(plain, dummy_input, Path(folder))
        for name in runtimes:
            try:
                runtime = makers[name]()
                found = parity(runtime, plain, dummy_input)
                raise_unless_same(found, plain, name)
            except Exception as error:  # of any compiler or exporter: told, and the others go on
                missing[name] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
                continue
            models[name], differences[name] = runtime, found.relative_error
        for name, other in (others or {}).items():
            models[name] = other
            differences[name] = parity(other, plain, dummy_input).relative_error
        times = latencies(models, dummy_input, warmup=warmup, repeats=repeats)
    return RuntimeComparison(times, differences, missing)


def _makers(plain: nn.Module, dummy_input: Any, folder: Path) -> dict[str, Callable[[], nn.Module]]:
    """How to make each runtime besides eager mode; compared by the caller."""

    def exported() -> nn.Module:
        program = to_exported(plain, dummy_input, dynamic_batch=False, check=False)
        return Runtime(program.module().__call__)

    def onnx() -> nn.Module:
        path = folder / "model.onnx"
        to_onnx(plain, dummy_input, path, dynamic_batch=False, check=False)
        return OnnxModel(path)

    return {
        "torch.export": exported,
        "torch.compile": lambda: compiled(plain),
        "onnxruntime": onnx,
    }
