"""Every error that `compress` raises on purpose, in one small tree.

Each message names the module path, what was found, what was expected, and what to do next, and is
raised before the model is touched.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CompressError(Exception):
    """Base of all errors of this package: ``except CompressError`` catches every one."""


class ConfigError(CompressError, ValueError):
    """A config_list or a pruner argument cannot be carried out; lists every problem found.

    Attributes:
        problems: each by itself.
    """

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        self.problems = tuple(problems) or (message,)
        super().__init__("\n  ".join([message, *problems]))


class MaskError(CompressError, ValueError):
    """A mask cannot be made, read, saved, or put on this model."""


class StateError(CompressError, ValueError):
    """A saved state cannot be read, or belongs to something else; nothing has been changed."""


class SearchError(CompressError, RuntimeError):
    """A search cannot go on: of its evaluator, its workers or its files; the model is untouched."""


class CheckpointError(CompressError, ValueError):
    """A checkpoint cannot be written or read, or does not fit; nothing has been changed."""


class ExportError(CompressError, RuntimeError):
    """A model cannot be exported, or computes something else as exported; no file was written."""


class ChartError(CompressError, RuntimeError):
    """A chart cannot be drawn: matplotlib is missing, or it is no kind of file."""


class ReportError(CompressError, ValueError):
    """There is nothing to report, it is of another kind than it should be, or no kind of file."""


class TraceError(CompressError, RuntimeError):
    """The model could not be run and recorded on the dummy input."""


class GraphError(CompressError, LookupError):
    """A question to the channel graph names a layer or a channel that the run did not use."""


class SpeedupError(CompressError, RuntimeError):
    """The model cannot be shrunk with these masks; it has been left as it was."""


class VerificationError(SpeedupError):
    """The shrunk model did not compute what the masked one does; the change was undone."""


def closest(name: str, existing: Iterable[str]) -> str:
    """The part of a message that suggests the existing name most like ``name``; may be empty."""
    found = difflib.get_close_matches(name, list(existing), n=1, cutoff=0.4)
    return f"; did you mean {found[0]!r}?" if found else ""
