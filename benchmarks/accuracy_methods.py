"""What `accuracy.py` compares: the network, its data and training, and every way to prune it.

A `Trial` is one seed: its own split of the digits, one dense training, and from it every method.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress import ModelSpeedup, pruners
from compress.errors import ConfigError
from compress.evaluator import Evaluator
from compress.masks import suspend_masks
from compress.pruners.base import Pruner
from compress.pruners.data import DataPruner

Record = dict[str, Any]

# One ranking may leave a layer one channel, which all must pass. Torch-Pruning leaves layers whole
# that would vanish, by default; ours needs to be told.
MOST_PER_LAYER = 0.9
STEPS = 9  # of the search for a sparsity


@dataclass(frozen=True)
class Settings:
    """What all methods share. Sparsities times widths are whole, so that no tool rounds."""

    widths: tuple[int, int, int] = (20, 40, 80)
    dense_epochs: int = 12
    tuning_epochs: int = 2
    batch: int = 16
    test_share: float = 0.3
    dense_lr: float = 0.05
    tuning_lr: float = 0.05
    slim_scale: float = 5e-3
    batches_measured: int = 8


@dataclass(frozen=True)
class Method:
    """A criterion in a mode.

    ``equal_cost``: its own sparsity is sought such that as many mult-adds are left as where every
    coupled group loses the cell's sparsity of its channels.
    """

    criterion: str
    mode: str
    section: str = "filters"  # or "weights", "baselines"
    tool: str = "compress"
    equal_cost: bool = False

    @property
    def name(self) -> str:
        tool = "" if self.tool == "compress" else f"{self.tool}: "
        return f"{tool}{self.criterion}, {self.mode}{', equal cost' if self.equal_cost else ''}"


# -- network and data ----------------------------------------------------------------------


class Block(nn.Module):
    """conv-norm-relu-conv-norm added to its input, which is projected where the width changes."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        stride = 1 if inputs == width else 2
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride == 2:
            projection = nn.Conv2d(inputs, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


class Network(nn.Module):
    """A residual block in each of three stages, and a hidden layer, for images (1, 8, 8)."""

    def __init__(self, widths: tuple[int, int, int]) -> None:
        super().__init__()
        first, second, third = widths
        self.stem = nn.Sequential(nn.Conv2d(1, first, 3, padding=1, bias=False))
        self.stem.append(nn.BatchNorm2d(first)).append(nn.ReLU())
        self.blocks = nn.Sequential(*map(Block, (first, first, second), widths))
        self.hidden = nn.Sequential(nn.Linear(third, second), nn.BatchNorm1d(second), nn.ReLU())
        self.head = nn.Linear(second, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.blocks(self.stem(x)).mean((2, 3))))


class Batches:
    """Shuffled batches, by a generator of its own: a new `Batches` gives the same again."""

    def __init__(self, images: Tensor, labels: Tensor, size: int, seed: int) -> None:
        self.images, self.labels, self.size = images, labels, size
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.labels) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels), generator=self._generator)
        for index in order[: len(self) * self.size].split(self.size):
            yield self.images[index], self.labels[index]


@cache
def digits(test_share: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images (n, 1, 8, 8) and their labels, split by ``seed``."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    train, test, train_labels, test_labels = train_test_split(
        raw.images, raw.target, test_size=test_share, stratify=raw.target, random_state=seed
    )
    images = [torch.from_numpy(part).float().unsqueeze(1) for part in (train, test)]
    mean, std = images[0].mean(), images[0].std()
    x, test_x = ((part - mean) / std for part in images)
    return x, torch.from_numpy(train_labels), test_x, torch.from_numpy(test_labels)


def reinitialised(model: nn.Module, seed: int) -> nn.Module:
    """A copy of the same widths with new weights."""
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


# -- the methods ---------------------------------------------------------------------------

FILTERS: dict[str, type[Pruner]] = {
    "L1": pruners.L1FilterPruner,
    "L2": pruners.L2FilterPruner,
    "FPGM": pruners.FPGMPruner,
    "Taylor": pruners.TaylorFOWeightFilterPruner,
    "OBD": pruners.OBDFilterPruner,
    "APoZ": pruners.ActivationAPoZRankFilterPruner,
    "Mean activation": pruners.ActivationMeanRankFilterPruner,
    "Slim": pruners.SlimPruner,
    "Random": pruners.RandomFilterPruner,
}
# Pruned before they are trained, for as long as dense and tuning take together.
UNTRAINED = "SNIP, untrained", "GraSP, untrained"
# Scores that can be compared between layers, so that one ranking over all makes sense.
RANKED = ("L1", "Taylor", "Slim")
WEIGHTS: dict[str, tuple[type[Pruner], str]] = {
    "Level": (pruners.LevelPruner, "normal"),
    "Level, one ranking": (pruners.LevelPruner, "global"),
    "LAMP": (pruners.LAMPPruner, "global"),
    "Movement": (pruners.MovementPruner, "normal"),
    "Level, linear layers": (pruners.LevelPruner, "balanced"),
    "Wanda, linear layers": (pruners.WandaPruner, "balanced"),
    "SNIP, untrained": (pruners.SNIPPruner, "global"),
    "GraSP, untrained": (pruners.GraSPPruner, "global"),
}
PEER = "Torch-Pruning"
SCRATCH = "From scratch"
PEERS = ("L1", "Taylor", "Slim", "Random")
COUPLED_RANKINGS = ("dependency_aware, one ranking", "isomorphic")
ONE_RANKING = ("global", *COUPLED_RANKINGS)


def all_methods() -> list[Method]:
    """Every method, named as in the results."""
    found = [
        Method("Dense", "as trained", "baselines"),
        Method(SCRATCH, "small network", "baselines"),
    ]
    for name in FILTERS:
        found += [Method(name, "normal"), Method(name, "normal", equal_cost=True)]
        found.append(Method(name, "dependency_aware"))
        if name in RANKED:
            found += [Method(name, mode, equal_cost=True) for mode in COUPLED_RANKINGS]
            found.append(Method(name, "global", equal_cost=True))
        if name in PEERS:
            found.append(Method(name, "local", tool=PEER))
        if name in RANKED:
            found.append(Method(name, "global", tool=PEER, equal_cost=True))
    found.append(Method(UNTRAINED[0], "dependency_aware"))
    return found + [Method(name, mode, "weights") for name, (_, mode) in WEIGHTS.items()]


class Trial:
    """One seed: `run` prunes its dense network by a method and fine-tunes what is left."""

    def __init__(self, settings: Settings, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.data = digits(settings.test_share, seed)
        self.example = self.data[2][:1]
        self.initial = reinitialised(Network(settings.widths), seed).eval()
        self.positions = positions(self.initial, self.example)
        self._budgets: dict[float, int] = {}

    @cached_property
    def dense(self) -> nn.Module:
        """Trained once; no method may change it."""
        return self.train(copy.deepcopy(self.initial), self.settings.dense_epochs)

    @cached_property
    def sparse(self) -> nn.Module:
        """Trained from the same weights for as long, with the penalty of `SlimPruner`."""
        settings, model = self.settings, copy.deepcopy(self.initial)
        evaluator = self.evaluator(settings.dense_epochs, settings.dense_lr)
        options = {"training_epochs": settings.dense_epochs, "scale": settings.slim_scale}
        config_list = [{"sparsity": 0.5, "op_types": ["default"]}]
        pruners.SlimPruner(model, config_list, evaluator, **options).compress()
        with suspend_masks(model):
            return copy.deepcopy(model)

    @cached_property
    def peer_sparse(self) -> nn.Module:
        """The same, with Torch-Pruning's own penalty."""
        settings, model = self.settings, copy.deepcopy(self.initial)
        pruner = self.peer_pruner(Method("Slim", "local", tool=PEER), model, 0.5)
        evaluator = self.evaluator(settings.dense_epochs, settings.dense_lr)
        evaluator.train(model, settings.dense_epochs, lambda: pruner.regularize(model))
        return model.eval()

    def run(self, method: Method, sparsity: float) -> Record:
        """What is left of the model, how accurate it is right after the cut, and fine-tuned."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # layers that a mode leaves alone
            asked = self.asked(method, sparsity) if method.equal_cost else sparsity
            if method.section == "baselines":
                model, before = self.baseline(method, sparsity)
            elif method.section == "weights":
                model, before = self.without_weights(method, asked)
            else:
                model = self.cut(method, asked)
                before = self.accuracy(model)
                model = self.train(model, *self.tuning(method))
        return {
            "seed": self.seed, "method": method.name, "sparsity": sparsity, "asked": asked,
            "accuracy": self.accuracy(model), "before": before,
            "parameters": sum(p.numel() for p in model.parameters()),
            "nonzero": nonzero(model), "mult_adds": self.mult_adds(shapes(model)),
        }  # fmt: skip

    def baseline(self, method: Method, sparsity: float) -> tuple[nn.Module, float | None]:
        if method.criterion == "Dense":
            return self.dense, self.accuracy(self.dense)
        small = self.cut(Method("Random", "dependency_aware"), sparsity)
        small = reinitialised(small, self.seed)
        epochs = self.settings.dense_epochs + self.settings.tuning_epochs
        return self.train(small, epochs), None

    # -- compress

    def tuning(self, method: Method) -> tuple[int, float]:
        """Epochs and learning rate after the pruning."""
        settings = self.settings
        if method.criterion in UNTRAINED:
            return settings.dense_epochs + settings.tuning_epochs, settings.dense_lr
        return settings.tuning_epochs, settings.tuning_lr

    def source(self, method: Method) -> nn.Module:
        """A copy of the model to prune."""
        if method.criterion in UNTRAINED:
            return copy.deepcopy(self.initial)
        if method.criterion != "Slim":
            return copy.deepcopy(self.dense)
        return copy.deepcopy(self.sparse if method.tool == "compress" else self.peer_sparse)

    def pruner(self, method: Method, model: nn.Module, sparsity: float) -> Pruner:
        kind: type[Pruner] = pruners.SNIPFilterPruner
        if method.criterion not in UNTRAINED:
            kind = FILTERS[method.criterion]
        options = self.options(kind)
        mode = method.mode.partition(",")[0]
        config_list: list[dict[str, Any]] = [{"op_types": ["default"]}]
        if method.mode in ONE_RANKING:
            limits = {"total_sparsity": sparsity, "max_sparsity_per_layer": MOST_PER_LAYER}
            config_list[0] |= limits
        else:
            config_list[0]["sparsity_per_layer"] = sparsity
        if kind is not pruners.SlimPruner:  # the head has no norm
            config_list.append({"exclude": True, "op_names": ["head"]})
        if mode in ("dependency_aware", "isomorphic"):
            options["dummy_input"] = self.example
        return kind(model, config_list, mode=mode, **options)

    def options(self, kind: type[Pruner]) -> dict[str, Any]:
        if kind is pruners.RandomFilterPruner:
            return {"seed": self.seed}
        if kind is pruners.SlimPruner:  # trained before, once for all modes
            return {"training_epochs": 0}
        return {"evaluator": self.evaluator()} if issubclass(kind, DataPruner) else {}

    def cut(self, method: Method, sparsity: float) -> nn.Module:
        model = self.source(method)
        if method.tool == PEER:
            self.peer_pruner(method, model, sparsity).step()
            return model
        model, masks = self.pruner(method, model, sparsity).compress()
        return ModelSpeedup(model, self.example, masks, verify=False).speedup_model()

    def without_weights(self, method: Method, sparsity: float) -> tuple[nn.Module, float]:
        """Fine-tuned under the masks, then sped up. Movement's training is half of the tuning."""
        kind, mode = WEIGHTS[method.criterion]
        epochs, rate = self.tuning(method)
        options = self.options(kind)
        if kind is pruners.MovementPruner:
            moving, epochs = epochs // 2, epochs - epochs // 2
            options = {"evaluator": self.evaluator(moving, rate), "training_epochs": moving}
        types = ["Linear"] if "linear" in method.criterion else ["Conv2d", "Linear"]
        key = "total_sparsity" if mode in ONE_RANKING else "sparsity_per_layer"
        config_list = [{key: sparsity, "op_types": types}]
        pruner = kind(self.source(method), config_list, mode=mode, **options)
        model, masks = pruner.compress()
        before = self.accuracy(model)
        self.train(model, epochs, rate)
        return ModelSpeedup(model, self.example, masks).speedup_model(), before

    # -- the same cost

    def asked(self, method: Method, sparsity: float) -> float:
        """The sparsity to ask for so that as much is left as of whole groups at ``sparsity``."""
        if sparsity not in self._budgets:
            uniform = Method("L1", "dependency_aware")
            self._budgets[sparsity] = self.cost(uniform, sparsity)
        # Layer by layer, masks of the same sparsity leave more of the network.
        least = sparsity if method.mode == "normal" else 0.0
        return no_less(lambda s: self.cost(method, s), self._budgets[sparsity], least)

    def cost(self, method: Method, sparsity: float) -> int | None:
        """Mult-adds that would be left; None where the pruner cannot mask so much."""
        if method.tool == PEER:
            return self.mult_adds(shapes(self.cut(method, sparsity)))
        model = self.source(method)
        try:
            masks = self.pruner(method, model, sparsity).calc_masks()
        except ConfigError:
            return None
        plan = ModelSpeedup(model, self.example, masks, verify=False).plan
        found = shapes(model)
        for path in found.keys() & plan.slices.keys():
            found[path] = plan.slices[path].shape(found[path])
        return self.mult_adds(found)

    def mult_adds(self, found: dict[str, tuple[int, ...]]) -> int:
        """Of one image in convolutions and linear layers, by the shapes of their weights."""
        return sum(math.prod(shape) * self.positions[path] for path, shape in found.items())

    # -- the peer

    def peer_pruner(self, method: Method, model: nn.Module, ratio: float) -> Any:
        import torch_pruning as peer

        importance = {
            "L1": lambda: peer.importance.GroupMagnitudeImportance(p=1),
            "Taylor": peer.importance.GroupTaylorImportance,
            "Slim": peer.importance.BNScaleImportance,
            "Random": peer.importance.RandomImportance,
        }[method.criterion]()
        kind, options = peer.pruner.BasePruner, {}
        if method.criterion == "Slim":
            kind, options = peer.pruner.BNScalePruner, {"reg": self.settings.slim_scale}
        if method.criterion == "Taylor":
            model.zero_grad()
            for batch in self.evaluator().batches(self.settings.batches_measured):
                self.evaluator().loss(model, batch).backward()
        torch.manual_seed(self.seed)
        return kind(
            model, self.example, importance, pruning_ratio=ratio, ignored_layers=[model.head],
            global_pruning=method.mode == "global", **options,
        )  # fmt: skip

    # -- training

    def evaluator(self, epochs: int = 1, rate: float = 0.0) -> Evaluator:
        """The training data in the seed's order; for so many epochs of one learning-rate cycle."""
        batches = Batches(*self.data[:2], self.settings.batch, self.seed)

        def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
            made = torch.optim.SGD(parameters, rate, 0.9, weight_decay=5e-4, nesterov=True)
            total = epochs * len(batches) + 1
            cycle = torch.optim.lr_scheduler.OneCycleLR(made, rate, total_steps=total)
            made.register_step_post_hook(lambda *_: cycle.step())
            return made

        return Evaluator(batches, F.cross_entropy, optimizer)

    def train(self, model: nn.Module, epochs: int, rate: float | None = None) -> nn.Module:
        rate = self.settings.dense_lr if rate is None else rate
        self.evaluator(epochs, rate).train(model, epochs, progress=False)
        return model.eval()

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        images, labels = self.data[2:]
        return float((model.eval()(images).argmax(1) == labels).float().mean())


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of the weights of convolutions and linear layers, by path."""
    return {
        f"{path}.weight": tuple(module.weight.shape)
        for path, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }


def positions(model: nn.Module, example: Tensor) -> dict[str, int]:
    """How often one input uses each weight: the places of its layer's output."""
    found: dict[str, int] = {}
    handles = [
        module.register_forward_hook(
            lambda _, __, y, path=path: found.update({f"{path}.weight": y[0, 0].numel()})
        )
        for path, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    with torch.no_grad():
        model(example)
    for handle in handles:
        handle.remove()
    return found


def nonzero(model: nn.Module) -> int:
    """Weights of convolutions and linear layers that are not 0."""
    names = shapes(model)
    return sum(int(p.count_nonzero()) for name, p in model.named_parameters() if name in names)


def no_less(
    cost: Callable[[float], int | None], target: int, low: float = 0.0, tolerance: float = 0.02
) -> float:
    """The highest sparsity that leaves at least ``target``, by bisection; cost falls with sparsity.

    None is for a sparsity that cannot be reached, and so is a cost that rises: a tool that skips
    layers which would vanish. ``low`` leaves enough. Ends within ``tolerance`` of the target.
    """
    high, lowest = 1.0, math.inf
    for _ in range(STEPS):
        middle = (low + high) / 2
        found = cost(middle)
        if found is None or not target <= found <= lowest:
            high = middle
            continue
        low, lowest = middle, found
        if found <= (1 + tolerance) * target:
            break
    return low
