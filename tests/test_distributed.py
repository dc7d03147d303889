"""Two processes under torchrun, with gloo on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from digit_networks import residual

from compress import L1FilterPruner
from compress.distributed import broadcast_masks, process_count, process_rank
from compress.masks import applied_masks

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_masks_plans_and_states_of_two_processes(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(str(ROOT / "tests" / "distributed_pruning.py"), str(tmp_path)),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all the same" in done.stdout


def test_one_process_has_its_own_masks() -> None:
    model = residual()
    assert (process_count(), process_rank()) == (1, 0)
    _, masks = L1FilterPruner(model, [{"sparsity": 0.5, "op_names": ["conv1"]}]).compress()
    weight = model.conv1.parametrizations.weight[0]
    assert broadcast_masks(model) == masks == applied_masks(model)
    assert model.conv1.parametrizations.weight[0] is weight
    assert isinstance(weight, torch.nn.Module)
