"""The diary of a search: one line for each candidate that was evaluated, on disk at once.

Started again, a search makes the same choices in the same order, and finds in its journal what it
has paid for already. So nothing else has to be saved, whatever the algorithm.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.errors import StateError
from compress.schedule.state import digest

FORMAT = "compress.search"
FORMAT_VERSION = 1
NAME = "search_journal.jsonl"


class Journal:
    """Lines of a file, or of memory only.

    Args:
        folder: where the file is; None keeps nothing.
        key: JSON values that say which search this is.

    Raises:
        StateError: the file is of another search, or no journal; it is as it was.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, key: Mapping[str, Any]) -> None:
        self._lines: dict[str, dict[str, Any]] = {}
        self.path = None if folder is None else Path(folder) / NAME
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            content = self.path.read_bytes() if self.path.exists() else b""
        except OSError as error:
            raise StateError(f"experiment_data_dir: {self.path.parent}: {error}") from error
        whole, _, torn = content.rpartition(b"\n")
        lines = [self._parsed(number, line) for number, line in enumerate(whole.split(b"\n"))]
        if not whole:
            self._append({"format": FORMAT, "version": FORMAT_VERSION, "hash": digest(key),
                          "key": dict(key)}, truncate_to=0)  # fmt: skip
            return
        self._check(lines[0], key)
        self._lines = {line["id"]: line for line in lines[1:]}
        if torn:  # the line that a kill has cut off
            with open(self.path, "rb+") as file:
                file.truncate(len(whole) + 1)

    def __len__(self) -> int:
        return len(self._lines)

    def get(self, name: str) -> dict[str, Any] | None:
        """The entry of this name, if there is one."""
        return self._lines.get(name)

    def add(self, name: str, entry: Mapping[str, Any]) -> None:
        """Write an entry, of JSON values; when this returns, it is on disk."""
        line = {"id": name, **entry}
        if self.path is not None:
            self._append(line)
        self._lines[name] = line

    def _append(self, line: Mapping[str, Any], truncate_to: int | None = None) -> None:
        assert self.path is not None, "only with a folder"
        try:
            with open(self.path, "ab") as file:
                if truncate_to is not None:
                    file.truncate(truncate_to)
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StateError(f"{self.path}: the journal cannot be written: {error}") from error

    def _parsed(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            found = json.loads(line) if line else {}
        except ValueError:
            found = None
        if not isinstance(found, dict) or (line and ("id" if number else "format") not in found):
            raise StateError(
                f"{self.path}: line {number + 1} is none of a search's journal; pass another "
                "experiment_data_dir, or remove the file to begin anew"
            )
        return found

    def _check(self, header: Mapping[str, Any], key: Mapping[str, Any]) -> None:
        if header.get("format") != FORMAT or header.get("version") != FORMAT_VERSION:
            raise StateError(
                f"{self.path}: no journal of this release (format {header.get('format')!r}, "
                f"version {header.get('version')!r}); pass another experiment_data_dir"
            )
        if header.get("hash") == digest(key):
            return
        saved = header.get("key", {})
        names = [n for n in dict.fromkeys([*saved, *key]) if saved.get(n) != key.get(n)]
        shown = "; ".join(
            f"{name}: {json.dumps(saved.get(name))[:80]}, now {json.dumps(key.get(name))[:80]}"
            for name in names[:4]
        )
        raise StateError(
            f"{self.path.parent if self.path else ''}: experiment_data_dir has the journal of "
            f"another search ({shown}); pass another folder, or remove {NAME} to begin anew"
        )
