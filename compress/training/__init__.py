"""Training a masked or a small model: a loop and its parts, each of use in a loop of your own."""

from compress.training.clipping import clip_grad_adaptive, clip_grad_norm, clip_grad_value
from compress.training.distillation import Distillation
from compress.training.fine_tuning import EarlyStopping, Epoch, fine_tune
from compress.training.freezing import FrozenParts, unfreeze_around
from compress.training.recalibration import recalibrate_batch_norms

__all__ = [
    "Distillation",
    "EarlyStopping",
    "Epoch",
    "FrozenParts",
    "clip_grad_adaptive",
    "clip_grad_norm",
    "clip_grad_value",
    "fine_tune",
    "recalibrate_batch_norms",
    "unfreeze_around",
]
