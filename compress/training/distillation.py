"""Knowledge distillation: a loss that draws a pruned model to what the dense one computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import CompressError, ConfigError, closest
from compress.evaluator import Evaluator, device_of
from compress.graph.run import evaluating

Loss = Callable[[nn.Module, Any], Tensor]


class Distillation:
    """``distillation(model, batch)``: the loss of a model beside a teacher, a scalar tensor.

    (1 − α)·L(y) + α·T²·KL(softmax(z_t/T) ‖ softmax(z/T)) + β·Σ ½·mean (h_t − r(h))², with the
    logits z: Hinton et al. 2015, Distilling the Knowledge in a Neural Network, section 2, and hints
    h from within, each over its entries: Romero et al. 2015, FitNets, eq. 3. It is made for an
    `Evaluator`, so that whatever trains with one distils::

        loss = Distillation(dense, Evaluator(loader, criterion))
        Evaluator(loader, optimizer_factory=make_optimizer, loss=loss)

    Args:
        teacher: run in eval mode and without gradients; its modes are as before after each call.
            It is left alone: pass a copy of what is pruned in place.
        evaluator: computes L, on whatever batches it takes.
        temperature: T, above 0.
        alpha: α, in [0, 1]; with 1 no labels are needed.
        hints: module paths whose outputs are compared; ``{student's path: teacher's path}`` where
            they differ. Their outputs have one shape, unless ``projections`` makes them so.
        hint_weight: β.
        projections: r by the student's path, identity by default: for layers that have shrunk, such
            as a 1×1 convolution. They are the caller's to train.
        logits: ``logits(output)`` -> ``(..., classes)``, of what the model returns. By default a
            tensor itself, the ``logits`` of a transformers output, the first of a tuple.

    Raises:
        ConfigError: lists what is wrong with the arguments.
    """

    def __init__(
        self,
        teacher: nn.Module,
        evaluator: Evaluator,
        *,
        temperature: float = 4.0,
        alpha: float = 0.9,
        hints: Sequence[str] | Mapping[str, str] = (),
        hint_weight: float = 1.0,
        projections: Mapping[str, nn.Module] | None = None,
        logits: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.teacher, self.evaluator = teacher, evaluator
        self.temperature, self.alpha = temperature, alpha
        self.hints = dict(hints) if isinstance(hints, Mapping) else {path: path for path in hints}
        self.hint_weight = hint_weight
        self.projections = dict(projections or {})
        self.logits = _logits if logits is None else logits
        problems = self._problems()
        if problems:
            raise ConfigError("this Distillation cannot be made:", problems)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss on a batch; ``model`` runs once, with gradients.

        Raises:
            CompressError: a hint's outputs are of different shapes, or a module of one did not run.
            ConfigError: ``model`` has no module of a hint's name.
        """
        with _outputs(model, ("", *self.hints)) as student:
            if self.alpha < 1:
                total = (1 - self.alpha) * self.evaluator.loss(model, batch)
            else:
                self.evaluator.forward(model, batch)
                total = torch.zeros((), device=device_of(model))
        with (
            torch.no_grad(),
            evaluating(self.teacher),
            _outputs(self.teacher, ("", *self.hints.values())) as teacher,
        ):
            self.evaluator.forward(self.teacher, batch)
        if self.alpha > 0:
            z, z_teacher = self.logits(student.get("")), self.logits(teacher.get(""))
            total = total + self.alpha * soft_cross_entropy(z, z_teacher, self.temperature)
        for path, of_teacher in self.hints.items():
            hint = self._hint(path, student.get(path), teacher.get(of_teacher))
            total = total + self.hint_weight * hint
        return total

    def _hint(self, path: str, own: Any, wanted: Any) -> Tensor:
        if not isinstance(own, Tensor) or not isinstance(wanted, Tensor):
            raise CompressError(
                f"hint {path!r}: got {type(own).__name__} of the model and {type(wanted).__name__} "
                "of the teacher; expected modules that run and return one tensor"
            )
        if path in self.projections:
            own = self.projections[path](own)
        if own.shape != wanted.shape:
            raise CompressError(
                f"hint {path!r}: got shape {tuple(own.shape)}, the teacher's is "
                f"{tuple(wanted.shape)}; choose a module that has not shrunk, or pass "
                f"projections={{{path!r}: ...}} that makes them the same"
            )
        return F.mse_loss(own, wanted) / 2

    def _problems(self) -> list[str]:
        problems = []
        if not isinstance(self.teacher, nn.Module):
            got = type(self.teacher).__name__
            problems.append(f"teacher: got {got}; expected a torch.nn.Module")
        if not isinstance(self.evaluator, Evaluator):
            got = type(self.evaluator).__name__
            problems.append(f"evaluator: got {got}; expected an Evaluator, which has the loss")
        if not self.temperature > 0:
            problems.append(f"temperature: got {self.temperature!r}; expected a number > 0")
        if not 0 <= self.alpha <= 1:
            problems.append(f"alpha: got {self.alpha!r}; expected a number in [0, 1]")
        if not self.hint_weight >= 0:
            problems.append(f"hint_weight: got {self.hint_weight!r}; expected a number ≥ 0")
        problems += [
            f"projections: got {path!r}, which is no hint{closest(path, self.hints)}"
            for path in self.projections
            if path not in self.hints
        ]
        if isinstance(self.teacher, nn.Module):
            problems += _missing(self.teacher, self.hints.values())
        return problems


def soft_cross_entropy(logits: Tensor, of_teacher: Tensor, temperature: float) -> Tensor:
    """T²·KL(softmax(z_t/T) ‖ softmax(z/T)), the mean over all but the last axis, the classes."""
    own = F.log_softmax(logits.flatten(0, -2) / temperature, dim=-1)
    wanted = F.log_softmax(of_teacher.flatten(0, -2) / temperature, dim=-1)
    return F.kl_div(own, wanted, reduction="batchmean", log_target=True) * temperature**2


@contextmanager
def _outputs(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What these modules return while the model runs, by path."""
    found: dict[str, Any] = {}
    problems = _missing(model, paths)
    if problems:
        raise ConfigError("this model does not fit the Distillation:", problems)
    modules = dict(model.named_modules(remove_duplicate=False))

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[path] = output

        return hook

    with ExitStack() as stack:
        for path in dict.fromkeys(paths):
            stack.enter_context(modules[path].register_forward_hook(keep(path)))
        yield found


def _missing(model: nn.Module, paths: Any) -> list[str]:
    names = dict(model.named_modules(remove_duplicate=False))
    return [
        f"hints: got {path!r}; {type(model).__name__} has no module of this name"
        f"{closest(path, names)}"
        for path in paths
        if path not in names
    ]


def _logits(output: Any) -> Tensor:
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.dim() < 2:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise CompressError(
            f"no logits in the model's output: got {got}; expected (..., classes): pass logits="
            "lambda output: ... to the Distillation"
        )
    return output
