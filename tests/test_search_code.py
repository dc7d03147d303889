"""Searches in models whose code cannot follow every cut: the budget is of what it can."""

from __future__ import annotations

import pytest
import torch
from test_search import Likeness, subject
from torch import Tensor, nn

from compress import ModelSpeedup, SimulatedAnnealingPruner
from compress.measure import summarize
from compress.search.subject import Subject


class Sizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = 4


class Attending(nn.Module):
    """Attention whose head count is a number in the code, or an attribute that blocks share."""

    def __init__(self, shared: Sizes | None) -> None:
        super().__init__()
        self.shared = shared
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        heads = 4 if self.shared is None else self.shared.heads
        q, k, v = (
            part(x).view(len(x), x.shape[1], heads, -1).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.o(out.transpose(1, 2).flatten(2))


class Attentive(nn.Module):
    def __init__(self, share: bool) -> None:
        super().__init__()
        self.shared = Sizes() if share else None
        self.one, self.two = Attending(self.shared), Attending(self.shared)
        self.wide, self.back = nn.Linear(24, 48), nn.Linear(48, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(x))
        return (x + self.back(torch.relu(self.wide(x)))).mean(1)


@pytest.mark.parametrize("share", [False, True])
def test_a_budget_counts_what_the_code_cannot_follow(share: bool) -> None:
    torch.manual_seed(0)
    model, x = Attentive(share), torch.randn(2, 6, 24)
    dense = summarize(model, x).flops
    pruner = SimulatedAnnealingPruner(
        model, [{"sparsity": 0.3, "op_types": ["Linear"]}], Likeness(model, x), cost="flops",
        pruning_params={"heads": "auto"}, cool_down_rate=0.5, progress=False,
    )  # fmt: skip
    pruner.compress()
    masked = model(x)
    groups = pruner._space.groups
    assert any(group.name == "wide" for group in groups)
    if share:  # as many heads in both blocks
        assert {"one.v", "two.v"} <= set(max(groups, key=lambda g: len(g.layers)).layers)
    small = ModelSpeedup(model, x).speedup_model()
    torch.testing.assert_close(small(x), masked)
    assert pruner.result is not None
    assert summarize(small, x).flops == pruner.result.best.flops <= 0.7 * dense


def test_what_stays_unforeseen_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Subject, "_try_out", lambda self: None)
    torch.manual_seed(0)
    one = subject(
        Attentive(False), [{"sparsity": 0.5, "op_types": ["Linear"]}], torch.rand(2, 6, 24)
    )
    point = one.space.point({group.name: 0.5 for group in one.space.groups})
    with pytest.warns(
        RuntimeWarning, match="units that a candidate masks stay in its small model: it"
    ):
        small = one.small(point)
    assert one.flops(small) == summarize(small.model, torch.rand(2, 6, 24)).flops
    assert one.flops(small) > one.cost(point, "flops")
