"""``ModelSpeedup``: make a masked model physically small."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from compress.errors import SpeedupError
from compress.graph.channels import ChannelGraph
from compress.graph.explain import Explanation
from compress.graph.run import collector_paused
from compress.graph.walk import leaves_of, modules_of, wrapped_in
from compress.masks import Masks, suspend_masks
from compress.progress import progress_bar
from compress.speedup.cut import Cut, Cutter, Options
from compress.speedup.decide import Limits
from compress.speedup.history import remember
from compress.speedup.optimizer import check_optimizer, slice_optimizer
from compress.speedup.plan import Plan, same_plan
from compress.speedup.report import Report, make_report, parameter_counts
from compress.speedup.surgery import by_leaf, remaining_masks
from compress.speedup.verify import Verifier
from compress.speedup.why import explain_decision

MaskSource = Masks | Mapping[str, Mapping[str, torch.Tensor]] | str | os.PathLike[str]


class ModelSpeedup:
    """Shrink a model to what its masks leave, so that it computes the same.

    Args:
        model: the masked or the plain model. ``speedup_model`` shrinks it in place.
        dummy_input: what the model takes: a tensor, a tuple of arguments or a dict of keyword
            arguments, on the model's device. Any batch size; only shapes matter.
        masks_or_file: ``Masks``, a nested dict ``{module: {parameter: 0/1 tensor}}``, or the path
            of a file that ``Masks.save`` wrote. Masks already on the model count, too, as do those
            of ``torch.nn.utils.prune``; without any others they may be left out.
        map_location: the device to load a mask file to, as in ``torch.load``.
        optimizer: one that trains the model: its state (momentum, Adam's averages) shrinks along,
            so that training goes on. Biases that are new are not among its parameters.
        verify: run the masked and the small model on ``dummy_input`` and compare (two forwards).
        constants: what to do with a removed channel that is a constant other than 0 (BatchNorm's
            shift, say). ``"exact"`` moves it into the next bias, or lets one channel stay to carry
            it where zero padding makes that inexact. ``"fold"`` moves it into the bias even so;
            ``"drop"`` drops it, as other tools do. The report says how far off the last two are.
        exact: with ``False`` every unit whose producers are all 0 goes, though a consumer still
            reads it: the layers that make it have its weights and biases masked entirely, but what
            comes between (a norm's shift, statistics over channels) makes it more than a constant.
            Constants are dropped then, unless ``constants="fold"``. What the structure pins stays.
            The report says how far off the small model is on ``dummy_input``.
        round_to: keep a multiple of so many channels in each layer.
        min_channels: keep at least so many channels in each layer.
        progress: False is no progress bar; there is none where stderr is no terminal.

    ``plan`` (what is done to which parameter), ``report`` (what goes, what stays and why) and
    ``graph`` may be asked before ``speedup_model``, which then carries that plan out; until then
    the model is as it was, and may be on the meta device. ``masks`` are those of what is left, to
    go on training with.

    Errors: ``MaskError`` for masks that do not fit the model, ``TraceError`` where the model does
    not run on ``dummy_input``, ``VerificationError`` where the small model would differ,
    ``SpeedupError`` where the model changed after the plan was made, or an optimizer's state cannot
    shrink. In each case the model is as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        dummy_input: Any,
        masks_or_file: MaskSource | None = None,
        map_location: Any = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        verify: bool = True,
        constants: str = "exact",
        exact: bool = True,
        round_to: int = 1,
        min_channels: int = 1,
        progress: bool = True,
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
        self.progress = progress
        if not exact and constants == "exact":
            constants = "drop"
        self.options = Options(constants, Limits(round_to, min_channels), bool(exact))
        self._given = Masks.coerce({} if masks_or_file is None else masks_or_file, map_location)
        self._given.validate(model)
        self._plan: Plan | None = None
        self._report: Report | None = None
        self._make_report: Callable[[], Report] | None = None  # reasons take longer than the cut
        self._explain: Callable[[str, int], Explanation] | None = None
        self._cutter: Cutter | None = None
        self._graph: ChannelGraph | None = None
        self._done = False
        self._masks: Masks | None = None

    @property
    def report(self) -> Report:
        """What goes, or after ``speedup_model`` went, and what stays and why, layer by layer."""
        if self._plan is None:
            self._plan_only()
        if self._report is None:
            assert self._make_report is not None
            self._report, self._make_report = self._make_report(), None
        return self._report

    @property
    def plan(self) -> Plan:
        """What is done to which parameter; asked before ``speedup_model``, nothing is done yet."""
        if self._plan is None:
            self._plan_only()
        assert self._plan is not None
        return self._plan

    @property
    def graph(self) -> ChannelGraph:
        """The channel graph that the plan is of: of the model as it was."""
        if self._plan is None:
            self._plan_only()
        assert self._graph is not None
        return self._graph

    def why(self, layer: str, channel: int) -> Explanation:
        """Why a unit of a layer goes or stays under the masks; prints as a sentence.

        ``channel`` counts in the layer as it was. Where the structure alone decides, the answer is
        that of ``ChannelGraph.why``. Errors: ``GraphError`` where there is no such unit.
        """
        if self._plan is None:
            self._plan_only()
        assert self._explain is not None
        return self._explain(layer, channel)

    @property
    def masks(self) -> Masks:
        """The masks of what is left, shaped like the small model's parameters."""
        if self._masks is None:
            if not self._done or self._plan is None:
                raise SpeedupError("masks: nothing yet; call speedup_model() first")
            self._masks = remaining_masks(self._given, self._plan, self.model)
        return self._masks

    @property
    def masks_before(self) -> dict[str, torch.Tensor]:
        """The masks that the plan is of, by the (first) path of the parameter, as it was."""
        with suspend_masks(self.model) as suspended:
            masks = self._given if self._done else self._all_masks(suspended.masks)
            return by_leaf(self.model, masks)

    def speedup_model(self) -> nn.Module:
        """Shrink the model in place and return it."""
        if self._done:
            raise SpeedupError("this model has been sped up; make a new ModelSpeedup to go on")
        _check_values(self.model)
        suspended = suspend_masks(self.model)
        try:
            # The new parameters must be ordinary tensors, wherever the caller is.
            with (
                collector_paused(),
                torch.inference_mode(False),
                progress_bar("speeding up", 3, self.progress) as advance,
            ):
                self._shrink(self._all_masks(suspended.masks), advance)
        except BaseException:
            suspended.restore()
            raise
        return self.model

    # -- the road --------------------------------------------------------------------------

    def _plan_only(self) -> None:
        """Cut, write the report, and undo everything."""
        suspended = suspend_masks(self.model)
        try:
            with collector_paused(), torch.inference_mode(False):
                flat = by_leaf(self.model, self._all_masks(suspended.masks))
                before = self._shapes()
                cutter = Cutter(self.model, self.dummy_input, flat, self.options)
                cut = cutter.cut(always_replay=True)
                counts = parameter_counts(self.model, before)
                cut.undo()
        finally:
            suspended.restore()
        self._cutter, self._plan = cutter, cut.plan
        self._keep(cut, flat, counts, None, planned=True)

    def _shrink(self, masks: Masks, advance: Callable[[], None]) -> None:
        """``advance`` is called after the trace, after the cut and after the comparison."""
        if self.optimizer is not None:
            check_optimizer(self.optimizer, self.model)
        flat, before = by_leaf(self.model, masks), self._shapes()
        cutter = self._renewed_cutter(flat)
        advance()
        exact, verifier = self.options.exact and self.options.constants == "exact", None
        if self.verify:
            verifier = Verifier(self.model, self.dummy_input, flat, exact)
        cut = cutter.cut(always_replay=False)
        advance()
        try:
            if self._plan is not None and not same_plan(self._plan, cut.plan):
                raise SpeedupError(
                    "the model or its masks have changed since the plan was made, and the plan is "
                    "another now; make a new ModelSpeedup"
                )
            error = None
            if verifier is not None:
                error, problem = verifier.compare()
                if problem and not cut.replayed:
                    # Something in the code counts, though nothing showed it: look at every call.
                    cut.undo()
                    cut = cutter.cut(always_replay=True)
                    error, problem = verifier.compare()
                if problem and (exact or error == float("inf")):
                    cut.undo, error = verifier.accept_or_raise(cut.undo, cut.plan, problem)
            advance()
            counts = parameter_counts(self.model, before)
            if self.optimizer is not None:
                slice_optimizer(self.optimizer, self.model, cut.plan, before)
            self._keep(cut, flat, counts, error, planned=False)
            self._plan, self._given, self._done = cut.plan, masks, True
            self._cutter = None
            cutter.graph.trace.jumps.clear()  # the report, which keeps the graph, asks for none
            remember(self.model, cut.plan)
        except BaseException:
            cut.undo()
            raise

    def _renewed_cutter(self, flat: Mapping[str, torch.Tensor]) -> Cutter:
        """A cutter of the model as it is now; that of the plan, where there is one."""
        if self._cutter is None:
            return Cutter(self.model, self.dummy_input, flat, self.options)
        self._cutter.renew(flat)
        return self._cutter

    def _keep(
        self,
        cut: Cut,
        flat: Mapping[str, torch.Tensor],
        counts: tuple[int, int],
        error: float | None,
        planned: bool,
    ) -> None:
        """Keep what the report and later questions need."""
        decision, plan = cut.decision, cut.plan
        decision.knowledge.forget()
        self._graph, self._report = decision.graph, None
        self._make_report = partial(make_report, decision, plan, flat, counts, error, planned)
        self._explain = partial(explain_decision, decision, flat)

    def _all_masks(self, applied: Masks) -> Masks:
        """What the model has on it (a copy, and nobody else's) and what was given, together."""
        if not applied:
            return self._given
        applied &= self._given
        return applied

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {path: tuple(t.shape) for path, t, _ in leaves_of(self.model)}


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise SpeedupError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
    wrapper = wrapped_in(model)
    if wrapper is not None:
        raise SpeedupError(
            f"model is a {type(model).__name__} around your model; pass model.{wrapper}, and "
            "wrap the small one again"
        )
    for path, module in modules_of(model):
        if ".quantized" in type(module).__module__ and type(module).__module__.startswith("torch."):
            raise SpeedupError(
                f"{path}: is quantised ({type(module).__name__}), its weights are no parameters; "
                "speed the model up before it is quantised"
            )
    for path, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise SpeedupError(f"{path}: the parameter is lazy; run the model once, and try again")


def _check_options(constants: str, round_to: int, min_channels: int) -> None:
    if constants not in ("exact", "fold", "drop"):
        raise SpeedupError(f'constants is {constants!r}; pass "exact", "fold" or "drop"')
    for name, value in (("round_to", round_to), ("min_channels", min_channels)):
        if type(value) is not int or value < 1:
            raise SpeedupError(f"{name} is {value!r}; pass a whole number from 1")


def _check_values(model: nn.Module) -> None:
    for path, tensor, _ in leaves_of(model):
        if tensor.is_meta:
            raise SpeedupError(
                f"{path}: it has no values yet (meta device); plan and report tell what would go; "
                "to shrink the model load it to a device first, and make a new ModelSpeedup"
            )
