"""Pages of documentation as programs: every block runs, top to bottom, and prints what is shown.

The blocks of one page are one session in an empty directory:

- ``python`` runs. If its first line is ``# name.py``, it is a file instead, as is ``yaml``.
- ``sh``: each ``compress …`` line goes to the command line, and ``python`` and ``torchrun`` start
  files that the page has written. Others (``pip``, ``make``) are for the reader's machine.
- ``output`` is what the block before it prints, to the letter; of an error, its last line and the
  rest of the message. A row that ends in … begins so, and a row that is … stands for any.
- ``text`` after such a block is what it prints but for the numbers, which another machine has
  otherwise. Anywhere else it is not compared.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import CompressError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.M | re.S)
_FILE = re.compile(r"# (\S+\.\w+)\n")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line that it begins in."""

    language: str
    text: str
    line: int


def blocks(page: Path, *languages: str) -> Iterator[Block]:
    """The fenced blocks of a page, or those of some languages, in order."""
    text = page.read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        if not languages or match[1] in languages:
            yield Block(match[1], match[2], text.count("\n", 0, match.start(2)))


def run(page: Path) -> None:
    """Run a page in the current directory and hold what it prints against what it shows."""
    session: dict[str, Any] = {"__name__": "__main__"}
    printed, end = "", -9
    for block in blocks(page, "python", "yaml", "sh", "output", "text"):
        where = f"{page.name}, line {block.line}"
        beside = block.line - end <= 4  # the fences, and an empty line between them
        if block.language == "output" or (block.language == "text" and beside):
            assert beside, f"{where}: no block before it that prints this"
            compare(where, block.text, printed, numbers=block.language == "output")
            continue
        if file := _FILE.match(block.text):
            Path(file[1]).write_text(block.text, encoding="utf-8")
            continue
        if block.language in ("python", "sh"):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                error = python(page, block, session) if block.language == "python" else sh(block)
            printed, end = out.getvalue(), block.line + block.text.count("\n")
            if error is not None:
                following = next(b for b in [*blocks(page), block] if b.line > block.line)
                if not following.text.startswith(type(error).__name__):
                    raise error
                printed += f"{type(error).__name__}: {error}"


def python(page: Path, block: Block, session: dict[str, Any]) -> CompressError | None:
    """Run a block; an error of ours may be what the page shows."""
    try:  # blank lines before it, so that a traceback has the page's line numbers
        exec(compile("\n" * block.line + block.text, str(page), "exec"), session)
    except CompressError as error:
        return error
    return None


def sh(block: Block) -> None:
    """Run the lines that can: the command line in this process, the page's files in others."""
    from compress.cli.commands import app

    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["compress"]:
            try:
                app(words[1:], prog_name="compress")
            except SystemExit as end:
                assert not end.code, f"{line}: exit code {end.code}"
        elif words[:1] in (["python"], ["torchrun"]) and any(map(os.path.isfile, words)):
            module = [] if words[0] == "python" else ["-m", "torch.distributed.run"]
            command = [sys.executable, *module, *words[1:]]
            path = os.pathsep.join([str(ROOT), os.getcwd()])
            environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
            sys.stdout.write(done.stdout)


def compare(where: str, shown: str, printed: str, *, numbers: bool) -> None:
    """Every row that is shown was printed."""
    have = comparable(printed, numbers)
    for row in shown.splitlines():
        want = comparable(row.rstrip().rstrip("…"), numbers)
        assert want in have, f"{where} shows\n{row}\nbut this was printed:\n{printed}"


def comparable(text: str, numbers: bool) -> str:
    """Text without spaces, and without what another machine or version prints otherwise."""
    text = re.sub(r"\d(\.\d)?e[-+]\d\d|(?<=\.py:)\d+", "#", text)
    if not numbers:
        text = re.sub(r"\d[\d,.]*", "#", text)
    return "".join(re.sub("[━─]+", "", text).split())
