"""The diary of a search: one line for each candidate that was evaluated, on disk at once.

Started again, a search makes the same choices in the same order, and finds in its journal what it
has paid for already. So nothing else has to be saved, whatever the algorithm. Each line ends with a
checksum of itself; the last one may be torn by a kill, all others must be whole.
"""

from __future__ import annotations

import json
import os
import weakref
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from compress.errors import StateError
from compress.schedule.state import digest

try:
    import fcntl
except ImportError:  # Windows: two searches in one folder are not noticed there
    fcntl = None  # type: ignore[assignment]

FORMAT = "compress.search"
FORMAT_VERSION = 1
NAME = "search_journal.jsonl"


class Journal:
    """Lines of a file, or of memory only; nobody else's as long as it is open.

    Args:
        folder: where the file is; None keeps nothing.
        key: JSON values that say which search this is.

    Raises:
        StateError: the file is of another search, of one that is running, damaged, or no journal;
            it is as it was.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, key: Mapping[str, Any]) -> None:
        self._lines: dict[str, dict[str, Any]] = {}
        self._file: int | None = None
        self.path = None if folder is None else Path(folder) / NAME
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
            self._file = os.open(self.path, flags, 0o666)
            _OPEN.add(self)
            self._lock(self._file)
            self._read(self.path.read_bytes(), key)
        except OSError as error:
            self.close()
            raise StateError(f"experiment_data_dir: {self.path.parent}: {error}") from error
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[str]:
        """The names of the entries."""
        return iter(self._lines)

    def __del__(self) -> None:
        self.close()

    def get(self, name: str) -> dict[str, Any] | None:
        """The entry of this name, if there is one."""
        return self._lines.get(name)

    def add(self, name: str, entry: Mapping[str, Any]) -> None:
        """Write an entry, of JSON values; when this returns, it is on disk.

        Raises:
            StateError: it cannot be written; what was written before is there.
        """
        line = {"id": name, **entry}
        if self.path is not None:
            self._append(_packed(line))
        self._lines[name] = line

    def close(self) -> None:
        """Let others have the file; nothing can be added any more."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    # -- the file --------------------------------------------------------------------------

    def _lock(self, file: int) -> None:
        """Keep others out. The system forgets the lock of a process that ends, however it does."""
        assert self.path is not None, "only with a folder"
        if fcntl is None:
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StateError(
                f"{self.path.parent}: another search is running in this experiment_data_dir; wait "
                "for its end, or pass another folder"
            ) from error
        except OSError:  # a file system without locks
            return

    def _read(self, content: bytes, key: Mapping[str, Any]) -> None:
        assert self._file is not None, "it has just been opened"
        header = _packed(
            {"format": FORMAT, "version": FORMAT_VERSION, "hash": digest(key), "key": dict(key)}
        )
        whole, newline, torn = content.rpartition(b"\n")
        if not newline and header.startswith(torn):  # nothing yet, or cut off by a kill
            os.ftruncate(self._file, 0)
            self._append(header)
            return
        lines = (whole if newline else torn).split(b"\n")
        self._check(self._parsed(1, lines[0], "format"), key)
        for number, line in enumerate(lines[1:], 2):
            entry = self._parsed(number, line, "id")
            self._lines[entry["id"]] = entry
        if torn:  # the line that a kill has cut off
            os.ftruncate(self._file, len(whole) + 1)

    def _append(self, line: bytes) -> None:
        if self._file is None:
            raise StateError(f"{self.path}: this journal is closed")
        before = os.fstat(self._file).st_size
        try:
            left = line
            while left:
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, before)
            raise StateError(
                f"{self.path}: the journal cannot be written: {error}; all candidates before are "
                "in it: make room, and begin the same search again to go on"
            ) from error

    def _parsed(self, number: int, line: bytes, first: str) -> dict[str, Any]:
        """A line as it was written, or an error that says what to do."""
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if isinstance(found, dict) and next(iter(found), "") == first:
            found.pop("crc32", None)
            if _packed(found) == line + b"\n":
                return found
        if number == 1:
            raise StateError(
                f"{self.path}: this is no journal of a search, or its first line is damaged; pass "
                "another experiment_data_dir, or remove the file to begin anew"
            )
        raise StateError(
            f"{self.path}: line {number} is damaged; remove this line, and its candidate is "
            "evaluated again, or pass another experiment_data_dir"
        )

    def _check(self, header: Mapping[str, Any], key: Mapping[str, Any]) -> None:
        if header.get("format") != FORMAT or header.get("version") != FORMAT_VERSION:
            raise StateError(
                f"{self.path}: no journal of this release (format {header.get('format')!r}, "
                f"version {header.get('version')!r}); pass another experiment_data_dir"
            )
        if header.get("hash") == digest(key):
            return
        shown = "; ".join(
            f"{name}: {json.dumps(was)[:80]}, now {json.dumps(now)[:80]}"
            for name, was, now in list(_differences(header.get("key", {}), key))[:4]
        )
        raise StateError(
            f"{self.path.parent if self.path else ''}: experiment_data_dir has the journal of "
            f"another search ({shown}); pass another folder, or remove {NAME} to begin anew"
        )


def _differences(
    saved: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of what differs; of a dict, what differs in it."""
    for name in dict.fromkeys([*saved, *now]):
        one, other = saved.get(name), now.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differences(one, other)
        elif one != other:
            yield name, one, other


def _packed(line: Mapping[str, Any]) -> bytes:
    """A line of the file."""
    text = json.dumps(line)
    return f'{text[:-1]}, "crc32": "{zlib.crc32(text.encode()):08x}"}}\n'.encode()


_OPEN: weakref.WeakSet[Journal] = weakref.WeakSet()


def _close_inherited() -> None:
    """A worker that was forked would keep the lock when the search is killed."""
    for journal in list(_OPEN):
        journal.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)
