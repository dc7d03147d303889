"""Decide, plan and cut; where the model's own code cannot follow, pin and begin again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from compress.errors import SpeedupError
from compress.graph.channels import ChannelGraph
from compress.graph.walk import leaves_of
from compress.speedup.decide import Decision, Limits
from compress.speedup.follow import Follower
from compress.speedup.knowledge import Knowledge
from compress.speedup.plan import Plan, PlanBuilder
from compress.speedup.replay import needs_replay, replay
from compress.speedup.surgery import apply_plan, masked

MOST_TRIES = 100  # real models take a few; one that changes at every run must not go on for ever
_UNKNOWN = (
    "parameter values are unknown (meta device): decided by the masks alone, every value that is "
    "not masked counts as other than 0; what constants are, and which channel carries them, needs "
    "the values"
)


@dataclass(frozen=True)
class Options:
    """How to decide: see `ModelSpeedup`."""

    constants: str
    limits: Limits
    exact: bool


@dataclass
class Cut:
    """A cut that has been made, and how to undo it; ``replayed``: the code was seen to follow."""

    undo: Callable[[], None]
    decision: Decision
    plan: Plan
    replayed: bool


class Cutter:
    """Cuts one model under one set of masks (by parameter path), as often as it is undone.

    A ``graph`` of the model that is handed in learns what the model's code cannot follow.
    """

    def __init__(
        self,
        model: nn.Module,
        dummy_input: Any,
        masks: Mapping[str, torch.Tensor],
        options: Options,
        graph: ChannelGraph | None = None,
    ) -> None:
        self.model = model
        self.dummy_input = dummy_input
        self.options = options
        if graph is None:
            within = partial(masked, model, masks)
            graph = ChannelGraph(model, dummy_input, options.exact, within)
        self.graph = graph
        self.knowledge = Knowledge(self.graph, masks, options.constants)
        self.follower = Follower(self.graph)
        self._on_meta = any(tensor.is_meta for _, tensor, _ in leaves_of(model))

    def renew(self, masks: Mapping[str, torch.Tensor]) -> None:
        """Look at the values and the masks anew. Errors: `SpeedupError` for other parameters."""
        now = {path: tensor for path, tensor, _ in leaves_of(self.model)}
        for path, node in self.graph.trace.leaves.items():
            if node.meta["name"] != "constant" and now.get(path) is not node.meta["tensor"]:
                raise SpeedupError(
                    f"{path} is another tensor than when the plan was made; make a new ModelSpeedup"
                )
        self.knowledge = Knowledge(self.graph, masks, self.options.constants)
        self._on_meta = any(tensor.is_meta for tensor in now.values())

    def cut(self, always_replay: bool) -> Cut:
        """Cut the model; with ``always_replay`` hold every call of a run against the plan."""
        tries = 0
        while True:
            tries += 1
            if tries == MOST_TRIES:
                self.graph.pin_everything(f"does not follow its sizes in {MOST_TRIES} tries")
            decision = Decision(self.knowledge, self.options.limits, self.options.exact)
            builder = PlanBuilder(decision)
            if builder.unset:
                self.follower.pin_unset(builder.unset)
                continue
            self.follower.guess(decision)
            attributes = self.follower.attributes(decision)
            builder.add_attributes(attributes)
            if self._on_meta:
                builder.plan.notes, builder.plan.on_meta = (_UNKNOWN,), True
            undo = apply_plan(self.model, builder.plan, self.knowledge.masks)
            try:
                # A cut of nothing has nothing to follow (and some forwards differ at every run).
                replays = bool(builder.plan.slices) and (
                    always_replay or bool(attributes) or builder.counts or needs_replay(decision)
                )
                mismatch = None
                if replays:
                    mismatch = replay(self.model, self.dummy_input, decision, builder.numbers)
            except BaseException:
                undo()
                raise
            if mismatch is None:
                return Cut(undo, decision, builder.plan, replays)
            undo()
            self.follower.answer(decision, mismatch)
