import copy

import pytest
import torch
import torchinfo
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from compress.masks import Masks
from compress.measure import (
    Latency,
    Measurement,
    ModelSummary,
    Table,
    compare,
    latencies,
    latency,
    model_size_mb,
    summarize,
    table,
)


def small_net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)
    )


def masked(model):
    """The model, computing under masks: every other output of a layer is zero."""
    masks = {}
    for path, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            keep = torch.ones_like(module.weight, dtype=torch.bool)
            keep[::2] = False
            masks[path] = {"weight": keep}
    Masks(masks).apply(model)
    return model


def state_of(model):
    """All that a measurement could disturb, comparable with ==."""
    return {
        "modes": [module.training for module in model.modules()],
        "classes": [parametrize.type_before_parametrizations(m) for m in model.modules()],
        "modules": [list(module._modules) for module in model.modules()],
        "parameters": [list(module._parameters) for module in model.modules()],
        "identities": [id(p) for p in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "grads": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "tensors": {name: tensor.tolist() for name, tensor in model.state_dict().items()},
        "rng": torch.get_rng_state().tolist(),
    }


def test_resnet18_has_the_numbers_that_torchinfo_prints():
    counts = summarize(torchvision.models.resnet18(num_classes=10), torch.rand(1, 3, 32, 32))
    assert counts.parameters_total == counts.parameters_trainable == 11_181_642
    assert counts.mult_adds == 37_026_186
    assert counts.parameters_mb == pytest.approx(44.726568)
    assert counts.forward_backward_mb == pytest.approx(0.811088)
    assert counts.total_mb == pytest.approx(44.73 + 0.81 + 0.01, abs=0.01)


@pytest.mark.parametrize("batch", [1, 3])
def test_counts_in_closed_form(batch):
    counts = summarize(small_net(), torch.rand(batch, 3, 8, 8))
    conv, norm, linear = 4 * 3 * 9 + 4, 2 * 4, 256 * 5 + 5
    assert counts.parameters_total == conv + norm + linear
    assert counts.mult_adds == batch * (conv * 64 + norm + linear)
    # FLOPs know no bias and no norm, and are two for a multiply-add.
    assert counts.flops == 2 * batch * (4 * 3 * 9 * 64 + 256 * 5)


def test_flops_count_what_no_module_holds():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(5, 7))

        def forward(self, x):
            return F.linear(x, self.weight)

    assert summarize(Functional(), torch.rand(2, 7)).flops == 2 * 2 * 5 * 7


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "vit_b_16"])
def test_flops_are_those_of_torch(name):
    model = torchvision.models.get_model(name, weights=None).to("meta").eval()
    x = torch.rand(1, 3, 224, 224, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    assert summarize(model, x).flops == counter.get_total_flops() > 0


def test_trainable_leaves_out_frozen_parameters():
    model = small_net()
    model[0].requires_grad_(False)
    counts = summarize(model, torch.rand(1, 3, 8, 8))
    assert counts.parameters_total - counts.parameters_trainable == 4 * 3 * 9 + 4


def test_a_masked_model_counts_as_the_dense_one():
    x = torch.rand(2, 3, 8, 8)
    dense = small_net()
    simulated = masked(copy.deepcopy(dense))
    assert torchinfo.summary(simulated, input_data=x, verbose=0).total_mult_adds != (
        summarize(dense, x).mult_adds
    )  # the reason why masks are undone for the count
    assert summarize(simulated, x) == summarize(dense, x)
    assert model_size_mb(simulated) == model_size_mb(dense)


def test_a_weight_norm_is_part_of_the_model():
    model = nn.utils.parametrizations.weight_norm(nn.Linear(7, 5))
    assert summarize(model, torch.rand(1, 7)).parameters_total == 7 * 5 + 5 + 5


def test_size_counts_a_shared_tensor_once_and_knows_the_dtype():
    first, second = nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False)
    second.weight = first.weight
    assert model_size_mb(nn.Sequential(first, second)) == pytest.approx(400e-6)
    assert model_size_mb(nn.Sequential(first, second).double()) == pytest.approx(800e-6)
    # weight, bias, running mean, running variance; num_batches_tracked is an int64
    assert model_size_mb(nn.BatchNorm2d(8)) == pytest.approx((4 * 8 * 4 + 8) / 1e6)


@pytest.mark.parametrize(
    "measure",
    [summarize, lambda m, x: latency(m, x, warmup=1, repeats=1)],
    ids=["summarize", "latency"],
)
def test_measuring_leaves_everything_as_it_was(measure):
    class Noisy(nn.Module):
        def forward(self, x):
            return F.dropout(x)  # draws even in eval mode

    x = torch.rand(2, 3, 8, 8)
    model = masked(nn.Sequential(*small_net(), Noisy()))
    model(x).sum().backward()
    model[1].eval()
    model[0].register_forward_hook(lambda *_: None)
    before = state_of(model)
    measure(model, x)
    assert state_of(model) == before


@pytest.mark.parametrize(
    "measure",
    [summarize, lambda m, x: latency(m, x, warmup=0, repeats=1)],
    ids=["summarize", "latency"],
)
def test_a_failing_run_leaves_everything_as_it_was(measure):
    model, wrong = masked(small_net()), torch.rand(1, 4, 8, 8)
    before = state_of(model)
    with pytest.raises(RuntimeError):
        measure(model, wrong)
    assert state_of(model) == before


def test_the_error_of_a_wrong_input_names_model_and_shapes():
    with pytest.raises(
        RuntimeError, match=r"summarize: Sequential does not run on .* \[\(1, 4, 8, 8\)\]: Runtime"
    ):
        summarize(small_net(), torch.rand(1, 4, 8, 8))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, scale, *, negate=False):
        y = self.linear(x) * scale[0]
        return -y if negate else y


@pytest.mark.parametrize(
    "dummy_input",
    [
        (torch.rand(2, 4), [torch.rand(1)]),
        {"x": torch.rand(2, 4), "scale": [torch.rand(1)], "negate": True},
    ],
    ids=["tuple", "dict"],
)
def test_inputs_may_be_a_tuple_or_a_dict_with_anything_in_it(dummy_input):
    assert summarize(TwoInputs(), dummy_input).mult_adds == 2 * (4 * 3 + 3)
    assert latency(TwoInputs(), dummy_input, warmup=0, repeats=1).batch == 2


def test_latency_reports_what_was_measured(monkeypatch):
    # A clock that says 1, 2, 3, … ms for successive passes.
    ticks = iter([0.0, 0.0] + [t for n in range(1, 12) for t in (0.0, n / 1e3)])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    result = latency(small_net(), torch.rand(2, 3, 8, 8), warmup=0, repeats=5)
    assert result.samples_ms == pytest.approx((1, 2, 3, 4, 5))
    assert (result.median_ms, result.p10_ms, result.p90_ms) == pytest.approx((3, 1.4, 4.6))
    assert (result.repeats, result.batch, result.device) == (5, 2, "cpu")
    assert (result.warmup, result.dtype) == (0, "float32") and result.machine
    assert result.threads == torch.get_num_threads()


def test_latencies_takes_turns_and_counts_every_pass_once():
    calls = []

    class Named(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            calls.append(self.name)
            return x

    result = latencies({"a": Named("a"), "b": Named("b")}, torch.rand(1), warmup=2, repeats=15)
    assert "".join(calls) == "aabb" + "a" * 11 + "b" * 11 + "a" * 6 + "b" * 6
    assert all(each.repeats == len(each.samples_ms) == 15 for each in result.values())


@pytest.mark.parametrize("arguments", [{"repeats": 0}, {"warmup": -1}])
def test_latency_refuses_nothing_to_measure(arguments):
    with pytest.raises(ValueError, match="repeats must be at least 1 and warmup at least 0, got"):
        latency(small_net(), torch.rand(1, 3, 8, 8), **arguments)


def test_latency_lets_a_module_cache_a_tensor_that_training_uses_later():
    class Caching(nn.Linear):
        cached = None

        def forward(self, x):
            if self.cached is None:
                self.cached = torch.ones(3)
            return super().forward(x) * self.cached

    model = Caching(4, 3)
    latency(model, torch.rand(1, 4), warmup=0, repeats=1)
    assert model.cached is not None
    model(torch.rand(1, 4)).sum().backward()  # refused, were the cache an inference tensor
    assert model.weight.grad is not None


def test_compare_and_table():
    x = torch.rand(2, 3, 8, 8)
    dense = small_net()
    models = {"dense": dense, "small": nn.Sequential(nn.Flatten(), nn.Linear(192, 5))}
    measured = compare(models, x, warmup=0, repeats=3)
    assert measured["dense"].summary == summarize(dense, x)
    assert measured["dense"].size_mb == model_size_mb(dense)
    shown = table(measured, {"accuracy": {"dense": "98.0 %"}})
    assert shown.columns == (
        "",
        "accuracy",
        "parameters",
        "mult-adds",
        "size MB",
        "latency ms (p10–p90)",
    )
    assert [row[:3] for row in shown.rows] == [
        ("dense", "98.0 %", "1.41 k"),
        ("small", "", "965 (69%)"),
    ]
    assert shown.caption.startswith("latency: median of 3 passes, batch 2, cpu, ")


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((4_300, 0), ["4.30 k", "0 (0%)"]),
        ((1_226_442, 201_425), ["1.23 M", "0.20 M (16%)"]),
        ((100_000, 99_999), ["0.10 M", "100.00 k (100%)"]),
        ((5 * 10**9, 10**9), ["5.00 G", "1.00 G (20%)"]),
    ],
)
def test_counts_have_the_unit_that_shows_them(numbers, expected):
    one = Latency(1.0, 1.0, 1.0, 1, 1, "cpu", 1, (1.0,))
    measured = {
        str(n): Measurement(ModelSummary(n, n, n, 2 * n, 0.0, 0.0, 0.0), one, 4 * n / 1e6)
        for n in numbers
    }
    rows = table(measured).rows
    assert [row[1] for row in rows] == [row[2] for row in rows] == expected
    assert table(measured).columns[3] == "size MB"
    assert rows[0][3] == {4_300: "0.017"}.get(numbers[0], f"{4 * numbers[0] / 1e6:.2f}")


def test_a_table_as_text_and_as_markdown():
    grid = Table(("", "accuracy"), (("dense", "98 %"), ("small [x]", "7 %")), "a caption")
    assert [line.split() for line in str(grid).splitlines()] == [
        ["accuracy"],
        ["─" * 22],
        ["dense", "98", "%"],
        ["small", "[x]", "7", "%"],
        ["a", "caption"],
    ]
    assert grid.markdown() == (
        "|  | accuracy |\n| --- | ---: |\n| dense | 98 % |\n| small [x] | 7 % |\n\na caption"
    )


def test_table_refuses_rows_that_are_not_there():
    with pytest.raises(ValueError, match="no measurements"):
        table({})
    measured = compare({"dense": small_net()}, torch.rand(1, 3, 8, 8), warmup=0, repeats=1)
    with pytest.raises(ValueError, match=r"'accuracy' has values for \['smal'\].*\['dense'\]"):
        table(measured, {"accuracy": {"smal": "1 %"}})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_reads_the_device_clock():
    model = nn.Linear(4096, 4096).cuda()
    result = latency(model, torch.rand(4096, 4096, device="cuda"), warmup=2, repeats=5)
    assert isinstance(result, Latency)
    assert result.device == "cuda:0"
    assert result.median_ms > 0
