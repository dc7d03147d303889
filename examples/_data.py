"""Real images for the examples: scikit-learn's digits, CIFAR-10, and a folder of images.

Each loader returns an `Images`: datasets of ``(image, label)`` with float images ``(C, H, W)``.
Nothing is downloaded.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Images(NamedTuple):
    """``train`` may be augmented; ``test`` is not, and is the same in every run."""

    train: Dataset
    test: Dataset
    classes: int


def digits(size: int = 16) -> Images:
    """1,797 handwritten digits, 8x8, resized to ``(1, size, size)``; 20 % of each class is test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    images = torch.from_numpy(raw.images).float().unsqueeze(1) / 16
    images = F.interpolate(images, size=(size, size), mode="bilinear")
    labels = torch.from_numpy(raw.target)
    # A seed of its own: the split must not move with the seed of a training run.
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=raw.target, random_state=0
    )
    images = (images - images[train].mean()) / images[train].std()
    return Images(
        TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test]), 10
    )


def cifar10(folder: str | Path) -> Images:
    """CIFAR-10 as published for Python: ``data_batch_1`` … ``data_batch_5`` and ``test_batch``.

    ``folder`` holds these files, or the folder ``cifar-10-batches-py`` with them. Raises
    FileNotFoundError when a file is missing and ValueError when one is not of the format.
    """
    folder = Path(folder).expanduser()
    if (folder / "cifar-10-batches-py").is_dir():
        folder = folder / "cifar-10-batches-py"
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"CIFAR-10: {folder} lacks {', '.join(missing)}. Download cifar-10-python.tar.gz from "
            "https://www.cs.toronto.edu/~kriz/cifar.html, unpack it, and give the folder that "
            "holds cifar-10-batches-py."
        )
    batches = [_cifar10_batch(folder / name) for name in names]
    plain: list[Callable] = [
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(CIFAR10_MEAN, CIFAR10_STD),
    ]
    augmented = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *plain]
    images, labels = (torch.cat(parts) for parts in zip(*batches[:5], strict=True))
    return Images(
        _Transformed(images, labels, v2.Compose(augmented)),
        _Transformed(*batches[5], v2.Compose(plain)),
        10,
    )


def image_folder(folder: str | Path, size: int = 224) -> Images:
    """ImageNet's layout: ``train/<class>/*`` and ``val/<class>/*``, cut to ``(3, size, size)``.

    Raises FileNotFoundError when a folder is missing or empty and ValueError when the two parts
    have other classes.
    """
    folder = Path(folder).expanduser()
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(
                f"image folder: {folder / part} is not a folder; expected "
                f"{folder}/train/<class>/<image> and {folder}/val/<class>/<image>"
            )
    end = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]
    augmented = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), *end]
    centred = [v2.Resize(size * 8 // 7, antialias=True), v2.CenterCrop(size), *end]
    train = ImageFolder(str(folder / "train"), v2.Compose(augmented))
    test = ImageFolder(str(folder / "val"), v2.Compose(centred))
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(f"image folder: {folder}/train and /val differ in the classes {differing}")
    return Images(train, test, len(train.classes))


class _Transformed(Dataset):
    """uint8 images ``(N, C, H, W)`` in memory, transformed as they are read."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, transform: Callable) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.transform(self.images[index]), self.labels[index]


def _cifar10_batch(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 images ``(N, 3, 32, 32)`` and their labels."""
    try:
        batch = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: batch[key] for key in batch}
        images = torch.from_numpy(np.asarray(batch["data"], dtype=np.uint8).copy())
        labels = torch.tensor(batch["labels"], dtype=torch.int64)
        return images.reshape(len(labels), 3, 32, 32), labels
    except _UNREADABLE as error:
        raise ValueError(
            f"CIFAR-10: {path} is not a batch of the Python version (a pickled dict with 'data' "
            f"(N, 3072) and 'labels'): {type(error).__name__}: {error}"
        ) from error


_UNREADABLE = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads plain Python values and NumPy arrays; a pickle that asks for more is refused.

    A pickle can run any code, and a data set comes from elsewhere.
    """

    _ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "_frombuffer"})

    def find_class(self, module: str, name: str) -> Any:
        # Two names of one module: NumPy 2 renamed numpy.core, the published files are older.
        if module.split(".")[0] == "numpy" and name in self._ALLOWED:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")
