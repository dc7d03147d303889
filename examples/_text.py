"""Real text for the examples, as every Python brings it along: nothing is downloaded.

Docstrings of the standard library, by topic; and the language reference, letter by letter.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

TOPICS = {
    "network": "asyncio http urllib email socketserver ftplib smtplib ssl",
    "numbers": "statistics fractions _pydecimal random _pyio",
    "processes": "multiprocessing concurrent threading subprocess queue",
    "python": "ast inspect importlib pickle dis typing dataclasses",
    "files": "pathlib shutil tempfile zipfile tarfile os glob gzip posixpath",
    "markup": "xml html json csv configparser plistlib argparse",
}
WORDS, LENGTH = 2000, 48  # that are known, the most frequent ones; of each docstring
PADDING, UNKNOWN = 0, 1
_MOST = 450  # docstrings of a topic, so that none is most of all


class Docstrings(NamedTuple):
    """Word numbers (docstrings, `LENGTH`) and topics (docstrings,) to train and to test with."""

    train: TensorDataset
    test: TensorDataset


def docstrings(most: int | None = None) -> Docstrings:
    """About 2,200 docstrings as numbers of words; a fifth is for the test.

    ``most``: how many there are to train with, at most. The words are those of the training part.
    """
    generator = torch.Generator().manual_seed(0)  # of its own: the split is always the same
    texts, labels = [], []
    for label, modules in enumerate(TOPICS.values()):
        found = sorted({text for name in modules.split() for text in _docstrings_of(name)})
        taken = torch.randperm(len(found), generator=generator)[:_MOST].tolist()
        texts += [found[index] for index in taken]
        labels += [label] * len(taken)
    order = torch.randperm(len(texts), generator=generator).tolist()
    train, test = order[len(order) // 5 :][:most], order[: len(order) // 5]
    counts = Counter(word for index in train for word in texts[index])
    known = [word for word, _ in counts.most_common(WORDS - 2)]
    number = {word: index for index, word in enumerate(known, UNKNOWN + 1)}

    def part(indices: list[int]) -> TensorDataset:
        rows = torch.full((len(indices), LENGTH), PADDING)
        for row, index in zip(rows, indices, strict=True):
            words = [number.get(word, UNKNOWN) for word in texts[index][:LENGTH]]
            row[: len(words)] = torch.tensor(words)
        return TensorDataset(rows, torch.tensor([labels[index] for index in indices]))

    return Docstrings(part(train), part(test))


def _docstrings_of(module: str) -> Iterator[tuple[str, ...]]:
    """The words of the docstrings of a module or package, without importing it."""
    library = Path(sysconfig.get_paths()["stdlib"])
    single = library / f"{module}.py"
    for file in [single] if single.is_file() else sorted((library / module).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)):
                text = (ast.get_docstring(node) or "").lower()
                words = tuple(re.findall(r"[a-z]+|\d|[^\w\s]", text))
                if len(words) >= 8:
                    yield words


class Letters(NamedTuple):
    """Pieces of text as numbers of letters (pieces, length); ``alphabet[number]`` is a letter."""

    train: Tensor
    test: Tensor
    alphabet: list[str]


def letters(length: int = 128) -> Letters:
    """The reference of the Python language, half a million letters; the last tenth is the test."""
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    alphabet = sorted(set(text))
    numbers = {letter: number for number, letter in enumerate(alphabet)}
    pieces = torch.tensor([numbers[letter] for letter in text[: len(text) // length * length]])
    pieces = pieces.view(-1, length)
    return Letters(pieces[: -len(pieces) // 10], pieces[-len(pieces) // 10 :], alphabet)
