"""What a job names, made and read: functions, the model with its weights, inputs, masks."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

import compress
from compress.cli.job import Inputs, Job, TensorSpec
from compress.cli.pruner_names import PRUNERS, parameters_of
from compress.errors import CompressError, ConfigError, closest
from compress.evaluator import Evaluator
from compress.masks import Masks


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Errors of the user's own code as an error of ours, which says where they come from."""
    try:
        yield
    except CompressError:
        raise
    except Exception as error:
        raise CompressError(
            f"{what}: it raised {type(error).__name__}: {error}; --debug shows where"
        ) from error


def resolve(where: str, reference: str) -> Any:
    """The object of ``module:name``; the current directory is searched first.

    Raises:
        ConfigError: there is no such module, or nothing of this name in it.
    """
    module_name, _, path = reference.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        with user_code(f"{where}: importing {module_name}"):
            found: Any = importlib.import_module(module_name)
    except CompressError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and f"{module_name}.".startswith(
            f"{cause.name}."
        ):
            raise ConfigError(
                f"{where}: got {reference!r}, and there is no module {cause.name!r} here; expected "
                f"module:function of an installed package, or of a file in {Path.cwd()}"
            ) from cause
        raise
    for name in path.split("."):
        if not hasattr(found, name):
            raise ConfigError(
                f"{where}: got {reference!r}, and {getattr(found, '__name__', found)} has no "
                f"{name!r}{closest(name, dir(found))}"
            )
        found = getattr(found, name)
    return found


def factory_of(job: Job) -> Callable[[], nn.Module]:
    """What builds the model, with its own weights; seeded, so that it is the same each time."""
    spec = job.model
    if spec is None:
        raise ConfigError(
            "model: it is missing; pass --model package.module:function, or give it in the file"
        )
    function = resolve("model", spec.factory)

    def build() -> nn.Module:
        torch.manual_seed(job.seed)
        with user_code(f"model: {spec.factory}"):
            model = function(*spec.args, **spec.kwargs)
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"model: {spec.factory} returned a {type(model).__name__}; expected a "
                "torch.nn.Module"
            )
        return model

    return build


def build_model(job: Job) -> nn.Module:
    """The model with its weights, on its device."""
    build = factory_of(job)
    if job.weights is not None and _is_checkpoint(job.weights):
        model = compress.load(build, job.weights)
    else:
        model = build()
        if job.weights is not None:
            _load_weights(model, job.weights)
    return model.to(_device(job))


def load_small(job: Job) -> nn.Module:
    """The small model of the job's file, which it has to have."""
    assert job.small is not None
    return compress.load(factory_of(job), job.small).to(_device(job))


def make_input(job: Job) -> Any:
    """An input: a tensor, a tuple of them, or a dict of keyword arguments.

    Raises:
        ConfigError: the job has none.
    """
    if job.dummy_input is None:
        raise ConfigError(
            "dummy_input: it is missing, and the model has to be run; pass --input 1,3,224,224, or "
            "give dummy_input in the file"
        )
    generator = torch.Generator().manual_seed(job.seed)
    return _tensors(job.dummy_input, generator, _device(job))


def make_evaluator(job: Job) -> Evaluator | None:
    """What the job's hook returns, if it has one."""
    if job.evaluator is None:
        return None
    function = resolve("evaluator", job.evaluator)
    with user_code(f"evaluator: {job.evaluator}"):
        evaluator = function()
    if not isinstance(evaluator, Evaluator):
        raise ConfigError(
            f"evaluator: {job.evaluator} returned a {type(evaluator).__name__}; expected a "
            "compress.Evaluator, such as Evaluator(loader, criterion, eval_fn=accuracy)"
        )
    return evaluator


def make_pruner(job: Job, model: nn.Module, evaluator: Evaluator | None) -> Any:
    """The pruner, with its arguments, and of input and evaluator what it can use."""
    if job.config_list is None:
        raise ConfigError("config_list: it is missing; give it in the file, or pass --sparsity 0.5")
    kind = PRUNERS[job.pruner.name]
    arguments = dict(job.pruner.arguments)
    hooks = job.pruner.hooks.items()
    arguments |= {name: resolve(f"pruner.hooks.{name}", reference) for name, reference in hooks}
    known = parameters_of(kind)
    if "dummy_input" in known and job.dummy_input is not None:
        arguments.setdefault("dummy_input", make_input(job))
    if "evaluator" in known and evaluator is not None:
        arguments.setdefault("evaluator", evaluator)
    with user_code(f"pruner: {job.pruner.name}"):
        return kind(model, [dict(entry) for entry in job.config_list], **arguments)


def read_masks(job: Job) -> Masks | None:
    """The masks of the job's file: ours, or NNI's, which are torch's files."""
    if job.masks is None:
        return None
    if Path(job.masks).suffix in (".pt", ".pth", ".bin"):
        from compress.compat.nni import load_masks

        return load_masks(job.masks)
    return Masks.load(job.masks)


def _device(job: Job) -> torch.device:
    try:
        device = torch.device(job.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device: got {job.device!r}, which cannot be used here "
            f"({str(error).splitlines()[0]}); expected one that torch has, such as cpu"
        ) from error
    return device


def _tensors(inputs: Inputs, generator: torch.Generator, device: torch.device) -> Any:
    if inputs.named:
        return {k: _tensor(spec, generator).to(device) for k, spec in inputs.named.items()}
    several = tuple(_tensor(spec, generator).to(device) for spec in inputs.positional)
    return several if len(several) > 1 else several[0]


def _tensor(spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if dtype.is_floating_point:
        return torch.randn(spec.shape, generator=generator).to(dtype)
    return torch.randint(0, spec.high, spec.shape, generator=generator).to(dtype)


def _is_checkpoint(path: str) -> bool:
    """Whether `compress.save` or `compress.shrink_checkpoint` wrote it."""
    if Path(path).is_dir():
        return True
    try:
        with safe_open(path, framework="pt") as file:
            return "compress.recipe" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _load_weights(model: nn.Module, path: str) -> None:
    """Fill the model from a plain file of weights, all of it or with an error."""
    state = read_tensors("weights", path)
    own = model.state_dict()
    problems = [f"{n}: it is not in the file{closest(n, state)}" for n in own if n not in state]
    problems += [f"{n}: the model has no such entry" for n in state if n not in own]
    problems += [
        f"{n}: got shape {tuple(state[n].shape)}; the model has {tuple(own[n].shape)}"
        for n in own
        if isinstance(state.get(n), torch.Tensor) and isinstance(own[n], torch.Tensor)
        and state[n].shape != own[n].shape
    ]  # fmt: skip
    if problems:
        more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise CompressError(
            "\n  ".join([f"weights: {path} is not of this model:", *problems[:5], *more])
        )
    with user_code(f"weights: {path}"):
        model.load_state_dict(state)


def read_tensors(what: str, path: str) -> dict[str, Any]:
    """The dict of a safetensors file, or of torch's with tensors only: nothing is executed.

    Raises:
        CompressError: there is no such file, or it has something else.
    """
    expected = "expected a safetensors file, or a state_dict written by torch.save"
    try:
        if Path(path).suffix == ".safetensors":
            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CompressError(f"{what}: there is no file {path}; {expected}") from error
    except Exception as error:
        # torch.load raises whatever its unpickler meets in a damaged file.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CompressError(f"{what}: {path} cannot be read ({reason}); {expected}") from error
    if not isinstance(content, dict):
        raise CompressError(f"{what}: {path} holds a {type(content).__name__}; {expected}")
    return content
