"""Pruners that look at what layers make of data: their activations, or their inputs.

Only running sums are kept, one number per channel, never activations.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from compress import criteria
from compress.evaluator import Evaluator
from compress.graph.watch import function_name
from compress.pruners.base import Layer, foreign_layers, raise_all
from compress.pruners.data import MeasuringPruner
from compress.pruners.oneshot import ChannelPruner, WeightPruner, filter_axis
from compress.pruners.parts import RECURRENT

RECORDED = "recorded"
_CHOICES: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "relu6": F.relu6, "gelu": F.gelu}

_ACTIVATIONS = frozenset(
    "relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh "
    "sigmoid tanh softplus softsign threshold clamp clamp_min clip".split()
)
# Between a layer and its activation: what leaves a channel a channel.
_BETWEEN = frozenset(
    "batch_norm instance_norm group_norm layer_norm rms_norm add radd iadd dropout dropout1d "
    "dropout2d dropout3d alpha_dropout feature_alpha_dropout max_pool1d max_pool2d max_pool3d "
    "avg_pool1d avg_pool2d avg_pool3d contiguous clone float to".split()
)


@dataclass
class ChannelSums:
    """Running sums over what one channel, or feature, was in all batches; each is ``(units,)``.

    Attributes:
        count: values per channel.
        zeros: how many of them were 0.
        magnitude: the sum of their |x|.
        squares: the sum of their x².
    """

    count: int = 0
    zeros: Tensor | int = 0
    magnitude: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, values: Tensor, axis: int) -> None:
        """Count ``values`` in, whose channels lie along ``axis``."""
        rows = values.detach().movedim(axis, -1).reshape(-1, values.shape[axis])
        # Apple's devices have no float64.
        rows = rows.to(torch.float32 if rows.device.type == "mps" else torch.float64)
        self.count += len(rows)
        self.zeros = self.zeros + (rows == 0).sum(0)
        self.magnitude = self.magnitude + rows.abs().sum(0)
        self.squares = self.squares + rows.square().sum(0)


class _Passage:
    """One call of a layer, on its way to an activation."""

    def __init__(self, name: str, axis: int, units: int) -> None:
        self.name, self.axis, self.units = name, axis, units
        self.arrived = False

    def fits(self, tensor: Tensor) -> bool:
        return tensor.dim() >= -self.axis and tensor.shape[self.axis] == self.units


class _Follower(TorchFunctionMode):
    """Finds the first activation that each layer's output reaches: a function, or a module's."""

    def __init__(self, arrive: Callable[[_Passage, Tensor], None]) -> None:
        super().__init__()
        self._arrive = arrive
        # Weak, so that no activation lives longer than the model's forward lets it.
        self._travelling: Any = WeakTensorKeyDictionary()

    def follow(self, passage: _Passage, output: Tensor) -> None:
        self._travelling[output] = [passage]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = [
            passage
            for tensor in (*args, *kwargs.values())
            if isinstance(tensor, Tensor)
            for passage in self._travelling.get(tensor, ())
            if not passage.arrived
        ]
        result = func(*args, **kwargs)
        if found and isinstance(result, Tensor):
            name = function_name(func)
            if name in _ACTIVATIONS:
                for passage in found:
                    self._end(passage, result)
            elif name in _BETWEEN:
                self._travelling[result] = found
        return result

    def _end(self, passage: _Passage, result: Tensor) -> None:
        passage.arrived = True
        if passage.fits(result):
            self._arrive(passage, result)


class ActivationPruner(MeasuringPruner, ChannelPruner):
    """Scores filters by the activations that they lead to.

    Of recurrent modules by their outputs, which are the hidden units of the last layer: those of
    layers below, cells that are projected, and heads of attention are not seen and refused.

    Args:
        model, config_list, evaluator: as `MeasuringPruner`; no loss is needed with an `Evaluator`.
        activation: "recorded": the first activation function that a layer's output really reaches,
            through norms, additions and pooling (a layer without one: its own output). "relu",
            "relu6" or "gelu": that function of the layer's own output, before any norm, which is
            what NNI v1 does.
        **arguments: as `MeasuringPruner`.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator | None = None,
        *,
        activation: str = RECORDED,
        **arguments: Any,
    ) -> None:
        self.activation = activation
        super().__init__(model, config_list, evaluator, **arguments)
        raise_all(type(self).__name__, self._unseen())
        self._sums: dict[str, ChannelSums] = {}

    def _unseen(self) -> list[str]:
        """What is wrong with targets whose units no output of a module shows."""
        instead = "use a pruner that scores weights or gradients, or exclude it"
        problems = []
        for target in self.targets:
            reason = _unseen(self.model.get_submodule(target.modules[0]), target.weights[0])
            problems += [f"{target.name!r}: {reason}; {instead}"] if reason else []
        return problems

    @abstractmethod
    def statistic(self, sums: ChannelSums) -> Tensor:
        """``(units,)``, the scores of a layer's units of what was summed."""

    def score(self, layer: Layer) -> Tensor:
        return self.statistic(self._sums[layer.name])

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if self.activation not in (RECORDED, *_CHOICES):
            choices = ", ".join(map(repr, (RECORDED, *_CHOICES)))
            problems.append(f"activation: got {self.activation!r}; expected one of {choices}")
        return problems

    def _measure(self) -> None:
        own: dict[str, ChannelSums] = {}
        reached: dict[str, ChannelSums] = {}

        def arrive(passage: _Passage, values: Tensor) -> None:
            reached.setdefault(passage.name, ChannelSums()).add(values, passage.axis)

        follower = _Follower(arrive)
        function = _CHOICES.get(self.activation)

        def leave(name: str, module: nn.Module, output: Any) -> None:
            axis = _channel_axis(module)
            if isinstance(module, RECURRENT):
                output = _hidden(module, name, output)
            values = output if function is None else function(output.detach())
            own.setdefault(name, ChannelSums()).add(values, axis)
            if not isinstance(module, RECURRENT):  # a hidden unit comes out of its activation
                follower.follow(_Passage(name, axis, output.shape[axis]), output)

        recording = follower if self.activation == RECORDED else nullcontext()
        with _after_each_call(self._users(), leave), recording:
            self.data.measure(self.model, self.training_batches, _nothing, progress=self.progress)
        self._refuse_unused(own)
        self._sums = own | reached


class ActivationAPoZRankFilterPruner(ActivationPruner):
    """Masks the filters whose activations are most often 0.

    The score is 1 - APoZ, the average percentage of zeros over samples and places: Hu et al. 2016,
    Network Trimming, eq. 1.
    """

    def statistic(self, sums: ChannelSums) -> Tensor:
        return criteria.apoz(torch.as_tensor(sums.zeros), sums.count)


class ActivationMeanRankFilterPruner(ActivationPruner):
    """Masks the filters with the smallest mean activation: Molchanov et al. 2017, section 2.2.

    The mean is of |a|, which for the paper's ReLU is that of a; GELU and SiLU have negative values,
    which say no less.
    """

    def statistic(self, sums: ChannelSums) -> Tensor:
        return criteria.mean_activation(torch.as_tensor(sums.magnitude), sums.count)


class WandaPruner(MeasuringPruner, WeightPruner):
    """Masks, in each row of a Linear layer, the weights with the smallest |w|·‖x‖₂.

    ‖x‖₂ is the norm of the weight's input feature over all tokens of all batches: Sun et al. 2024,
    A Simple and Effective Pruning Approach for Large Language Models, eq. 1. Every output loses the
    same number of weights, or with ``balance="2:4"`` every group of four inputs. Tied layers are
    scored once, with the inputs of all. Supports Linear and transformers' Conv1D; no loss is needed
    with an `Evaluator`.
    """

    supported_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    optional_types: ClassVar[tuple[type[nn.Module], ...]] = ()
    modes: ClassVar[tuple[str, ...]] = ("balanced",)

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        *args: Any,
        mode: str = "balanced",
        **options: Any,
    ) -> None:
        super().__init__(model, config_list, *args, mode=mode, **options)

    def score(self, layer: Layer) -> Tensor:
        """``(numel,)``, one for each weight."""
        norms = torch.as_tensor(self._sums[layer.name].squares).sqrt()
        matrix = _by_output(layer.weight, layer.module)
        return _by_output(criteria.wanda(matrix, norms), layer.module).flatten()

    def _measure(self) -> None:
        sums: dict[str, ChannelSums] = {}

        def enter(name: str, given: Tensor) -> None:
            sums.setdefault(name, ChannelSums()).add(given, -1)

        with _before_each_call(self._users(), enter):
            self.data.measure(self.model, self.training_batches, _nothing, progress=self.progress)
        self._refuse_unused(sums)
        self._sums = sums


def _by_output(matrix: Tensor, module: nn.Module) -> Tensor:
    """A Linear's ``(out, in)`` as it is, transformers' Conv1D's ``(in, out)`` turned; and back."""
    return matrix.t() if filter_axis(module)[0] == 1 else matrix


def _nothing() -> None:
    """What is wanted of a batch was done by hooks."""


def _channel_axis(module: nn.Module) -> int:
    """Where the channels of a layer's output lie, counted from the end: batched or not."""
    if isinstance(module, (nn.Linear, nn.Embedding, *RECURRENT, *foreign_layers())):
        return -1
    assert isinstance(module, nn.modules.conv._ConvNd)
    return -1 - len(module.kernel_size)


def _hidden(module: nn.Module, name: str, output: Any) -> Tensor:
    """The columns of a recurrent module's output that are the hidden units of one of its layers.

    ``(…, units)``; of the states that come with it, and of padding, nothing.
    """
    output = output if isinstance(output, Tensor) else output[0]
    values: Tensor = output.data if isinstance(output, PackedSequence) else output
    width = module.hidden_size
    assert isinstance(width, int)
    return values[..., width:] if name.endswith("_reverse") else values[..., :width]


def _unseen(module: nn.Module, weight: str) -> str:
    """Why a module's output does not show the units of a layer in it; empty if it does."""
    if isinstance(module, nn.MultiheadAttention):
        return "what its heads give is mixed before it comes out"
    if isinstance(module, nn.RNNBase):
        if module.proj_size:
            return "its hidden units are projected before they come out"
        if not weight.removesuffix("_reverse").endswith(f"_l{module.num_layers - 1}"):
            return f"only the last of its {module.num_layers} layers is seen in its output"
    return ""


@contextmanager
def _after_each_call(
    users: Mapping[str, Iterable[nn.Module]], leave: Callable[[str, nn.Module, Any], None]
) -> Iterator[None]:
    with ExitStack() as stack:
        for name, modules in users.items():
            for module in modules:

                def hook(module: nn.Module, _: Any, output: Any, name: str = name) -> None:
                    leave(name, module, output)

                stack.callback(module.register_forward_hook(hook).remove)
        yield


@contextmanager
def _before_each_call(
    users: Mapping[str, Iterable[nn.Module]], enter: Callable[[str, Tensor], None]
) -> Iterator[None]:
    with ExitStack() as stack:
        for name, modules in users.items():
            for module in modules:

                def hook(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                    enter(name, args[0] if args else next(iter(kwargs.values())))

                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
        yield
