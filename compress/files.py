"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise ``OSError`` where a file cannot be written, for a caller who works long before he does.

    The folder is missing or cannot be written, or ``path`` is a folder.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target}: there is no folder {target.parent}; make it first")
    if target.is_dir():
        raise IsADirectoryError(f"{target}: it is a folder; pass the name of a file")
    if not os.access(target.parent, os.W_OK):
        raise PermissionError(f"{target}: the folder {target.parent} cannot be written")


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Call ``write`` on a temporary file beside ``path`` and move it there: whole or not at all.

    Raises:
        OSError: the folder is missing or cannot be written, or ``path`` is a folder.
    """
    check_writable(path)
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        write(temporary)
        os.replace(temporary, target)
    except OSError as error:
        if str(error.filename) != str(temporary):
            raise
        # Under the name that the caller knows.
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        temporary.unlink(missing_ok=True)
