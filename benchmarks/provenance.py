"""Where a number comes from: the machine, and the version of this repository."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path


def machine() -> str:
    """The processor and how many cores; needs Linux."""
    info = Path("/proc/cpuinfo").read_text()
    found = re.search(r"model name\s*: (.*)", info)
    return f"{found[1] if found else platform.machine()}, {os.cpu_count()} cores"


def commit() -> str:
    """Which version of this repository ran, "-dirty" when it had changes."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    ).stdout.strip()
