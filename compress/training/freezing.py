"""Freezing all of a model but what a speedup has changed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType

from torch import Tensor, nn

from compress.errors import ConfigError, closest
from compress.speedup.plan import Plan


@dataclass
class FrozenParts:
    """Parameters that train no more until `restore`; also a context manager that restores them.

    Attributes:
        trainable: names of the parameters that go on training.
    """

    trainable: tuple[str, ...]
    _frozen: list[nn.Parameter] = field(repr=False)

    def restore(self) -> None:
        """Let them train again. A second call does nothing."""
        while self._frozen:
            self._frozen.pop().requires_grad_(True)

    def __enter__(self) -> FrozenParts:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()


def unfreeze_around(model: nn.Module, plan: Plan, classifier: str | None = None) -> FrozenParts:
    """Freeze everything but what a plan changed, the norms that follow it, and the classifier.

    What was frozen before stays frozen, in these parts, too. Frozen parameters lose their
    gradients, so that an optimizer leaves them alone. Batch norms go on counting their statistics
    in train mode.

    Args:
        model: the small model, or the one that the plan was made for.
        plan: ``speedup.plan``.
        classifier: module path; the last layer with a weight of two axes or more if left out.

    Raises:
        ConfigError: the plan changes nothing, or is of another model, or there is no such module.
    """
    if not isinstance(plan, Plan):
        raise ConfigError(f"plan: got {type(plan).__name__}; expected speedup.plan")
    changed = _changed_modules(model, plan)
    layers = _in_order(model)
    last = [path for path, module in layers if _has_matrix(module)][-1:]
    kept = changed | _following_norms(layers, changed)
    trainable = within(model, last if classifier is None else [classifier])
    for path, module in layers:
        if path in kept:
            trainable |= {id(parameter) for parameter in module.parameters(recurse=False)}
            parts = getattr(module, "parametrizations", None)
            trainable |= {id(p) for p in parts.parameters()} if parts is not None else set()
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in trainable]
    names = tuple(n for n, p in model.named_parameters() if p.requires_grad and id(p) in trainable)
    for parameter in frozen:
        parameter.requires_grad_(False)
        parameter.grad = None
    return FrozenParts(names, frozen)


# -- what it uses -------------------------------------------------------------------------


def within(model: nn.Module, paths: Iterable[str]) -> set[int]:
    """The ids of all parameters in these modules."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: set[int] = set()
    for path in [paths] if isinstance(paths, str) else paths:
        if path not in modules:
            raise ConfigError(
                f"{path!r}: the model has no module of this name{closest(path, modules)}"
            )
        found |= {id(parameter) for parameter in modules[path].parameters()}
    return found


def _changed_modules(model: nn.Module, plan: Plan) -> set[str]:
    paths = {*plan.slices, *plan.biases, *plan.carries, *plan.scales, *plan.new_biases}
    owners = {path.rpartition(".")[0].partition(".parametrizations")[0] for path in paths}
    owners |= {replacement.module for replacement in plan.replacements}
    modules = dict(model.named_modules(remove_duplicate=False))
    missing = sorted(owners - modules.keys())
    if missing:
        raise ConfigError(
            f"plan: it changes {missing[0]!r}, which this {type(model).__name__} does not have"
            f"{closest(missing[0], modules)}; pass the model that it was made for"
        )
    if not owners:
        raise ConfigError(
            "plan: it changes no layer, so there is nothing to train around; look at the report "
            "for what the masks could not remove"
        )
    first = {id(module): path for path, module in model.named_modules()}
    return {first[id(modules[path])] for path in owners}


def _in_order(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that hold parameters of their own, in the order of the model."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if "parametrizations" not in path.split(".")
        and (any(True for _ in module.parameters(recurse=False)) or _is_parametrised(module))
    ]


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() > 1


def _is_parametrised(module: nn.Module) -> bool:
    return hasattr(module, "parametrizations")


def _following_norms(layers: list[tuple[str, nn.Module]], changed: set[str]) -> set[str]:
    """The norms that are registered after a changed layer, before the next layer."""
    found: set[str] = set()
    after = False
    for path, module in layers:
        if "Norm" in type(module).__name__:
            found |= {path} if after else set()
        elif _has_matrix(module):
            after = path in changed
    return found
