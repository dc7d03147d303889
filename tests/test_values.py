"""A run on meta knows what the inputs alone decide, and nothing that parameters have a part in."""

import pytest
import torch
from torch import nn

from compress import L1FilterPruner, ModelSpeedup
from compress.errors import TraceError
from compress.graph.run import record
from compress.graph.values import LARGEST


class Masked(nn.Module):
    """What it does depends on a mask, on lengths, and on what it writes."""

    def __init__(self, look):
        super().__init__()
        self.look = look
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 4)
        self.register_buffer("order", torch.arange(5))

    def forward(self, x, mask):
        hidden = torch.relu(self.first(x))
        if self.look(self, hidden, mask):
            hidden = hidden * mask.unsqueeze(-1)
        return self.second(hidden)


def padded(self, hidden, mask):
    return not mask.bool().all()


def lengths(self, hidden, mask):
    longest = max(mask.sum(1).long().tolist())
    return int(mask.nonzero().shape[0]) > 0 and longest == 3


def own_numbers(self, hidden, mask):
    limits = torch.full((5,), 3, device=hidden.device)
    return bool((self.order < limits).sum() == 3)


def written(self, hidden, mask):
    seen = torch.zeros(2, 5, device=mask.device)
    part = seen[:, :3]
    part += mask[:, :3]
    return seen.sum().item() == 5


def by_keyword(self, hidden, mask):
    return torch.equal(input=mask, other=mask.clone())


def hidden_written(self, hidden, mask):
    seen = torch.zeros(2, 5, device=mask.device)
    part = seen[:, :3]
    part += self.second(hidden)[:, :3].mean(2)  # from here on parameters have a part in all of it
    return seen.sum().item() > -1


def hidden_seen(self, hidden, mask):
    return bool(hidden.sum() > 0)


def data():
    mask = torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    return torch.randn(2, 5, 6), mask


@pytest.mark.parametrize("look", [padded, lengths, own_numbers, written, by_keyword])
def test_what_inputs_decide_needs_no_run_on_the_parameters(look):
    torch.manual_seed(0)
    model, (x, mask) = Masked(look).eval(), data()
    before = mask.clone()
    trace = record(model, (x, mask))
    assert trace.on_meta
    assert any(node.meta["name"] == "mul" for node in trace.nodes)  # the path for this mask
    assert torch.equal(mask, before)


@pytest.mark.parametrize("look", [hidden_seen, hidden_written])
def test_what_parameters_decide_is_run_for_real(look):
    trace = record(Masked(look).eval(), data())
    assert not trace.on_meta


@pytest.mark.parametrize(
    "look", [padded, lengths, own_numbers, written, by_keyword, hidden_seen, hidden_written]
)
def test_such_a_model_shrinks_exactly(look):
    torch.manual_seed(1)
    model, (x, mask) = Masked(look).eval(), data()
    config = [{"sparsity": 0.5, "op_names": ["first"]}]
    pruner = L1FilterPruner(model, config, mode="dependency_aware", dummy_input=(x, mask))
    model, masks = pruner.compress()
    expected = model(x, mask)
    ModelSpeedup(model, (x, mask), masks).speedup_model()
    assert model.first.out_features == 8
    assert torch.allclose(model(x, mask), expected, atol=1e-6)


def test_a_model_without_values_may_look_at_its_mask():
    """A dry run of a model that is larger than memory."""
    with torch.device("meta"):
        model = Masked(padded).eval()
    assert record(model, data()).on_meta
    with torch.device("meta"):
        model = Masked(hidden_seen).eval()
    with pytest.raises(TraceError, match="Does it look at its data"):
        record(model, data())


def test_large_inputs_are_not_computed_with():
    class Large(nn.Module):
        def forward(self, x):
            return x if bool((x * 2).sum() > 0) else -x

    model = Large().eval()
    assert record(model, torch.ones(LARGEST)).on_meta
    assert not record(model, torch.ones(LARGEST + 1)).on_meta


def test_a_draw_leaves_the_random_numbers_as_they_were():
    class Drawn(nn.Module):
        def forward(self, x):
            return x if bool(torch.rand(()) < 2) else -x

    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert record(Drawn().eval(), torch.ones(3)).on_meta
    assert torch.equal(torch.rand(4), expected)
