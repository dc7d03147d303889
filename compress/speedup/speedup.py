"""``ModelSpeedup``: make a masked model physically small."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.nn.parameter import UninitializedParameter

from compress.errors import SpeedupError
from compress.graph.channels import ChannelGraph
from compress.graph.run import leaves_of
from compress.masks import Masks, suspend_masks
from compress.speedup.decide import Decision, Limits
from compress.speedup.follow import Follower
from compress.speedup.knowledge import Knowledge
from compress.speedup.plan import Plan, PlanBuilder
from compress.speedup.replay import needs_replay, replay
from compress.speedup.report import Report, make_report, parameter_counts
from compress.speedup.surgery import apply_plan, slice_optimizer
from compress.speedup.verify import Verifier

T = TypeVar("T")
MOST_TRIES = 100  # real models take a few; one that changes at every run must not go on for ever
MaskSource = Masks | Mapping[str, Mapping[str, torch.Tensor]] | str | os.PathLike[str]


@dataclass
class _Cut:
    """A cut that has been made, and how to undo it; ``replayed``: the code was seen to follow."""

    undo: Callable[[], None]
    decision: Decision
    plan: Plan
    replayed: bool


class ModelSpeedup:
    """Shrink a model to what its masks leave, so that it computes the same.

    Args:
        model: the masked or the plain model. ``speedup_model`` shrinks it in place.
        dummy_input: what the model takes: a tensor, a tuple of arguments or a dict of keyword
            arguments, on the model's device. Any batch size; only shapes matter.
        masks_or_file: ``Masks``, a nested dict ``{module: {parameter: 0/1 tensor}}``, or the path
            of a file that ``Masks.save`` wrote. Masks already on the model count as well.
        map_location: the device to load a mask file to, as in ``torch.load``.
        optimizer: one that trains the model: its state (momentum, Adam's averages) shrinks along,
            so that training goes on. Biases that are new are not among its parameters.
        verify: run the masked and the small model on ``dummy_input`` and compare (two forwards).
        constants: what to do with a removed channel that is a constant other than 0 (BatchNorm's
            shift, say). ``"exact"`` moves it into the next bias, or lets one channel stay to carry
            it where zero padding makes that inexact. ``"fold"`` moves it into the bias even so;
            ``"drop"`` drops it, as other tools do. The report says how far off the last two are.
        round_to: keep a multiple of so many channels in each layer.
        min_channels: keep at least so many channels in each layer.

    After ``speedup_model``: ``report`` (what was removed, what stayed and why), ``plan`` (what was
    done to which parameter), ``masks`` (the masks of what is left, to go on training with).

    Errors: ``MaskError`` for masks that do not fit the model, ``TraceError`` where the model does
    not run on ``dummy_input``, ``VerificationError`` where the small model would differ. In each
    case the model is as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        dummy_input: Any,
        masks_or_file: MaskSource,
        map_location: Any = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        verify: bool = True,
        constants: str = "exact",
        round_to: int = 1,
        min_channels: int = 1,
    ) -> None:
        _check_model(model)
        _check_options(constants, round_to, min_channels)
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            raise SpeedupError(
                f"optimizer is a {type(optimizer).__name__}; pass a torch.optim.Optimizer"
            )
        self.model = model
        self.dummy_input = dummy_input
        self.optimizer = optimizer
        self.verify = verify
        self.constants = constants
        self.limits = Limits(round_to, min_channels)
        self._given = Masks.coerce(masks_or_file, map_location)
        self._given.validate(model)
        self._plan: Plan | None = None
        self._report: Report | None = None
        self._make_report: Callable[[], Report] | None = None  # reasons take longer than the cut
        self._masks: Masks | None = None
        self._masks_before = Masks()

    @property
    def report(self) -> Report:
        """What was removed and what stayed, layer by layer."""
        if self._report is None and self._make_report is not None:
            self._report, self._make_report = self._make_report(), None
        return _done(self._report, "report")

    @property
    def plan(self) -> Plan:
        """What was done to which parameter."""
        return _done(self._plan, "plan")

    @property
    def masks(self) -> Masks:
        """The masks of what is left, shaped like the small model's parameters."""
        if self._masks is None:
            plan = _done(self._plan, "masks")
            self._masks = _remaining(self._masks_before, plan, self.model)
        return self._masks

    def speedup_model(self) -> nn.Module:
        """Shrink the model in place and return it."""
        if self._plan is not None:
            raise SpeedupError("this model has been sped up; make a new ModelSpeedup to go on")
        suspended = suspend_masks(self.model)
        try:
            # The new parameters must be ordinary tensors, wherever the caller is.
            with _collector_paused(), torch.inference_mode(False):
                applied = suspended.masks
                self._shrink(applied & self._given if applied else self._given)
        except BaseException:
            suspended.restore()
            raise
        return self.model

    # -- the road --------------------------------------------------------------------------

    def _shrink(self, masks: Masks) -> None:
        graph = ChannelGraph(self.model, self.dummy_input)
        flat = self._by_leaf(masks)
        before = {path: tuple(t.shape) for path, t, _ in leaves_of(self.model)}
        verifier = Verifier(self.model, self.dummy_input, flat) if self.verify else None
        knowledge = Knowledge(graph, flat, self.constants)
        cut = self._cut(graph, knowledge, False)
        try:
            error = None
            if verifier is not None:
                error, problem = verifier.compare()
                if problem and not cut.replayed:
                    # Something in the code counts, though nothing showed it: look at every call.
                    cut.undo()
                    cut = self._cut(graph, knowledge, True)
                    error, problem = verifier.compare()
                if problem and (self.constants == "exact" or error == float("inf")):
                    cut.undo, error = verifier.accept_or_raise(cut.undo, cut.plan, error, problem)
            counts = parameter_counts(self.model, before)
            if self.optimizer is not None:
                slice_optimizer(self.optimizer, self.model, cut.plan, before)
            self._make_report = partial(make_report, cut.decision, cut.plan, flat, counts, error)
            self._plan, self._masks_before = cut.plan, masks
        except BaseException:
            cut.undo()
            raise

    def _by_leaf(self, masks: Masks) -> dict[str, torch.Tensor]:
        """Masks by the first path of their parameter: a tied one has several names."""
        first = {id(tensor): path for path, tensor, _ in leaves_of(self.model)}
        every = dict(self.model.named_parameters(remove_duplicate=False))
        result: dict[str, torch.Tensor] = {}
        for name, mask in masks.flat().items():
            path = first[id(every[name])]
            mask = mask.to(every[name].device)
            result[path] = mask & result[path] if path in result else mask
        return result

    def _cut(self, graph: ChannelGraph, knowledge: Knowledge, always_replay: bool) -> _Cut:
        """Decide, plan and cut; where the model's own code cannot follow, pin and begin again."""
        follower = Follower(graph)
        tries = 0
        while True:
            tries += 1
            if tries == MOST_TRIES:
                graph.pin_everything(f"does not follow its sizes in {MOST_TRIES} tries")
            decision = Decision(knowledge, self.limits)
            builder = PlanBuilder(decision)
            if builder.unset:
                follower.pin_unset(builder.unset)
                continue
            attributes = follower.attributes(decision)
            builder.add_attributes(attributes)
            undo = apply_plan(self.model, builder.plan, knowledge.masks)
            try:
                # A cut of nothing has nothing to follow (and some forwards differ at every run).
                replays = bool(builder.plan.slices) and (
                    always_replay or bool(attributes) or needs_replay(decision)
                )
                mismatch = replay(self.model, self.dummy_input, decision) if replays else None
            except BaseException:
                undo()
                raise
            if mismatch is None:
                return _Cut(undo, decision, builder.plan, replays)
            undo()
            follower.answer(decision, mismatch)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """No full garbage collections over all of torch while thousands of nodes are made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _without_moved(mask: torch.Tensor, plan: Plan, path: str) -> torch.Tensor:
    """A mask without the places that a constant was moved to: they belong to the function now."""
    mask = mask.clone()
    if path in plan.biases:
        mask |= torch.from_numpy(plan.biases[path] != 0).to(mask.device)
    for carry in plan.carries.get(path, ()):
        mask.select(carry.axis, carry.target).fill_(True)
    return mask


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise SpeedupError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
    for wrapper in ("_orig_mod", "module"):
        inner = getattr(model, wrapper, None)
        torchs_own = type(model).__module__.startswith("torch.")
        if isinstance(inner, nn.Module) and torchs_own and not isinstance(model, fx.GraphModule):
            raise SpeedupError(
                f"model is a {type(model).__name__} around your model; pass model.{wrapper}, and "
                "wrap the small one again"
            )
    for path, module in model.named_modules():
        if ".quantized" in type(module).__module__ and type(module).__module__.startswith("torch."):
            raise SpeedupError(
                f"{path}: is quantised ({type(module).__name__}), its weights are no parameters; "
                "speed the model up before it is quantised"
            )
    for path, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter) or parameter.is_meta:
            raise SpeedupError(
                f"{path}: the parameter has no values yet (lazy, or on the meta device); run the "
                "model once, or load it to a device, and try again"
            )


def _check_options(constants: str, round_to: int, min_channels: int) -> None:
    if constants not in ("exact", "fold", "drop"):
        raise SpeedupError(f'constants is {constants!r}; pass "exact", "fold" or "drop"')
    for name, value in (("round_to", round_to), ("min_channels", min_channels)):
        if type(value) is not int or value < 1:
            raise SpeedupError(f"{name} is {value!r}; pass a whole number from 1")


def _done(value: T | None, name: str) -> T:
    if value is None:
        raise SpeedupError(f"{name}: nothing yet; call speedup_model() first")
    return value


def _remaining(masks: Masks, plan: Plan, model: nn.Module) -> Masks:
    """The masks of the parameters that are left; what is no longer masked anywhere is left out."""
    paths = {id(tensor): path for path, tensor, _ in leaves_of(model)}
    entries: dict[str, dict[str, torch.Tensor]] = {}
    for module, parameters in masks.items():
        owner = model.get_submodule(module)
        for name, mask in parameters.items():
            parameter = getattr(owner, name)
            cut = plan.slices.get(paths[id(parameter)])
            left = _without_moved(mask, plan, paths[id(parameter)])
            left = left if cut is None else cut(left)
            if not bool(left.all()):
                entries.setdefault(module, {})[name] = left
    return Masks(entries)
