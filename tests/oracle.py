"""The oracle: the small model computes what the masked model computes.

`draw_masks` masks a model in every way that a user could. `check_exact` shrinks it and compares it
with the masked model, which is computed here without the engine: a copy whose parameters are
multiplied by the masks.

A `Choices` is where the randomness comes from: hypothesis (which shrinks what fails) or a seed.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from compress import ModelSpeedup

T = TypeVar("T")
MaskDict = dict[str, dict[str, Tensor]]


class Choices(Protocol):
    """Where decisions come from; the first option is the simplest."""

    def integer(self, low: int, high: int) -> int: ...

    def pick(self, options: Sequence[T]) -> T: ...


class SeededChoices:
    """Decisions from a seed: fast, for many thousands of examples."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        return self._random.randint(low, high)

    def pick(self, options: Sequence[T]) -> T:
        return options[self._random.randrange(len(options))]


class DrawnChoices:
    """Decisions from a hypothesis ``draw``: a failing example shrinks."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self._draw = draw

    def integer(self, low: int, high: int) -> int:
        return self._draw(st.integers(low, high))  # type: ignore[no-any-return]

    def pick(self, options: Sequence[T]) -> T:
        return options[self.integer(0, len(options) - 1)]


# -- masks ---------------------------------------------------------------------------------


def draw_masks(choices: Choices, model: nn.Module) -> MaskDict:
    """Masks of all kinds, several at once, each on some of the modules."""
    masks: MaskDict = {}
    modules = [(path, m) for path, m in model.named_modules() if _parameters(m)]
    style = choices.pick(["some", "some", "filters", "filters and norms", "layer", "nothing"])
    kinds = ["no", "filters", "filters and norms", "columns", "single", "layer", "one"]
    for index, (path, module) in enumerate(modules):
        kind = choices.pick(kinds) if style == "some" else style
        units = _units(module)
        keep = torch.tensor([bool(choices.integer(0, 1)) for _ in range(units)])
        for name, parameter in _parameters(module).items():
            mask = _draw_mask(choices, kind, module, parameter, keep)
            if not bool(mask.all()):
                masks.setdefault(path, {})[name] = mask
        if kind == "one" and path in masks:
            masks[path] = dict([choices.pick(list(masks[path].items()))])
        if kind == "filters and norms":
            for after, norm in modules[index + 1 : index + 2]:
                for name, parameter in _parameters(norm).items():
                    if parameter.shape == keep.shape:
                        masks.setdefault(after, {})[name] = keep.clone()
    return masks


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module._parameters.items() if p is not None}


def _axis(module: nn.Module) -> int:
    return int(isinstance(module, nn.modules.conv._ConvTransposeNd))


def _units(module: nn.Module) -> int:
    """How many filters (rows, entries) the module's first parameter has."""
    main = next(iter(_parameters(module).values()))
    return main.shape[_axis(module)] if main.dim() > _axis(module) else 1


def _draw_mask(
    choices: Choices, kind: str, module: nn.Module, parameter: Tensor, keep: Tensor
) -> Tensor:
    mask = torch.ones_like(parameter, dtype=torch.bool)
    axis = _axis(module)
    if kind in ("filters", "filters and norms", "one"):
        _clear(mask, axis if parameter.dim() > 1 else 0, keep)
    elif kind == "columns" and parameter.dim() > 1:
        columns = [bool(choices.integer(0, 1)) for _ in range(parameter.shape[1 - axis])]
        _clear(mask, 1 - axis, torch.tensor(columns))
    elif kind == "single":
        mask = torch.rand_like(parameter) > choices.pick([0.3, 0.6, 0.9])
    elif kind == "layer":
        mask = torch.zeros_like(mask)
    return mask


def _clear(mask: Tensor, axis: int, keep: Tensor) -> None:
    if mask.dim() == 0 and not bool(keep.all()):
        mask.fill_(False)
    elif mask.dim() > axis and mask.shape[axis] == len(keep):
        mask.movedim(axis, 0)[~keep] = False


# -- holding a speedup against it ----------------------------------------------------------


def masked_copy(model: nn.Module, masks: MaskDict) -> nn.Module:
    """What the small model must compute: a copy with the masks multiplied in."""
    reference = copy.deepcopy(model)
    for path, parameters in masks.items():
        module = reference.get_submodule(path)
        for name, mask in parameters.items():
            parameter = module._parameters[name]
            assert parameter is not None
            parameter.data.mul_(mask.to(parameter.dtype))
    return reference


def outputs(model: nn.Module, *args: Any, **kwargs: Any) -> list[Tensor]:
    """All tensors that the model gives, in a fixed order."""
    return flat_tensors(model(*args, **kwargs))


def flat_tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, (list, tuple)):
        return []
    return [t for member in value for t in flat_tensors(member)]


def tolerance_of(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 5e-2)


def assert_same_outputs(expected: list[Tensor], got: list[Tensor], tolerance: float) -> None:
    """Equal within ``tolerance`` of the largest output, shapes and non-finite places included."""
    assert [t.shape for t in expected] == [t.shape for t in got]
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
        a, b = a.detach().double(), b.detach().double()
        difference = (a - b)[a.isfinite()].abs()
        scale = float(a[a.isfinite()].abs().max()) if len(difference) else 0.0
        largest = float(difference.max()) if len(difference) else 0.0
        assert largest <= tolerance * max(scale, 1e-2), f"off by {largest:.2e} of {scale:.2e}"


@dataclass
class State:
    """What a speedup must not change: modes, random state, the caller's masks."""

    modes: list[bool]
    random: Tensor
    masks: MaskDict

    @staticmethod
    def of(model: nn.Module, masks: MaskDict) -> State:
        return State(
            [m.training for m in model.modules()],
            torch.get_rng_state(),
            {path: {n: m.clone() for n, m in each.items()} for path, each in masks.items()},
        )

    def assert_unchanged(self, model: nn.Module, masks: MaskDict) -> None:
        assert self.modes == [m.training for m in model.modules()]
        assert torch.equal(self.random, torch.get_rng_state())
        assert self.masks.keys() == masks.keys()
        for path, each in self.masks.items():
            assert each.keys() == masks[path].keys()
            assert all(torch.equal(mask, masks[path][name]) for name, mask in each.items())


def check_exact(
    model: nn.Module,
    x: Tensor,
    masks: MaskDict,
    *,
    tolerance: float | None = None,
    trains: bool = True,
    **options: Any,
) -> ModelSpeedup:
    """Shrink ``model`` in place and hold it against the masked copy; returns the speedup."""
    tolerance = tolerance_of(x.dtype) if tolerance is None else tolerance
    reference = masked_copy(model, masks).eval()
    before = {name: tuple(p.shape) for name, p in model.named_parameters()}
    state = State.of(model, masks)
    given = x.clone()
    speedup = ModelSpeedup(model, x, masks, **options)
    assert speedup.speedup_model() is model
    assert torch.equal(given, x)
    state.assert_unchanged(model, masks)
    assert_no_growth(before, model)
    assert_report_fits(speedup, before, model)
    assert_same_everywhere(reference, model, x, tolerance)
    if trains:
        assert_trains_alike(reference, model, x)
    return speedup


def assert_no_growth(before: dict[str, tuple[int, ...]], model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, nn.Parameter)
        if name not in before:
            assert name.rpartition(".")[2] == "bias"
            continue
        old, new = before[name], tuple(parameter.shape)
        assert all(n <= o for o, n in zip(old, new, strict=True)), (name, old, new)
        assert parameter.grad is None


def assert_report_fits(
    speedup: ModelSpeedup, before: dict[str, tuple[int, ...]], model: nn.Module
) -> None:
    report = speedup.report
    count = sum(torch.Size(shape).numel() for shape in before.values())
    assert report.parameters_before == count
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert "parameters" in str(report)
    for layer in report.layers:
        assert layer.removed <= layer.units
        assert all(reason for reason in layer.kept), layer
        assert sum(layer.kept.values()) + layer.removed >= layer.masked
    speedup.masks.validate(model)


def assert_same_everywhere(
    reference: nn.Module, small: nn.Module, x: Tensor, tolerance: float
) -> None:
    """Equal on other inputs of batch size 1, 3 and the first one's, in eval mode."""
    modes = [(m, m.training) for m in small.modules()]
    small.eval()
    shape = x.shape[1:]
    generator = torch.Generator().manual_seed(0)
    others = [torch.randn(n, *shape, generator=generator).to(x.dtype) for n in (1, 3)]
    with torch.no_grad():
        for batch in (x, *others):
            try:
                expected = outputs(reference, batch)
            except (RuntimeError, ValueError):
                assert batch is not x
                continue  # statistics of a single value, say
            assert_same_outputs(expected, outputs(small, batch), tolerance)
    for module, mode in modes:
        module.training = mode


def assert_trains_alike(reference: nn.Module, small: nn.Module, x: Tensor) -> None:
    """A forward and backward in train mode runs where the masked model's does."""
    if _trains(copy.deepcopy(reference), x) is None:
        return
    error = _trains(copy.deepcopy(small), x)
    assert error is not None


def _trains(model: nn.Module, x: Tensor) -> float | None:
    model.train()
    try:
        total = torch.stack([t.sum() for t in outputs(model, x)]).sum()
        if not total.requires_grad:
            return 0.0
        total.backward()
    except (RuntimeError, ValueError):
        return None
    return float(total.detach())


# -- models to hold it against -------------------------------------------------------------


def randomise(model: nn.Module) -> None:
    """Random parameters and statistics everywhere: torch's defaults, 0 and 1, hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            fan = max(parameter[0].numel() if parameter.dim() > 1 else 1, 1)
            parameter.copy_(torch.randn_like(parameter) * (1.5 / fan**0.5))
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
            elif buffer.is_floating_point():
                buffer.copy_(torch.randn_like(buffer))
