"""The command line: ``compress inspect``, ``prune``, ``speedup`` and others; see ``--help``.

Its own packages are an extra, so that importing `compress` does not need them.
"""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    """What ``compress`` and ``python -m compress`` start."""
    missing = [name for name in ("typer", "yaml") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"compress: the command line needs {' and '.join(missing)}, not installed here: "
            "pip install 'compress-torch[cli]'"
        )
    from compress.cli.commands import app

    app(prog_name="compress")
