"""Gates: what they compute, what they skip, and that the two are the same."""

from __future__ import annotations

import copy

import pytest
import torch
from digit_networks import batches, residual, sgd
from torch import Tensor, nn
from torch.nn import functional as F

from compress.dynamic import GatedConv2d, Gates, add_gates
from compress.errors import CompressError, ConfigError

X = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def gated(sparsity: float = 0.5, **selector: list[str]) -> tuple[nn.Module, Gates]:
    model = residual().eval()
    selector = selector or {"op_types": ["Conv2d"]}
    return model, add_gates(model, [{"sparsity": sparsity, **selector}], X)


def by_hand(gate: GatedConv2d, x: Tensor) -> Tensor:
    strength = x.abs().mean((2, 3))
    g = (strength @ gate.gate.weight.T + gate.gate.bias).clamp(min=0)
    out = gate.norm(gate.conv(x)) if gate.norm is not None else gate.conv(x)
    for sample, saliency in zip(out, g, strict=True):
        order = saliency.argsort(descending=True)
        sample *= saliency[:, None, None]
        sample[order[gate.keep :]] = 0
    return out


@pytest.mark.parametrize("count", [1, 5])
def test_a_gate_by_hand_and_the_same_when_it_skips(count: int) -> None:
    model, gates = gated()
    x = X[:count]
    for skips in (True, False):
        for gate in gates.modules():
            gate.skips = skips
        with torch.no_grad():
            h = model.conv1(x)  # type: ignore[operator]
            torch.testing.assert_close(h, by_hand(model.conv1, x))  # type: ignore[arg-type]
            assert (h.flatten(2).abs().sum(2) > 0).sum(1).tolist() == [4] * count
            h = F.relu(h)
            torch.testing.assert_close(model.conv2(h), by_hand(model.conv2, h))  # type: ignore[operator, arg-type]


def test_the_norm_that_follows_goes_along_and_comes_back() -> None:
    model = residual().eval()
    before, names = model(X), [name for name, _ in model.named_parameters()]
    own = model.conv1, model.bn1, model.conv2
    gates = add_gates(model, [{"sparsity": 0.5, "op_names": ["conv1", "conv2"]}], X)
    assert dict(gates.paths) == {"conv1": "bn1", "conv2": "bn2"}
    assert (model.conv1.conv, model.conv1.norm, model.conv2.conv) == own
    assert isinstance(model.bn1, nn.Identity)
    assert isinstance(model.conv3, nn.Conv2d)
    assert not torch.equal(model(X), before)
    assert gates.remove() is model
    assert (model.conv1, model.bn1, model.conv2) == own
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(model(X), before)


class Odd(nn.Module):
    """A convolution without a norm, one whose output goes two ways, and one in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.both = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1, padding_mode="circular")
        self.norm, self.grouped = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.both(self.plain(x))
        return self.grouped(self.norm(y) + y)


def test_convolutions_without_one_norm_of_their_own() -> None:
    torch.manual_seed(0)
    model = Odd().eval()
    gates = add_gates(model, [{"sparsity": 0.5, "op_types": ["default"]}], X)
    assert dict(gates.paths) == {"plain": None, "both": None, "grouped": None}
    with torch.no_grad():
        skipped = model(X)
        with gates._without_skipping():
            torch.testing.assert_close(skipped, model(X))


def test_what_is_skipped_is_counted_and_no_more() -> None:
    model, gates = gated(op_names=["conv1", "conv2"])
    one = X[:1]
    cost = gates.cost(one)
    places = 64
    rest = 8 * 6 * 9 * places + 32 * 20 + 20 * 10  # conv3 and the linear layers
    dense = (72 + 8 * 6 * 9) * places + 8 + 8 * 6 + rest  # with the gates of both
    assert cost.dense == dense
    # 4 of 8 channels of conv1; of conv2 3 of 6, by those of the 4 that the ReLU leaves.
    with torch.no_grad():
        read = int(F.relu(model.conv1(one)).flatten(2).any(2).sum())  # type: ignore[operator]
    assert 0 < read <= 4
    assert cost.single == cost.batched == (36 + read * 3 * 9) * places + 56 + rest
    several = gates.cost(X)
    assert several.dense == dense
    assert several.single <= several.batched <= dense
    assert not model.training


def test_gates_learn_and_are_penalised() -> None:
    torch.manual_seed(0)
    model, gates = gated()
    with pytest.raises(CompressError, match="penalty: no saliencies; run the model in train mode"):
        gates.penalty()
    model.train()
    optimizer = sgd(model.parameters())
    losses = []
    for images, labels in batches()[:6]:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        (loss + 0.01 * gates.penalty()).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    gate = model.conv1.gate  # type: ignore[union-attr]
    assert gate.weight.grad is not None and bool(gate.weight.grad.any())  # type: ignore[union-attr]
    expected = [g._saliency.detach().abs().sum(1).mean() for g in gates.modules()]  # type: ignore[union-attr]
    assert gates.penalty().item() == pytest.approx(float(sum(expected)))
    twin = copy.deepcopy(model)  # although a saliency hangs on the last step's graph
    assert twin.conv1._saliency is None  # type: ignore[union-attr]
    assert torch.equal(twin.eval()(X), model.eval()(X))


def test_inputs_choose_their_own_channels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 1)).eval()
    gates = add_gates(model, [{"sparsity": 0.5, "op_types": ["Conv2d"]}], torch.rand(1, 2, 3, 3))
    (gate,) = gates.modules()
    with torch.no_grad():
        gate.gate.weight.copy_(torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]))
        x = torch.zeros(2, 2, 3, 3)
        x[0, 0] = x[1, 1] = 1
        on = model(x).flatten(2).abs().sum(2) > 0
    assert on.tolist() == [[True, True, False, False], [False, False, True, True]]


def test_it_is_exported_as_it_computes() -> None:
    model, _ = gated()
    exported = torch.export.export(model, (X,)).module()
    torch.testing.assert_close(exported(X), model(X))
    assert any("topk" in str(node.target) for node in exported.graph.nodes)  # type: ignore[union-attr]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), model(X))


def test_wrong_config_lists() -> None:
    model = residual()
    before = list(model.state_dict())
    with pytest.raises(ConfigError, match="total_sparsity is one ranking over layers"):
        add_gates(model, [{"total_sparsity": 0.5, "op_types": ["Conv2d"]}], X)
    with pytest.raises(ConfigError, match="add_gates masks channels of Conv2d; Linear 'fc' has no"):
        add_gates(model, [{"sparsity": 0.5, "op_names": ["fc"]}], X)
    assert list(model.state_dict()) == before


def test_a_gate_is_not_gated() -> None:
    model, gates = gated()
    y = model.eval()(X)
    with pytest.raises(ConfigError, match=r"'conv1\.conv' has a gate already; exclude it, or call"):
        add_gates(model, [{"sparsity": 0.5, "op_types": ["Conv2d"]}], X)
    assert torch.equal(model(X), y)
    gates.remove()
    add_gates(model, [{"sparsity": 0.5, "op_types": ["Conv2d"]}], X)
