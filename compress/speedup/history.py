"""What has been done to a model, remembered on it: the structure of every plan, in order.

It is an attribute of plain lists, dicts, strings and numbers in the dict of a module, so that a
deepcopy has it, and a pickle of the model needs nothing of this package.
"""

from __future__ import annotations

from torch import nn

from compress.graph.walk import modules_of
from compress.speedup.encoding import PlanData, below, encode_plan, names_in, within
from compress.speedup.plan import Plan

_ATTRIBUTE = "_compress_plans"


def remember(model: nn.Module, plan: Plan) -> None:
    """Note that a plan has been carried out on a model."""
    remember_all(model, [encode_plan(plan)])


def remember_all(model: nn.Module, plans: list[PlanData]) -> None:
    """Note plans on the smallest module that has all that they change.

    So it is known of a network which was shrunk within a wrapper. Where something is known of parts
    of that module, it is the module's from now on: what came first is to be done first.
    """
    path = _common_module([name for plan in plans for name in names_in(plan)], model)
    owner = model.get_submodule(path)
    known = plans_of(owner) or []
    for _, module in modules_of(owner):
        vars(module).pop(_ATTRIBUTE, None)
    vars(owner)[_ATTRIBUTE] = [*known, *(within(plan, path) for plan in plans)]


def plans_of(model: nn.Module) -> list[PlanData] | None:
    """What has been done to a model and its parts, in order; None where nothing is known."""
    modules = modules_of(model)
    known = [(path, vars(m)[_ATTRIBUTE]) for path, m in modules if _ATTRIBUTE in vars(m)]
    if not known:
        return None
    return [below(plan, path) if path else plan for path, plans in known for plan in plans]


def _common_module(names: list[str], model: nn.Module) -> str:
    """The path of the smallest module that all parameters (or ``module.``) are in."""
    owners = [name.rpartition(".")[0].split(".") for name in names]
    shared = owners[0] if owners else []
    for owner in owners:
        length = 0
        while length < min(len(shared), len(owner)) and shared[length] == owner[length]:
            length += 1
        shared = shared[:length]
    # A tied parameter, or one of a module that has several names, may be told by another name.
    return ".".join(shared) if _is_alone(model, shared) else ""


def _is_alone(model: nn.Module, parts: list[str]) -> bool:
    """Whether no parameter of a module is anybody else's, so that its names are its own."""
    if not parts or parts == [""]:
        return False
    path = ".".join(parts)
    inside = {id(parameter) for parameter in model.get_submodule(path).parameters()}
    return not any(
        id(parameter) in inside and not name.startswith(f"{path}.")
        for name, parameter in model.named_parameters(remove_duplicate=False)
    )
