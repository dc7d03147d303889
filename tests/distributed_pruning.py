"""Two processes prune, train, shrink and go on; started by torchrun. Fails where they differ."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from compress import AGPPruner, Evaluator, IterativePruner, ModelSpeedup
from compress.distributed import broadcast_masks, gathered
from compress.masks import applied_masks
from compress.pruners import ActivationMeanRankFilterPruner


def network() -> nn.Sequential:
    torch.manual_seed(dist.get_rank())  # DDP gives all the first one's weights
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip


def shard() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + dist.get_rank())
    return [torch.randn(8, 1, 6, 6, generator=generator) for _ in range(2)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for batch in shard():
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def assert_same(value: object, what: str) -> None:
    values = gathered(str(value))
    assert values[0] == values[1], f"{what} differs: {values}"


def flat(model: nn.Module) -> list[float]:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def masks_of(model: nn.Module) -> list[object]:
    return [(name, mask.tolist()) for name, mask in applied_masks(model).flat().items()]


def gradual() -> None:
    """AGP over epochs, by activations of each process's own data."""
    model = network()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    config = [{"final_sparsity": 0.5, "end_epoch": 3, "op_types": ["Conv2d"]}]
    pruner = AGPPruner(
        model, config, optimizer, "mean_activation", steps_per_epoch=2, evaluator=Evaluator(shard())
    )
    pruner.compress()
    for _ in range(3):
        train(parallel, optimizer)
        assert_same(masks_of(model), "a mask")
    assert pruner.masks == applied_masks(model)
    assert_same(flat(model), "a weight")
    speedup = ModelSpeedup(model, shard()[0][:1], optimizer=optimizer)
    small = speedup.speedup_model()
    assert_same(speedup.plan, "the plan")
    assert small[0].out_channels < 8
    parallel = DistributedDataParallel(small)
    before = flat(small)
    train(parallel, optimizer)
    assert flat(small) != before
    assert_same(flat(small), "a weight of the small model")


def rounds(state: Path, stop: int | None) -> list[float]:
    """Rounds with a state; dropout, so that each process's own random numbers count."""
    model = network().append(nn.Dropout())
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            dist.broadcast(parameter, 0)
    torch.manual_seed(7)
    pruner = IterativePruner(
        model, [{"sparsity": 0.5, "op_types": ["Conv2d"]}], optimizer, "l1", total_iteration=3,
        speedup=True, dummy_input=torch.rand(1, 1, 6, 6), state=state,
    )  # fmt: skip
    torch.manual_seed(dist.get_rank())
    for number in pruner.rounds():
        train(DistributedDataParallel(model), optimizer)
        if number == stop:
            return []
    assert_same(flat(model), "a weight after rounds")
    return flat(model)


def one_shot() -> None:
    model = network()
    DistributedDataParallel(model)
    config = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]
    ActivationMeanRankFilterPruner(model, config, Evaluator(shard())).compress()
    different = len({str(each) for each in gathered(masks_of(model))}) == 2
    assert different, "the shards agree, and so the test says nothing"
    assert broadcast_masks(model) == applied_masks(model)
    assert_same(masks_of(model), "a broadcast mask")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    one_shot()
    gradual()
    whole = rounds(folder / "whole", None)
    assert rounds(folder / "killed", 2) == []
    assert rounds(folder / "killed", None) == whole
    dist.barrier()
    if dist.get_rank() == 0:
        sys.stdout.write("all the same\n")
    gc.collect()  # models in DDP are cycles; torch may abort where they outlive their group
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
